"""Parameters and memory of a run, from a base's configuration alone."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from transformers import BertConfig, GPT2Config, LlamaConfig, Mistral3Config, MistralConfig

from srde_ds.config import Config, resolve
from srde_ds.distributed.expert_traffic import choose_transport
from srde_ds.distributed.workload import Workload
from srde_ds.errors import SRDEError
from srde_ds.model.base_shape import base_shape
from srde_ds.model.head import CHUNK_BYTES
from srde_ds.planner.describe import describe_run
from srde_ds.planner.gathers import ZERO_DEFAULTS
from srde_ds.planner.memory import Memory, memory
from srde_ds.planner.traffic import step_traffic
from srde_ds.planner.trainables import layer_trainables, trainable_values
from tests.helpers import tiny_llama, tiny_srde

D, F, LAYERS, VOCABULARY = 5120, 16384, 40, 131072  # Ministral-3-14B
MINISTRAL: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": D,
    "intermediate_size": F,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 262144,
    "tie_word_embeddings": False,
}
BASE_VALUES = 2 * VOCABULARY * D + LAYERS * (3 * D * F + 2 * D * 32 * 128 + 2 * D * 8 * 128 + 2 * D) + D


@pytest.fixture(scope="module")
def ministral(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a configuration and nothing else."""
    folder = tmp_path_factory.mktemp("ministral")
    MistralConfig(**MINISTRAL, architectures=["MistralForCausalLM"]).save_pretrained(folder)
    return folder


def run_config(base: Path, **options: Any) -> Config:
    return resolve({}, {"model_name": str(base), "max_length": 64, "neuron_parts": 1} | options)


def test_ministral_has_the_shape_of_the_design(ministral: Path) -> None:
    shape = base_shape(run_config(ministral))
    assert shape.parameters == BASE_VALUES
    assert shape.parameters == pytest.approx(13.5e9, rel=1e-3)
    assert shape.blocks == ((D, F),) * LAYERS


def test_the_seed_configuration_has_the_values_of_the_design(ministral: Path) -> None:
    config = run_config(ministral, preset="reference", num_experts=6)
    values = trainable_values(config.adapter, base_shape(config))
    n = round(0.01 * 3 * D * F)
    assert values == {
        "deltas.atoms": 16 * n * LAYERS,
        "deltas.importance": 6 * n * LAYERS,
        "deltas.mixing": 6 * 16 * LAYERS,
        "router.weight": 6 * D * LAYERS,
    }
    assert values["deltas.atoms"] == pytest.approx(1.61e9, rel=1e-3)
    assert values["deltas.importance"] == pytest.approx(0.60e9, rel=1e-2)


def test_deepspeeds_defaults_are_the_ones_assumed() -> None:
    from srde_ds.distributed.deepspeed_internals import deepspeed

    zero = deepspeed.runtime.zero.config.DeepSpeedZeroConfig()
    assert {key: getattr(zero, key) for key in ZERO_DEFAULTS} == ZERO_DEFAULTS


def test_states_of_the_seed_configuration_by_hand(ministral: Path) -> None:
    """Eight processes, each with an eighth of the rows of atoms and importance."""
    config = run_config(ministral, preset="reference")
    states = memory(Workload.of(config, 8), base_shape(config)).states
    rows = 314_573  # an eighth of 2,516,582 rows, padded to 2,516,584
    atoms, importance = 16 * rows * LAYERS, 6 * rows * LAYERS
    whole = 6 * 16 * LAYERS + 6 * D * LAYERS  # mixing and routers, cut by ZeRO
    owned = atoms + importance + whole / 8
    by_hand = {
        "base shard": 2 * BASE_VALUES / 8,
        # What has up to 100,000 values stays whole: norms, mixing, routers.
        "persistent weights": 2 * ((2 * LAYERS + 1) * D + whole),
        "trainables": 2 * owned,
        "fp32 masters": 4 * owned,
        "gradients": 4 * owned,
        "gradient bucket": 4 * 50_000_000,
        "optimizer state": 4 * atoms + 8 * (owned - atoms),
        "supports": 4 * 2_516_582 * LAYERS,
    }
    assert states == pytest.approx(by_hand, rel=1e-9)


def test_gathered_weights_by_hand(ministral: Path) -> None:
    """Before the loss: the head, and the two layers whose backward comes within a thousand million values."""
    config = run_config(ministral, gradient_checkpointing=True)
    shape = base_shape(config)
    loss = memory(Workload.of(config, 8), shape).moments["loss"]
    layer, trained = 3 * D * F + 2 * D * 32 * 128 + 2 * D * 8 * 128, 6 * 3 * D * 164
    assert loss["gathered base"] == 2 * (2 * layer + VOCABULARY * D)
    assert loss["gathered trainables"] == 2 * 2 * trained
    assert loss["gather buffer"] == pytest.approx(2 * (layer + trained), rel=1e-3)  # a whole layer ahead


