"""A base is measured once, however many parts of a command need its shape."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, BitNetConfig, LlamaConfig, SeedOssConfig
from transformers.models.bitnet.modeling_bitnet import BitNetMLP
from transformers.models.llama.modeling_llama import LlamaMLP
from transformers.models.seed_oss.modeling_seed_oss import SeedOssMLP

from srde_ds.cli.main import main
from srde_ds.config import resolve
from srde_ds.distributed.workload import Workload
from srde_ds.errors import SRDEError
from srde_ds.model.base_shape import base_shape, measure
from srde_ds.model.feed_forward import verify_block
from srde_ds.model.tiny_block import tiny_copy
from srde_ds.planner.flops import step_flops
from tests.cli_helpers import fails, flags
from tests.helpers import counted_measurements, gemma4, tiny_llama
from tests.hybrids import HYBRIDS, falcon_h1

BOTH_AUTO = ["--recompute", "auto", "--base_placement", "auto"]


@pytest.mark.parametrize("verb", [["plan", "--gpus", "2"], ["train", "--dry_run"]])
def test_a_command_measures_the_base_once(verb: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tiny_llama().config.save_pretrained(tmp_path)
    with counted_measurements() as built:
        assert main([*verb, "--model_name", str(tmp_path), "--max_length", "64", *BOTH_AUTO]) == 0
    assert built == [str(tmp_path)]
    assert "recompute=auto: none" in capsys.readouterr().out


def test_another_base_in_the_same_folder_is_measured_anew(tmp_path: Path) -> None:
    config = resolve({}, {"model_name": str(tmp_path), "max_length": 64, "density": 0.05})
    with counted_measurements() as built:
        for intermediate in (96, 96, 80):
            tiny_llama(intermediate_size=intermediate).config.save_pretrained(tmp_path)
            assert base_shape(config).blocks == measure(config.model).blocks == ((32, intermediate),) * 2
    assert len(built) == 2


@pytest.mark.parametrize("name", sorted({*HYBRIDS} - {"lfm2"}))  # whose block is not supported
def test_every_linear_map_of_a_hybrid_counts_and_only_attention_has_scores(name: str, tmp_path: Path) -> None:
    HYBRIDS[name]().save_pretrained(tmp_path)
    config = resolve({}, {"model_name": str(tmp_path), "max_length": 64, "density": 0.1, "packing": False})
    shape = measure(config.model)
    assert [layer.scores for layer in shape.layers] == [name == "falcon_h1", True]
    linear = sum(out * inside for out, inside in shape.linear)
    counted = sum(3 * layer.matrix + sum(n for module in layer.attention for n in module) for layer in shape.layers)
    assert linear <= counted < 1.1 * linear  # with biases, norms and convolutions beside them
    work = Workload.of(config, 1)
    flops, both = step_flops(work, shape), replace(shape, layers=(replace(shape.layers[1]),) * 2)
    assert flops["frozen base"] >= 2 * work.tokens * work.micro_steps * 2 * linear
    halves = 1 if name == "falcon_h1" else 2
    assert step_flops(work, both)["attention scores"] == halves * flops["attention scores"]


def test_a_base_is_checked_for_each_run(tmp_path: Path) -> None:
    tiny_llama().config.save_pretrained(tmp_path)
    options = {"model_name": str(tmp_path), "density": 0.05}
    with counted_measurements() as built:
        assert base_shape(resolve({}, options | {"max_length": 128})).context == 128
        with pytest.raises(SRDEError, match="max_length=129: the base knows 128 positions"):
            base_shape(resolve({}, options | {"max_length": 129}))
    assert len(built) == 1


@pytest.mark.parametrize("verb", [["plan"], ["train", "--dry_run"]])
def test_a_block_that_computes_something_else_is_refused_without_its_weights(
    verb: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    falcon_h1(mlp_multipliers=[0.5, 2.0]).save_pretrained(tmp_path)
    fragments = "layer 0, feed_forward: FalconH1MLP", "Linear 32 -> 48", "does not compute down(act(gate(x)) * up(x))"
    fails(capsys, [*verb, "--model_name", str(tmp_path), "--max_length", "64"], *fragments)


@pytest.mark.parametrize("sizes", [(32, 96), (32, 32)])
def test_a_tiny_copy_computes_what_its_block_computes(sizes: tuple[int, int]) -> None:
    with torch.device("meta"):
        block = BitNetMLP(BitNetConfig(hidden_size=sizes[0], intermediate_size=sizes[1]))  # norms what down gets
        plain = LlamaMLP(LlamaConfig(hidden_size=sizes[0], intermediate_size=sizes[1], mlp_bias=True))
        dropping = SeedOssMLP(SeedOssConfig(hidden_size=sizes[0], intermediate_size=sizes[1], residual_dropout=0.5))
    copied: Any = tiny_copy(block, *sizes)
    values = torch.randn(2, 8)
    inner = copied.ffn_sub_norm(copied.act_fn(copied.gate_proj(values)) * copied.up_proj(values))
    assert torch.equal(copied(values), copied.down_proj(inner))
    with pytest.raises(SRDEError, match="does not compute"):
        verify_block(copied, 8, dtype=torch.float32)
    assert {p.shape for p in copied.parameters()} <= {(8, 16), (16, 8), (16,), (8, 8), (8,)}
    for gated in (plain, dropping):
        assert verify_block(tiny_copy(gated, *sizes), 8, dtype=torch.float32) == {
            "gate": "gate_proj", "up": "up_proj", "down": "down_proj", "act": "act_fn",
        }  # fmt: skip
    assert all(p.is_meta for p in block.parameters())


def test_a_base_whose_layers_differ_in_their_heads(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    configuration = gemma4()
    configuration.save_pretrained(tmp_path)
    options = {"model_name": str(tmp_path), "max_length": 64, "density": 0.1}
    shape = base_shape(resolve({}, options))
    assert [(layer.heads, layer.query, layer.key_value) for layer in shape.layers] == [(4, 32, 16), (4, 64, 32)]
    model = AutoModelForCausalLM.from_config(configuration)
    assert shape.parameters == sum(parameter.numel() for parameter in model.parameters())
    for verb in (["plan"], ["train", "--dry_run"]):
        assert main([*verb, *flags(options)]) == 0
    capsys.readouterr()
