"""A base is measured once, however many parts of a command need its shape."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from srde_ds.cli.main import main
from srde_ds.config import resolve
from srde_ds.distributed.workload import Workload
from srde_ds.errors import SRDEError
from srde_ds.model.base_shape import base_shape, measure
from srde_ds.planner.flops import step_flops
from tests.helpers import counted_measurements, tiny_llama
from tests.hybrids import HYBRIDS

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
