"""Signals, and going on from checkpoints: bit for bit, at another number of processes, or not at all."""

from __future__ import annotations

import shutil
from pathlib import Path
from signal import SIGTERM, SIGUSR1
from typing import Any

import pytest

from tests.distributed.harness import Ranks
from tests.distributed.training_helpers import (
    Inputs,
    assert_same_training,
    latest,
    listing,
    metrics,
    train_here,
    train_until_signal,
    without_clocks,
)


def test_stopped_twice_by_a_signal_to_one_rank_equals_an_uninterrupted_run(
    inputs: Inputs, two_ranks: Ranks, reference: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    flags = inputs.flags(run, save_steps=0)
    # Four forwards a step: the signals arrive within steps 2 and 4, and no rank starts another micro-step.
    stopped = two_ranks(train_until_signal, flags, 6, 1, SIGUSR1)
    assert stopped == [(None, 6), (None, 6)]
    assert latest(run) == "checkpoint-1" and [line["step"] for line in metrics(run)] == [1]
    flags["resume_from"] = "latest"
    stopped = two_ranks(train_until_signal, flags, 11, 0, SIGTERM)
    assert stopped == [(None, 11), (None, 11)]
    assert latest(run) == "checkpoint-3" and [line["step"] for line in metrics(run)] == [1, 2, 3]
    assert not (run / "completed.json").exists() and not (run / "srde_weights.safetensors").exists()
    assert two_ranks(train_here, flags) == [None, None]
    assert (run / "completed.json").exists()
    assert without_clocks(metrics(run)) == without_clocks(metrics(reference))
    assert (run / "srde_weights.safetensors").read_bytes() == (reference / "srde_weights.safetensors").read_bytes()


@pytest.mark.parametrize("world_size", [1, 4])
def test_two_ranks_checkpoint_continues_on_another_number(
    inputs: Inputs, world_size: int, one_rank: Ranks, four_ranks: Ranks, reference: Path, tmp_path: Path
) -> None:
    ranks = {1: one_rank, 4: four_ranks}[world_size]
    run = tmp_path / "run"
    flags = inputs.flags(run, resume_from=str(reference / "checkpoint-3"), gradient_accumulation_steps=8 // world_size)
    assert ranks(train_here, flags) == [None] * world_size
    # The reason of the tolerance: test_training_equivalence.
    assert_same_training(run, reference, first_step=4, tolerance=1e-4)
    assert [line["step"] for line in metrics(run)] == [4, 5, 6]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"top_k": 1}, "top_k was 2, this run has 1"),
        ({"density": 0.1}, "density was 0.05, this run has 0.1"),
        ({"seed": 43}, "seed was 42, this run has 43"),
        ({"domains": ["red", "blue", "green"]}, "domains=red,blue,green: the dataset was built with red,green,blue"),
        ({"pretokenized_dir": "the other"}, "trained on another dataset"),
        ({"batch_size": 3}, "a step had 8 rows, here batch_size x processes x gradient_accumulation_steps = 12"),
    ],
)
def test_a_resume_that_is_not_the_same_run_is_refused(
    inputs: Inputs, one_rank: Ranks, reference: Path, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    if "pretokenized_dir" in changes:
        changes = {"pretokenized_dir": inputs.other_dataset}
    run = tmp_path / "run"
    shutil.copytree(reference, run)
    before = listing(run)
    [error] = one_rank(train_here, inputs.flags(run, resume_from="latest", **({"batch_size": 2} | changes)))
    assert error is not None and message in error and "\n" not in error and len(error) < 300
    assert listing(run) == before


def test_a_finished_run_goes_on_in_another_folder(
    inputs: Inputs, one_rank: Ranks, reference: Path, tmp_path: Path
) -> None:
    """There is nothing left to do, but the folder is complete."""
    run = tmp_path / "run"
    assert one_rank(train_here, inputs.flags(run, resume_from=str(reference), batch_size=2)) == [None]
    assert latest(run) == "checkpoint-6" and (run / "completed.json").exists()
    assert (run / "srde_weights.safetensors").read_bytes() == (reference / "srde_weights.safetensors").read_bytes()


def test_bf16_learns_and_resumes_bit_for_bit(inputs: Inputs, two_ranks: Ranks, tmp_path: Path) -> None:
    flags = inputs.flags(
        tmp_path / "whole",
        bf16=True,
        max_steps=12,
        save_steps=9,
        muon_lr=0.1,
        eval_steps=0,
        gradient_accumulation_steps=1,
        batch_size=4,
    )
    assert two_ranks(train_here, flags) == [None, None]
    losses = [line["loss"] for line in metrics(tmp_path / "whole")]
    assert sum(losses[-3:]) < 0.9 * sum(losses[:3])
    flags |= {"output_dir": str(tmp_path / "resumed"), "resume_from": str(tmp_path / "whole/checkpoint-9")}
    assert two_ranks(train_here, flags) == [None, None]
    assert_same_training(tmp_path / "resumed", tmp_path / "whole", first_step=10, tolerance=0)
