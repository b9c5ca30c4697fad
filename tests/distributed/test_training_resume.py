"""Signals, and going on from checkpoints: bit for bit, at another number of processes, or not at all."""

from __future__ import annotations

import os
import shutil
import threading
from pathlib import Path
from signal import SIGTERM, SIGUSR1
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor

from srde_ds.checkpoint import save
from srde_ds.checkpoint.resume import load_run_state, verify_checkpoint
from srde_ds.checkpoint.shards import ShardIndex, write_shard
from srde_ds.data import loader
from srde_ds.data.loader import RowStream
from srde_ds.errors import SRDEError
from srde_ds.model.output import SRDEOutput
from srde_ds.training import trainer
from srde_ds.training.checkpointing import RunState
from srde_ds.training.observers import Domains, HeldOutLosses
from srde_ds.training.run import Observer, Run
from tests.distributed.harness import Ranks
from tests.distributed.test_training_equivalence import TOLERANCE
from tests.distributed.training_helpers import (
    ROWS_PER_STEP,
    Inputs,
    assert_close,
    assert_same_training,
    at_training_forward,
    cut,
    latest,
    listing,
    metrics,
    train_here,
    train_until_signal,
    without_clocks,
)

MOVES = [(1, 1), (2, 2), (3, 1), (6, 3)]  # processes and expert_parallel_size after (4, 2)


