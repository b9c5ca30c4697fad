"""A base is measured once, however many parts of a command need its shape."""

from __future__ import annotations

from pathlib import Path

import pytest

from srde_ds.cli.main import main
from srde_ds.config import resolve
from srde_ds.errors import SRDEError
from srde_ds.model.base_shape import base_shape, measure
from tests.helpers import counted_measurements, tiny_llama

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


def test_a_base_is_checked_for_each_run(tmp_path: Path) -> None:
    tiny_llama().config.save_pretrained(tmp_path)
    options = {"model_name": str(tmp_path), "density": 0.05}
    with counted_measurements() as built:
        assert base_shape(resolve({}, options | {"max_length": 128})).context == 128
        with pytest.raises(SRDEError, match="max_length=129: the base knows 128 positions"):
            base_shape(resolve({}, options | {"max_length": 129}))
    assert len(built) == 1
