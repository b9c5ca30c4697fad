"""Parameters and memory of a run, from a base's configuration alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import BertConfig, GPT2Config, LlamaConfig, Mistral3Config, MistralConfig

from srde_ds.config import Config, resolve
from srde_ds.errors import SRDEError
from srde_ds.parallel.cost import base_shape, describe_run, memory_table, trainable_values
from tests.helpers import tiny_llama, tiny_srde

GIB = 2**30
D, F, LAYERS, VOCABULARY = 5120, 16384, 40, 131072  # Ministral-3-14B
MINISTRAL = {
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
    return resolve({}, {"model_name": str(base), "max_length": 64} | options)


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


def test_memory_of_the_seed_configuration_by_hand(ministral: Path) -> None:
    config = run_config(ministral, preset="reference")
    table = memory_table(config, base_shape(config), world_size=8)
    atoms, importance = 1_610_612_480, 603_979_680  # 16 and 6 times 2,516,582 times 40
    total = atoms + importance + 6 * 16 * 40 + 6 * 5120 * 40
    by_hand = {
        "base shard": 2 * 13_506_073_600 / 8,
        "gathered weights": 2 * 1e9,  # deepspeed's default of stage3_max_live_parameters
        "trainables": 6 * total / 8,
        "gradients": 4 * total / 8,
        "gradient bucket": 4 * 50_000_000,
        "optimizer state": (4 * atoms + 8 * (total - atoms)) / 8,
    }
    assert {kind: size * GIB for kind, size in table.items()} == pytest.approx(by_hand, rel=1e-9)
    assert sum(table.values()) == pytest.approx(9.0867, abs=1e-3)


def test_what_changes_memory(ministral: Path, tmp_path: Path) -> None:
    live = tmp_path / "ds.json"
    live.write_text(json.dumps({"zero_optimization": {"stage3_max_live_parameters": 10**8}}))
    shape = base_shape(run_config(ministral))

    def table(world_size: int = 2, **options: Any) -> dict[str, float]:
        return memory_table(run_config(ministral, **options), shape, world_size)

    free = table()
    values = sum(trainable_values(run_config(ministral).adapter, shape).values())
    assert table(bf16=False)["base shard"] == 2 * free["base shard"]
    assert table(bf16=False)["trainables"] * GIB == 4 * values / 2
    assert table(use_muon=False)["optimizer state"] * GIB == 8 * values / 2
    assert table(use_muon=False)["optimizer state"] > 1.9 * free["optimizer state"]
    assert table(deepspeed_config=str(live))["gathered weights"] * GIB == 2 * 10**8
    assert table(world_size=1)["gathered weights"] == 0
    assert table(world_size=4)["gradients"] == free["gradients"] / 2


@pytest.mark.parametrize(
    "options",
    [
        {"granularity": "neuron", "num_atoms": 0},
        {"granularity": "neuron", "num_atoms": 4},
        {"granularity": "element", "num_atoms": 4},
        {"granularity": "element", "num_atoms": 0, "use_muon": False},
        {"granularity": "neuron", "num_atoms": 0, "support_scope": "per_expert"},
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
    page = describe_run(run_config(ministral, muon_lr=0.125), world_size=2)
    assert "muon_lr: 0.125" in page
    for line in ("deltas.free", "router.weight", "all trainables", "frozen base", "gathered weights", "sum"):
        assert f"\n{line} " in page
    assert f"{BASE_VALUES:,}" in page
    assert "GiB a process with 2 processes" in page


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
