"""Weights, a checkpoint and a dataset of an earlier version; tests/fixtures/before_rooms/README.md says which."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from srde_ds.checkpoint.resume import verify_checkpoint
from srde_ds.cli.main import main
from srde_ds.export.weights import export_weights
from srde_ds.model.adapter import load_adapter
from tests.distributed.harness import run_forked
from tests.distributed.training_helpers import assert_close

ROOT = Path(__file__).parents[2]
FILES = ROOT / "tests/fixtures/before_rooms"


@pytest.mark.parametrize("name", ["neuron", "element_atoms"])
def test_weights_give_the_logits_that_they_gave(name: str) -> None:
    expected = load_file(FILES / "expected.safetensors")
    model = load_adapter(FILES / f"{name}.safetensors", base=str(FILES / "base"))
    with torch.no_grad():
        torch.testing.assert_close(model(expected["ids"]).logits, expected[name], rtol=1e-5, atol=1e-5)
        with model.no_experts():
            assert not torch.allclose(model(expected["ids"]).logits, expected[name], atol=1e-2)


def test_a_checkpoint_is_verified_and_exported(tmp_path: Path) -> None:
    assert verify_checkpoint(FILES / "run/checkpoint-3")["step"] == 3
    found, expected = (load_file(path) for path in (weights_of_step_3(tmp_path), FILES / "neuron.safetensors"))
    assert {name: tensor.shape for name, tensor in found.items()} == {n: t.shape for n, t in expected.items()}
    assert not torch.equal(found["layers.0.deltas.free"], expected["layers.0.deltas.free"])


def weights_of_step_3(folder: Path) -> Path:
    return export_weights(FILES / "run/checkpoint-3", folder / "weights.safetensors")


def resume_in(folder: Path, *more: str) -> int:
    os.chdir(folder)
    return main(["train", "--config", "run/config.yaml", "--resume_from", "latest", *more])


def test_a_new_option_without_effect_on_finished_rows_is_refused(tmp_path: Path) -> None:
    shutil.copytree(FILES, tmp_path, dirs_exist_ok=True)  # the run's own too_long is not that of its rows
    assert run_forked(tmp_path / "log", resume_in, tmp_path, "--train_on", "last") == 2
    assert "train_on=last with pretokenized_dir=" in (tmp_path / "log").read_text()


def test_a_run_goes_on_to_the_weights_that_it_had_given(tmp_path: Path) -> None:
    shutil.copytree(FILES, tmp_path, dirs_exist_ok=True)
    assert run_forked(tmp_path / "log", resume_in, tmp_path) == 0, (tmp_path / "log").read_text()
    found, expected = (load_file(tmp_path / path) for path in ("run/srde_weights.safetensors", "neuron.safetensors"))
    further = {f"layers.{layer}.domain_{part}" for layer in range(2) for part in ("mean", "spread", "factors")}
    assert found.keys() == expected.keys() | further
    for name, tensor in expected.items():
        assert_close(found[name], tensor, 1e-4, name)
