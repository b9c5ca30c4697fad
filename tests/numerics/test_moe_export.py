"""The stock mixture of experts gives the logits and tokens that the experts give, in plain transformers."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, PreTrainedModel

from srde_ds.errors import SRDEError
from srde_ds.export.moe import write_moe
from srde_ds.export.moe_config import WIDTH_MULTIPLE
from srde_ds.model.adapter import SRDEModel
from srde_ds.model.adapter_source import open_adapter, select_experts
from srde_ds.model.base_files import BaseFiles
from srde_ds.weights.file import save_weights
from tests.convert_helpers import BASES, Trained, reload, save_base, smollm2, trained
from tests.helpers import SIZES, tokens

# Both models round in float32 alone, in another order: some units in the last place of the largest logit.
ROUNDING = 2e-6


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bases")
    for name in ("llama", "mistral"):
        save_base(name, folder / name)
    return folder


def export(made: Trained, folder: Path, **options: Any) -> PreTrainedModel:
    path = write_moe(open_adapter(made.weights), BaseFiles(made.base), folder, **({"dtype": None} | options))
    return AutoModelForCausalLM.from_pretrained(path).eval()


@torch.no_grad()
def assert_equal_logits(model: SRDEModel, stock: PreTrainedModel, ids: torch.Tensor, *, unit: float = ROUNDING) -> None:
    ours, theirs = model(ids).logits, stock(ids).logits
    torch.testing.assert_close(theirs, ours, rtol=0, atol=unit * float(ours.abs().max()))
    with model.no_experts():
        assert (model(ids).logits - ours).abs().max() > 100 * unit * ours.abs().max()  # the experts count


@torch.no_grad()
def assert_equal_tokens(model: SRDEModel, stock: PreTrainedModel, ids: torch.Tensor, new: int = 12) -> None:
    options: dict[str, Any] = {"max_new_tokens": new, "min_new_tokens": new, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(cast("Any", stock).generate(ids, **options), model.generate(ids, **options))


@pytest.mark.parametrize("name", BASES)
def test_every_base_that_fits_keeps_its_logits(name: str, tmp_path: Path) -> None:
    made = trained(save_base(name, tmp_path / "base"), tmp_path, support_scope="per_expert", num_atoms=2)
    stock = export(made, tmp_path / "moe")
    assert type(stock).__name__ == "GraniteMoeSharedForCausalLM"
    ids = tokens(2, 24, vocabulary=100)
    ids[ids == 10] = 11  # 10 stands for an image in mistral3
    assert_equal_logits(made.model, stock, ids)
    if name != "mistral3":
        assert_equal_tokens(made.model, stock, tokens(2, 8))


@pytest.mark.parametrize("scope", ["shared", "per_expert"])
@pytest.mark.parametrize(
    "atoms", [{"num_atoms": 0}, {"num_atoms": 3, "atom_mixing": "softmax"}, {"num_atoms": 3, "neuron_parts": 4}]
)
@pytest.mark.parametrize("top_k", [1, 3])
def test_every_form_of_neuron_experts(
    bases: Path, scope: str, atoms: dict[str, Any], top_k: int, tmp_path: Path
) -> None:
    made = trained(bases / "llama", tmp_path, support_scope=scope, top_k=top_k, **atoms)
    assert_equal_logits(made.model, export(made, tmp_path / "moe"), tokens())


def test_supports_that_overlap_and_differ_in_size_by_layer(bases: Path, tmp_path: Path) -> None:
    made = trained(bases / "llama", tmp_path, support_scope="per_expert", density=0.2, support_strategy="random")
    unions = [layer.support.unique().numel() for layer in made.model.layers]
    assert 19 < min(unions) < max(unions) < 3 * 19  # of 96 neurons, 19 an expert
    assert_equal_logits(made.model, export(made, tmp_path / "moe"), tokens())


def test_widths_and_zeros(bases: Path, tmp_path: Path) -> None:
    made = trained(bases / "llama", tmp_path)
    stock = export(made, tmp_path / "moe")
    assert stock.config.intermediate_size == WIDTH_MULTIPLE
    for layer, ours in zip(stock.model.layers, made.model.layers, strict=True):
        empty = (layer.shared_mlp.output_linear.weight == 0).all(0).nonzero().squeeze(1)
        assert empty.tolist() == ours.support.tolist()
        assert (layer.block_sparse_moe.experts.down_proj[:, :, 5:] == 0).all()
        assert (layer.block_sparse_moe.experts.gate_up_proj.unflatten(1, (2, -1))[:, :, 5:] == 0).all()


def test_heads_are_added_until_they_have_the_usual_width(tmp_path: Path) -> None:
    """Ministral-3-14B: 32 heads of 128 in 5120 dimensions, which are 40 heads of 128."""
    expected: dict[str, tuple[int, int, int | None]] = {
        "llama with narrow heads": (6, 3, None),
        "ministral3": (8, 4, None),
        "llama": (4, 2, None),
    }
    expected["llama with biases and wide heads"] = (4, 2, 16)
    for name, (queries, keys, width) in expected.items():
        made = trained(save_base(name, tmp_path / name / "base"), tmp_path / name)
        config = export(made, tmp_path / name / "moe").config
        found = (config.num_attention_heads, config.num_key_value_heads, getattr(config, "head_dim", None))
        assert found == (queries, keys, width), name


def test_what_other_software_leaves_out_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for name, message in {
        "qwen2": "vLLM's own code for GraniteMoeShared leaves out the attention's biases",
        "mistral": "",
    }.items():
        caplog.clear()
        made = trained(save_base(name, tmp_path / name / "base"), tmp_path / name)
        export(made, tmp_path / name / "moe")
        assert message in caplog.text and bool(message) == ("vLLM" in caplog.text)


def test_only_some_experts(bases: Path, tmp_path: Path) -> None:
    made = trained(bases / "llama", tmp_path)
    adapter = select_experts(open_adapter(made.weights), ["blue", "red"])
    stock = AutoModelForCausalLM.from_pretrained(write_moe(adapter, BaseFiles(made.base), tmp_path / "moe", dtype=None))
    assert (stock.config.num_local_experts, stock.config.num_experts_per_tok) == (2, 2)
    model = reload(made)
    model.set_active_experts(["red", "blue"])
    assert_equal_logits(model, stock, tokens())


def test_beyond_the_equal_context_it_says_so(tmp_path: Path) -> None:
    contexts = {"ministral3": 32, "mistral": 64}
    for name, expected in contexts.items():
        made = trained(save_base(name, tmp_path / name / "base"), tmp_path / name)
        stock = export(made, tmp_path / name / "moe")
        assert stock.config.max_position_embeddings == expected
        assert_equal_logits(made.model, stock, tokens(1, expected))
        with torch.no_grad(), pytest.raises(AssertionError):
            assert_equal_logits(made.model, stock, tokens(1, expected + 40))


def test_files_are_cut_and_named_as_the_bases(tmp_path: Path) -> None:
    base = save_base("llama with biases and wide heads", tmp_path / "base", max_shard_size="40KB")
    made = trained(base, tmp_path)
    (base / "tokenizer.json").write_text("{}")
    (base / "LICENSE").write_text("free")
    stock = export(made, tmp_path / "moe")
    names = {path.name for path in (tmp_path / "moe").iterdir()}
    shards = {path.name for path in base.glob("*.safetensors")}
    assert len(shards) > 3 and {path.name for path in (tmp_path / "moe").glob("*.safetensors")} <= shards
    assert names >= {
        "config.json",
        "generation_config.json",
        "tokenizer.json",
        "LICENSE",
        "model.safetensors.index.json",
    }
    assert_equal_logits(made.model, stock, tokens())
    index = json.loads((tmp_path / "moe/model.safetensors.index.json").read_text())
    for name, file in index["weight_map"].items():
        with safe_open(tmp_path / "moe" / file, "pt") as opened:
            assert name in opened.keys()  # noqa: SIM118 (not a dict)


def test_the_dtype_is_that_of_the_base_or_as_asked(tmp_path: Path) -> None:
    made = trained(save_base("llama", tmp_path / "base", dtype=torch.bfloat16), tmp_path)
    narrow = export(made, tmp_path / "narrow")
    assert {p.dtype for p in narrow.parameters()} == {torch.bfloat16} and narrow.config.dtype == torch.bfloat16
    wide = export(made, tmp_path / "wide", dtype=torch.float32)
    assert {p.dtype for p in wide.parameters()} == {torch.float32}
    assert_equal_logits(made.model, wide, tokens())


def test_smollm2(tmp_path: Path) -> None:
    made = trained(smollm2(tmp_path / "base"), tmp_path, density=0.01, support_scope="per_expert", scale=0.05)
    stock = export(made, tmp_path / "moe", dtype=torch.float32)
    ids = tokens(1, 32, vocabulary=49152)
    assert_equal_logits(made.model, stock, ids, unit=10 * ROUNDING)  # thirty layers
    assert_equal_tokens(made.model, stock, ids, new=16)


def biased(made: Trained, folder: Path) -> Path:
    made.model.layers[1].router.load_selection_bias(torch.tensor([0.0, 3.0, -1.0]))
    save_weights(folder / "biased.safetensors", made.model.adapter_tensors(), made.model.metadata())
    return folder / "biased.safetensors"


def test_a_selection_bias_is_refused_where_it_would_choose_other_experts(bases: Path, tmp_path: Path) -> None:
    made = trained(bases / "llama", tmp_path)
    files = BaseFiles(made.base)
    with pytest.raises(
        SRDEError, match=r"routers of 1 layers \(the first is 1\).*selection bias.*balancing_bias_rate=0"
    ):
        write_moe(open_adapter(biased(made, tmp_path)), files, tmp_path / "moe", dtype=None)
    everyone = trained(bases / "llama", tmp_path, top_k=3)
    everyone = everyone._replace(weights=biased(everyone, tmp_path))
    assert_equal_logits(everyone.model, export(everyone, tmp_path / "moe"), tokens())


@pytest.mark.parametrize(
    ("base", "adapter", "message"),
    [
        ("llama", {"granularity": "element"}, "granularity=element changes single weights.*--to dense"),
        ("llama", {"granularity": "block"}, "granularity=block changes blocks of 16 x 16 weights.*--to dense"),
        ("qwen3", {}, r"layers have self_attn\.k_norm\.weight, self_attn\.q_norm\.weight, which it lacks"),
        ("gemma", {}, "of type 'gemma'; only these types are known to compute the same: llama"),
        ("llama with biases in its blocks", {}, r"layers have mlp\.down_proj\.bias, mlp\.gate_proj\.bias"),
    ],
)
def test_what_it_cannot_express_is_refused_before_anything_is_written(
    base: str, adapter: dict[str, Any], message: str, tmp_path: Path
) -> None:
    made = trained(save_base(base, tmp_path / "base"), tmp_path, **adapter)
    with pytest.raises(SRDEError, match=message) as error:
        write_moe(open_adapter(made.weights), BaseFiles(made.base), tmp_path / "moe", dtype=None)
    assert "\n" not in str(error.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "srde_weights.safetensors"]


def test_rotary_embeddings_that_depend_on_a_length_it_would_lower(tmp_path: Path) -> None:
    import transformers as t

    rope: dict[str, Any] = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}
    torch.manual_seed(0)
    base = t.MistralForCausalLM(t.MistralConfig(**SIZES, sliding_window=64, rope_parameters=rope))
    base.save_pretrained(tmp_path / "base")
    made = trained(tmp_path / "base", tmp_path)
    with pytest.raises(SRDEError, match="for 64 positions only, and rotary embeddings of type dynamic"):
        export(made, tmp_path / "moe")


WITHOUT_DEEPSPEED = """
import sys, torch
sys.modules["deepspeed"] = None
from srde_ds.cli.main import main
assert not torch.cuda.is_available()
sys.exit(main(sys.argv[1:]))
"""


def test_the_verb_needs_neither_gpu_nor_deepspeed(bases: Path, tmp_path: Path) -> None:
    made = trained(bases / "llama", tmp_path)
    command = ["convert", "--checkpoint", str(made.weights), "--to", "moe", "--output", str(tmp_path / "moe")]
    result = subprocess.run(
        [sys.executable, "-c", WITHOUT_DEEPSPEED, *command],
        env=os.environ | {"CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": "."},
        capture_output=True,
        text=True,
    )
    assert (result.returncode, result.stdout) == (0, f"{tmp_path / 'moe'}\n"), result.stderr
    assert_equal_logits(made.model, AutoModelForCausalLM.from_pretrained(tmp_path / "moe"), tokens())