def test_stopped_twice_by_a_signal_to_one_rank_equals_an_uninterrupted_run(
    inputs: Inputs, two_ranks: Ranks, reference: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    flags = inputs.flags(run, save_steps=0)
    # Two forwards a step. A signal is told before the next forward and known before the one after it: the first run
    # stops within step 2, the second finishes step 4.
    stopped = two_ranks(train_until_signal, flags, 2, 1, SIGUSR1)
    assert stopped == [(None, 3), (None, 3)]
    assert latest(run) == "checkpoint-1" and [line["step"] for line in metrics(run)] == [1]
    flags["resume_from"] = "latest"
    stopped = two_ranks(train_until_signal, flags, 5, 0, SIGTERM)
    assert stopped == [(None, 6), (None, 6)]
    assert latest(run) == "checkpoint-4" and [line["step"] for line in metrics(run)] == [1, 2, 3, 4]
    assert not (run / "completed.json").exists() and not (run / "srde_weights.safetensors").exists()
    assert two_ranks(train_here, flags) == [None, None]
    assert (run / "completed.json").exists()
    assert without_clocks(metrics(run)) == without_clocks(metrics(reference))
    assert (run / "srde_weights.safetensors").read_bytes() == (reference / "srde_weights.safetensors").read_bytes()


def train_disturbed(flags: dict[str, Any], observer: type[Observer], step: int, error: str | None) -> str | None:
    """`train_here`, with an error, or a signal to rank 0, when an observer sees this step."""
    original = observer.after_step

    def after_step(self: Observer, run: Run) -> None:
        if run.step == step and error:
            raise SRDEError(error)
        if run.step == step and run.topology.is_main:
            os.kill(os.getpid(), SIGUSR1)
        original(self, run)

    with patch.object(observer, "after_step", after_step):
        return train_here(flags)


@pytest.mark.parametrize(
    ("observer", "step", "error"),
    [(HeldOutLosses, 3, None), (HeldOutLosses, 6, None), (Domains, 6, None), (Domains, 6, "out of memory")],
)
def test_what_is_measured_after_a_step_is_measured_when_the_run_goes_on(
    inputs: Inputs,
    two_ranks: Ranks,
    reference: Path,
    tmp_path: Path,
    observer: type[Observer],
    step: int,
    error: str | None,
) -> None:
    run = tmp_path / "run"
    flags = inputs.flags(run)
    assert two_ranks(train_disturbed, flags, observer, step, error) == [error, error]
    assert latest(run) == f"checkpoint-{step}" and not (run / "completed.json").exists()  # the step is safe
    assert [line["step"] for line in metrics(run)] == list(range(1, step))
    flags["resume_from"] = "latest"
    assert two_ranks(train_disturbed, flags, observer, step, error) == [error, error]  # and again
    assert two_ranks(train_here, flags) == [None, None]
    assert (run / "completed.json").exists()
    assert without_clocks(metrics(run)) == without_clocks(metrics(reference))
    assert (run / "srde_weights.safetensors").read_bytes() == (reference / "srde_weights.safetensors").read_bytes()


def test_saving_in_the_background_changes_no_byte(
    inputs: Inputs, two_ranks: Ranks, reference: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    assert two_ranks(train_here, inputs.flags(run, save_in_background=False)) == [None, None]
    for step in (3, 6):
        folder, expected = run / f"checkpoint-{step}", reference / f"checkpoint-{step}"
        assert sorted(path.name for path in folder.iterdir()) == sorted(path.name for path in expected.iterdir())
        for path in expected.iterdir():
            if path.name not in ("manifest.json", "run.json"):  # hold the time and the config
                assert (folder / path.name).read_bytes() == path.read_bytes(), path.name
        (ours, theirs) = (load_run_state(path) for path in (folder, expected))
        assert ours | {"config": None} == theirs | {"config": None}


def train_on_a_slow_disk(flags: dict[str, Any]) -> tuple[str | None, str]:
    """`train_here` where the save of step 3 cannot write before step 5 begins; also what was the latest by then."""
    there_is_step_5 = threading.Event()
    latest_then: list[str] = []

    def slow_write(*arguments: Any) -> Any:
        assert there_is_step_5.wait(60)
        return write_shard(*arguments)

    def begin(output: SRDEOutput) -> SRDEOutput:
        pointer = Path(flags["output_dir"]) / "latest"
        latest_then.append(pointer.read_text() if pointer.exists() else "none")
        there_is_step_5.set()
        return output

    with patch.object(save, "write_shard", slow_write), at_training_forward(9, int(os.environ["RANK"]), begin):
        failure = train_here(flags)
    (latest,) = latest_then
    return failure, latest


def test_training_goes_on_while_a_checkpoint_is_written(
    inputs: Inputs, two_ranks: Ranks, reference: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    assert two_ranks(train_on_a_slow_disk, inputs.flags(run)) == [(None, "none")] * 2
    assert latest(run) == "checkpoint-6"
    # What was written is what there was at step 3, not what there was when the disk was ready.
    for path in (reference / "checkpoint-3").glob("*.safetensors"):
        assert (run / "checkpoint-3" / path.name).read_bytes() == path.read_bytes(), path.name
    assert (run / "srde_weights.safetensors").read_bytes() == (reference / "srde_weights.safetensors").read_bytes()


def train_with_another_loss(flags: dict[str, Any], difference: float, labels: int) -> str | None:
    """The restored model's loss on its probe row, of that many labels, is not the saved one."""
    original = RunState.probe_loss

    def probe_loss(state: RunState, row: int) -> tuple[float, int]:
        return original(state, row)[0] * (1 + difference), labels

    with patch.object(RunState, "probe_loss", probe_loss):
        return train_here(flags)


@pytest.mark.parametrize(("difference", "labels", "fits"), [(1.5e-4, 4, True), (1.5e-4, 40, False), (1e-3, 4, False)])
def test_a_restored_model_gives_the_saved_loss(
    inputs: Inputs, one_rank: Ranks, reference: Path, tmp_path: Path, difference: float, labels: int, fits: bool
) -> None:
    flags = inputs.flags(tmp_path / "run", resume_from=str(reference), batch_size=4)
    (error,) = one_rank(train_with_another_loss, flags, difference, labels)
    if fits:
        assert error is None
    else:
        assert error is not None and "Resume on hardware of the same kind, with the bf16" in error


@pytest.mark.parametrize("world_size", [1, 4])
def test_two_ranks_checkpoint_continues_on_another_number(
    inputs: Inputs, world_size: int, one_rank: Ranks, four_ranks: Ranks, reference: Path, tmp_path: Path
) -> None:
    ranks = {1: one_rank, 4: four_ranks}[world_size]
    run = tmp_path / "run"
    flags = inputs.flags(run, resume_from=str(reference / "checkpoint-3"), **cut(ROWS_PER_STEP, world_size))
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
        ({"warm_start": True}, "warm_start=true sets the routers before step 1, but its 6 steps were trained without"),
        ({"batch_size": 3}, "a step had 8 rows; here batch_size x processes x gradient_accumulation_steps = 6"),
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
    [error] = one_rank(train_here, inputs.flags(run, resume_from="latest", **({"batch_size": 4} | changes)))
    assert error is not None and message in error and "\n" not in error and len(error) < 300
    assert listing(run) == before


def fail_in_the_first_step(flags: dict[str, Any]) -> str | None:
    with patch.object(trainer, "optimizer_step", side_effect=SRDEError("the first step fails")):
        return train_here(flags)


def test_who_goes_back_to_an_earlier_checkpoint_does_not_come_back_to_the_later_one(
    inputs: Inputs, two_ranks: Ranks, reference: Path, tmp_path: Path
) -> None:
    run = shutil.copytree(reference, tmp_path / "run")
    earlier = inputs.flags(run, resume_from=str(run / "checkpoint-3"))
    assert two_ranks(fail_in_the_first_step, earlier) == ["the first step fails"] * 2
    assert latest(run) == "checkpoint-3" and [line["step"] for line in metrics(run)] == [1, 2, 3]
    assert (run / "checkpoint-6").is_dir()
    assert two_ranks(train_here, inputs.flags(run, resume_from="latest")) == [None, None]
    assert without_clocks(metrics(run)) == without_clocks(metrics(reference))
    assert sorted(path.name for path in run.iterdir()) == sorted(path.name for path in reference.iterdir())


def test_a_checkpoint_that_a_kill_left_over_at_the_end_goes(
    inputs: Inputs, two_ranks: Ranks, reference: Path, tmp_path: Path
) -> None:
    run = shutil.copytree(reference, tmp_path / "run")
    assert sorted(path.name for path in run.glob("checkpoint-*")) == ["checkpoint-3", "checkpoint-6"]
    for name in ("completed.json", "srde_weights.safetensors"):
        (run / name).unlink()
    flags = inputs.flags(run, resume_from="latest", save_total_limit=1)
    assert two_ranks(train_here, flags) == [None, None]
    assert [path.name for path in run.glob("checkpoint-*")] == ["checkpoint-6"]
    assert (run / "completed.json").exists()


def test_a_finished_run_goes_on_in_another_folder(
    inputs: Inputs, one_rank: Ranks, reference: Path, tmp_path: Path
) -> None:
    """There is nothing left to do, but the folder is complete."""
    run = tmp_path / "run"
    assert one_rank(train_here, inputs.flags(run, resume_from=str(reference), batch_size=4)) == [None]
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


# --- with experts elsewhere ------------------------------------------------------------------------------------------


def moved_flags(inputs: Inputs, folder: Path, world_size: int, size: int, **changes: Any) -> dict[str, Any]:
    """Twelve rows a step, which all of the numbers of processes divide."""
    own = {"eval_steps": 0, "expert_parallel_size": size}
    return inputs.flags(folder, **(own | cut(12, world_size) | changes))


@pytest.fixture(scope="module")
def alone(
    inputs: Inputs, ranks: dict[int, Ranks], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, dict[int, list[int]]]:
    """Six steps on one process, and the rows of each."""
    folder = tmp_path_factory.mktemp("alone") / "run"
    [(error, rows)] = ranks[1](train_and_note_rows, moved_flags(inputs, folder, 1, 1))
    assert error is None
    return folder, rows


@pytest.fixture(scope="module")
def four_two(inputs: Inputs, ranks: dict[int, Ranks], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Saved after three of six steps by four ranks that share the experts in pairs."""
    folder = tmp_path_factory.mktemp("four_two") / "run"
    assert ranks[4](train_here, moved_flags(inputs, folder, 4, 2)) == [None] * 4
    return folder / "checkpoint-3"


def train_and_note_rows(flags: dict[str, Any]) -> tuple[str | None, dict[int, list[int]]]:
    """`train_here`, and the indices of the rows that this rank trained on in each step (from 0)."""
    rows: dict[int, list[int]] = {}
    micro_batch, collate = RowStream.micro_batch, loader.collate

    def noting(stream: RowStream, step: int, micro: int, **place: int) -> dict[str, Tensor]:
        def note(dataset: Any, indices: list[int]) -> dict[str, Tensor]:
            rows.setdefault(step, []).extend(indices)
            return collate(dataset, indices)

        with patch.object(loader, "collate", note):
            return micro_batch(stream, step, micro, **place)

    with patch.object(RowStream, "micro_batch", noting):
        return train_here(flags), rows


def states(folder: Path) -> dict[tuple[str, str], Tensor]:
    """Every master and optimizer state of a checkpoint as a whole tensor, put together by global offset."""
    index = ShardIndex(folder)
    return {key: index.tensor(*key) for key in index.shapes}


@pytest.mark.parametrize(("world_size", "size"), MOVES)
def test_masters_and_optimizer_states_move_bit_for_bit(
    inputs: Inputs, ranks: dict[int, Ranks], four_two: Path, world_size: int, size: int, tmp_path: Path
) -> None:
    """Read and written again with no step between."""
    flags = moved_flags(inputs, tmp_path / "run", world_size, size, resume_from=str(four_two), max_steps=3)
    assert ranks[world_size](train_here, flags) == [None] * world_size
    assert verify_checkpoint(tmp_path / "run/checkpoint-3")["world_size"] == world_size
    before, after = states(four_two), states(tmp_path / "run/checkpoint-3")
    assert before.keys() == after.keys()
    assert {kind for kind, _ in before} == {"master", "momentum_buffer", "exp_avg", "exp_avg_sq"}
    for key, tensor in before.items():
        assert tensor.any() and torch.equal(after[key], tensor), key


@pytest.mark.parametrize(("world_size", "size"), MOVES)
def test_three_steps_and_three_elsewhere_equal_six_on_one_process(
    inputs: Inputs,
    ranks: dict[int, Ranks],
    alone: tuple[Path, dict[int, list[int]]],
    four_two: Path,
    world_size: int,
    size: int,
    tmp_path: Path,
) -> None:
    """Losses, weights, optimizer states, and exactly the rows that were next."""
    run, (undisturbed, rows) = tmp_path / "run", alone
    flags = moved_flags(inputs, run, world_size, size, resume_from=str(four_two))
    results = ranks[world_size](train_and_note_rows, flags)
    assert [error for error, _ in results] == [None] * world_size
    assert_same_training(run, undisturbed, first_step=4, tolerance=TOLERANCE)
    after, expected = states(run / "checkpoint-6"), states(undisturbed / "checkpoint-6")
    assert after.keys() == expected.keys()
    for key, tensor in expected.items():
        assert_close(after[key], tensor, TOLERANCE, "/".join(key))
    for _, own in results:
        assert list(own) == [3, 4, 5]
    for step in (3, 4, 5):
        assert sorted(row for _, own in results for row in own[step]) == sorted(rows[step]), step
