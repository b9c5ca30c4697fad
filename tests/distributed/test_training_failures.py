"""A run that cannot go on stops on every rank with the step, or with what is at fault."""

from __future__ import annotations

import dataclasses
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor

from srde_ds.checkpoint.resume import verify_checkpoint
from srde_ds.model.output import SRDEOutput
from tests.distributed.harness import Ranks
from tests.distributed.training_helpers import Inputs, at_training_forward, latest, metrics, train_here, without_clocks


def nan_loss(output: SRDEOutput) -> SRDEOutput:
    assert output.loss_sum is not None
    return dataclasses.replace(output, loss_sum=output.loss_sum * float("nan"))


def infinite_gradient(output: SRDEOutput) -> SRDEOutput:
    assert output.loss_sum is not None
    output.loss_sum.register_hook(lambda gradient: gradient * float("inf"))
    return output


def train_poisoned(flags: dict[str, Any], poison: Callable[[SRDEOutput], SRDEOutput]) -> str | None:
    """`train_here`, poisoned on rank 1 in its second micro-step of step 3."""
    with at_training_forward(6, 1, poison):
        return train_here(flags)


@pytest.mark.parametrize("poison", [nan_loss, infinite_gradient])
def test_nan_on_one_rank_stops_all_and_keeps_the_last_good_checkpoint(
    inputs: Inputs, two_ranks: Ranks, tmp_path: Path, poison: Callable[[SRDEOutput], SRDEOutput]
) -> None:
    run = tmp_path / "run"
    errors = two_ranks(train_poisoned, inputs.flags(run, save_steps=1, eval_steps=0), poison)
    assert errors[0] == errors[1]
    assert errors[0].startswith("step 3: the loss is") and f"Continue from {run / 'checkpoint-2'}" in errors[0]
    assert latest(run) == "checkpoint-2" and verify_checkpoint(run / "checkpoint-2")["step"] == 2
    assert [line["step"] for line in metrics(run)] == [1, 2]
    assert not (run / "completed.json").exists()


def test_an_update_that_breaks_the_model_is_not_saved(inputs: Inputs, two_ranks: Ranks, tmp_path: Path) -> None:
    run = tmp_path / "run"
    flags = inputs.flags(run, save_steps=1, eval_steps=0, muon_lr=1e30, warmup_steps=0)
    errors = two_ranks(train_here, flags)
    assert errors[0] == errors[1]
    assert errors[0].startswith("step 1: ") and "start anew" in errors[0]
    assert not (run / "latest").exists() and not list(run.glob("checkpoint-*"))


def train_while_the_clock_jumps(flags: dict[str, Any]) -> str | None:
    """`train_here`; at step 3 the clock goes back by a day on rank 0, and forward by a day on rank 1."""
    clock, day = time.time, 86_400 if os.environ["RANK"] == "1" else -86_400

    def jump(output: SRDEOutput) -> SRDEOutput:
        time.time = lambda: clock() + day
        return output

    try:
        with at_training_forward(5, int(os.environ["RANK"]), jump):
            return train_here(flags)
    finally:
        time.time = clock


def test_a_clock_that_jumps_changes_nothing(inputs: Inputs, two_ranks: Ranks, reference: Path, tmp_path: Path) -> None:
    """Neither which checkpoint is the newest, nor which of them stay, nor a byte of the result."""
    run = tmp_path / "run"
    assert two_ranks(train_while_the_clock_jumps, inputs.flags(run, save_steps=1)) == [None, None]
    assert latest(run) == "checkpoint-6" and verify_checkpoint(run / "checkpoint-6")["step"] == 6
    assert sorted(path.name for path in run.glob("checkpoint-*")) == ["checkpoint-5", "checkpoint-6"]
    assert (run / "srde_weights.safetensors").read_bytes() == (reference / "srde_weights.safetensors").read_bytes()
    assert without_clocks(metrics(run)) == without_clocks(metrics(reference))


def train_with_a_cut_expert(flags: dict[str, Any]) -> str | None:
    """`train_here`, but no gradient reaches the delta of expert 1, and that counts after few tokens."""
    from srde_ds.model.dispatch import LocalDispatch
    from srde_ds.training.reporting import step_metrics

    original: Any = LocalDispatch.neuron

    def neuron(self: LocalDispatch, *args: Any) -> tuple[Tensor, Tensor]:
        first, cut, last = args[-1].split(1, dim=1)
        return original(self, *args[:-1], torch.cat([first, cut.detach(), last], dim=1))

    with patch.object(LocalDispatch, "neuron", neuron), patch.object(step_metrics, "SILENT_ASSIGNMENTS", 1500):
        return train_here(flags)


def test_an_expert_without_gradient_is_named(inputs: Inputs, two_ranks: Ranks, tmp_path: Path) -> None:
    errors = two_ranks(train_with_a_cut_expert, inputs.flags(tmp_path / "run", eval_steps=0))
    assert errors[0] == errors[1]
    # About a thousand assignments a step over both layers.
    assert errors[0].startswith("step 2: expert 'green' got ") and "its gradient is zero" in errors[0]