def test_logits_by_hand(ministral: Path) -> None:
    config = run_config(ministral, batch_size=3)
    shape = base_shape(config)
    positions = 3 * 64
    in_one_chunk = (4 + 2) * positions * VOCABULARY
    assert memory(Workload.of(config, 1), shape).moments["loss"]["logits"] == in_one_chunk
    assert memory(Workload.of(config, 1), shape, labelled=0.25).moments["loss"]["logits"] == in_one_chunk / 4
    many = memory(Workload.of(run_config(ministral, batch_size=3000), 1), shape).moments["loss"]["logits"]
    assert CHUNK_BYTES - 6 * VOCABULARY < many <= CHUNK_BYTES
    changed = replace(shape, plain_head=False)  # then there are three copies of all
    assert memory(Workload.of(config, 1), changed).moments["loss"]["logits"] == 3 * 4 * positions * VOCABULARY


def test_what_changes_memory(ministral: Path, tmp_path: Path) -> None:
    options = tmp_path / "ds.json"
    options.write_text(json.dumps({"zero_optimization": {"stage3_prefetch_bucket_size": 0, "reduce_bucket_size": 10}}))
    shape = base_shape(run_config(ministral))

    def of(world_size: int = 2, **changes: Any) -> Memory:
        return memory(Workload.of(run_config(ministral, **changes), world_size), shape)

    free = of()
    values = sum(trainable_values(run_config(ministral).adapter, shape).values())
    assert of(bf16=False).states["base shard"] == 2 * free.states["base shard"]
    assert of(use_muon=False).states["optimizer state"] == 8 * values / 2
    assert of(use_muon=False).states["optimizer state"] > 1.9 * free.states["optimizer state"]
    assert of(use_muon=False).moments["optimizer step"]["update"] == pytest.approx(12 * values / 2, rel=0.01)
    assert free.moments["optimizer step"]["update"] == pytest.approx(4 * values / 2, rel=0.01)
    assert of(world_size=4).states["gradients"] == free.states["gradients"] / 2
    assert of(deepspeed_config=str(options)).states["gradient bucket"] == 40
    assert of(deepspeed_config=str(options)).moments["loss"]["gather buffer"] == 0
    middle = "backward of layer 20"
    assert of(deepspeed_config=str(options)).moments[middle]["gathered base"] < free.moments[middle]["gathered base"]
    assert "gathered base" not in of(world_size=1).moments["loss"]
    checkpointed = of(gradient_checkpointing=True, max_length=4096)
    assert checkpointed.total < of(max_length=4096).total / 2
    assert of(flash_attention=True, max_length=4096).total < of(max_length=4096).total - 4096**2 * LAYERS
    assert of(num_atoms=16, owner_computes=False).total > of(num_atoms=16).total + 2**30
    denser = Workload.of(run_config(ministral, density=0.05), 2)
    assert memory(denser, shape).states["gradients"] == pytest.approx(5 * free.states["gradients"], rel=0.01)


def test_processes_hold_their_own_parts(ministral: Path) -> None:
    """Shapes of a layer's trainables, and over how many processes ZeRO cuts them."""

    def shapes(world_size: int, **options: Any) -> dict[str, tuple[tuple[int, ...], int, int]]:
        config = run_config(ministral, num_experts=6, **options)
        found = layer_trainables(Workload.of(config, world_size), base_shape(config).layers[0])
        return {t.kind: (t.shape, t.ranks, t.stride) for t in found}

    m, router = 164, ((6, D), 8, 1)
    assert shapes(8) == {"deltas.free": ((D, 18, m), 8, 1), "router.weight": router}
    # Two slots for each of four processes, of which the last has none of the six experts.
    assert shapes(8, expert_parallel_size=4) == {"deltas.free": ((D, 6, m), 2, 4), "router.weight": router}
    atoms = shapes(8, num_atoms=4, expert_parallel_size=4)
    assert atoms["deltas.atoms"] == ((D // 8, 12, m), 1, 1)
    assert atoms["deltas.importance"] == ((6, 3, D // 8, m), 1, 1)
    assert atoms["deltas.mixing"] == ((6, 4), 8, 1)
    gathered = shapes(8, num_atoms=4, expert_parallel_size=4, owner_computes=False)
    assert gathered["deltas.atoms"] == ((D, 12, m), 8, 1)
    assert gathered["deltas.importance"] == ((2, 3, D, m), 2, 4)
    assert gathered["deltas.mixing"] == ((2, 4), 2, 4)


def test_owners_that_compute_send_only_effective_deltas(ministral: Path) -> None:
    def deltas(**options: Any) -> float:
        config = run_config(ministral, num_atoms=16, gradient_checkpointing=True, **options)
        kinds = ("trainables gathered", "gradients", "delta shards")
        return sum(t.received for t in step_traffic(Workload.of(config, 8), base_shape(config)) if t.kind in kinds)

    # 6 of 16 + 6 times as many values; routers and mixing travel as before.
    assert deltas() / deltas(owner_computes=False) == pytest.approx(6 / 22, rel=0.01)


def test_the_transport_that_moves_fewer_bytes(ministral: Path) -> None:
    """Few experts travel rather than thousands of tokens, many experts do not (docs/design.md)."""

    def chosen(**options: Any) -> str:
        config = run_config(ministral, expert_parallel_size=8, **options)
        return choose_transport(Workload.of(config, 8), base_shape(config).blocks)

    assert chosen(max_length=2048) == "deltas"
    assert chosen(max_length=128) == "tokens"
    assert chosen(max_length=2048, neuron_parts=4) == "tokens"  # a quarter of each token
    assert chosen(max_length=2048, num_experts=256, top_k=2) == "tokens"
    assert chosen(max_length=128, expert_transport="deltas") == "deltas"


@pytest.mark.parametrize(
    "options",
    [
        {"granularity": "neuron", "num_atoms": 0},
        {"granularity": "neuron", "num_atoms": 4},
        {"granularity": "element", "num_atoms": 4},
        {"granularity": "element", "num_atoms": 0, "use_muon": False},
        {"granularity": "neuron", "num_atoms": 0, "support_scope": "per_expert"},
        {"neuron_parts": 4},
    ],
)
def test_values_are_those_of_the_real_model(tmp_path: Path, options: dict[str, Any]) -> None:
    base = tiny_llama()
    base.config.save_pretrained(tmp_path)
    config = run_config(tmp_path, num_experts=3, density=0.05, **options)
    shape = base_shape(config)
    assert shape.parameters == sum(p.numel() for p in base.parameters())
    adapter = {key: value for key, value in options.items() if key != "use_muon"}
    real: dict[str, int] = {}
    for name, parameter in tiny_srde(base=base, **adapter).trainable_parameters():
        kind = ".".join(name.split(".")[-2:])
        real[kind] = real.get(kind, 0) + parameter.numel()
    assert trainable_values(config.adapter, shape) == real


def test_a_multimodal_base_is_measured_by_its_text_model(tmp_path: Path) -> None:
    text = MistralConfig(
        vocab_size=101,
        hidden_size=32,
        intermediate_size=96,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=77,
    )
    vision = {
        "model_type": "pixtral",
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 28,
        "patch_size": 14,
    }
    Mistral3Config(text_config=text.to_dict(), vision_config=vision).save_pretrained(tmp_path)
    assert base_shape(run_config(tmp_path, max_length=77)).blocks == ((32, 96),) * 3
    with pytest.raises(SRDEError, match="max_length=78.*--max_length 77"):
        base_shape(run_config(tmp_path, max_length=78))


def test_a_page_shows_the_config_and_both_tables(ministral: Path) -> None:
    config = run_config(ministral, muon_lr=0.125)
    page = describe_run(config, base_shape(config), world_size=2)
    assert "muon_lr: 0.125" in page
    for line in ("deltas.free", "router.weight", "all trainables", "frozen base", "gathered base", "sum"):
        assert f"\n{line} " in page
    assert f"{BASE_VALUES:,}" in page
    assert "GiB per process with 2 processes" in page


@pytest.mark.parametrize(
    ("base", "options", "fragment"),
    [
        (GPT2Config(n_layer=1, n_embd=32, n_head=2), {}, "expected one feed-forward block"),
        (BertConfig(num_hidden_layers=1, hidden_size=32, num_attention_heads=2), {}, "supported"),
        (LlamaConfig(num_hidden_layers=1), {"density": 0.5, "support_scope": "per_expert"}, "density=0.5"),
        (
            LlamaConfig(num_hidden_layers=1, intermediate_size=10**6),
            {"granularity": "element", "num_atoms": 4},
            "int32",
        ),
        (None, {}, "model_name="),
    ],
)
def test_a_base_that_cannot_serve_is_refused(tmp_path: Path, base: Any, options: dict[str, Any], fragment: str) -> None:
    if base is not None:
        base.save_pretrained(tmp_path)
    with pytest.raises(SRDEError, match=fragment) as caught:
        base_shape(run_config(tmp_path, **options))
    assert "\n" not in str(caught.value)


def test_a_missing_name_is_an_error() -> None:
    with pytest.raises(SRDEError, match="model_name is missing.*--model_name"):
        base_shape(Config())
