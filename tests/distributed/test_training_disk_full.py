"""Storage that is full or turns read-only while a run trains: it says so, keeps what it has, and stops or goes on."""

from __future__ import annotations

import errno
import logging
import os
import resource
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest

from srde_ds.checkpoint import save
from srde_ds.checkpoint.resume import verify_checkpoint
from srde_ds.liveness.heartbeat import read_heartbeat
from srde_ds.model.output import SRDEOutput
from tests.distributed.harness import Ranks
from tests.distributed.training_helpers import (
    Inputs,
    at_training_forward,
    latest,
    metrics,
    train_here,
    weights,
    without_clocks,
)

# A checkpoint of some 240 KB; with the other files there is room for one, not for two.
LARGE = {"density": 0.5, "save_steps": 2}
TOO_SMALL, LARGE_ENOUGH = "400k", "8m"


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={TOO_SMALL}", "tmpfs", str(folder)]
    mounted = subprocess.run(command, capture_output=True, text=True)
    if mounted.returncode:
        pytest.skip(f"no disk of a fixed size: mount needs root ({mounted.stderr.strip()})")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


@pytest.fixture(scope="module")
def undisturbed(inputs: Inputs, two_ranks: Ranks, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("undisturbed") / "run"
    assert two_ranks(train_here, inputs.flags(folder, **LARGE)) == [None, None]
    return folder


def train_with_warnings(flags: dict[str, Any]) -> tuple[str | None, list[str]]:
    """`train_here`, and what the saver warned of on this rank."""
    texts: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: texts.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("srde_ds.training.checkpointing")
    logger.addHandler(handler)
    try:
        return train_here(flags), texts
    finally:
        logger.removeHandler(handler)


def train_until_there_is_room(flags: dict[str, Any], disk: Path) -> tuple[str | None, list[str]]:
    """`train_with_warnings` on a disk that grows at the beginning of step 6, between the second save and the last."""

    def grow(output: SRDEOutput) -> SRDEOutput:
        enlarge(disk)
        return output

    with at_training_forward(11, 0, grow):
        return train_with_warnings(flags)


def enlarge(disk: Path) -> None:
    subprocess.run(["mount", "-o", f"remount,size={LARGE_ENOUGH}", str(disk)], check=True)


def assert_only_the_first_checkpoint(run: Path) -> None:
    """It is complete, and nothing of a later one takes up room."""
    assert latest(run) == "checkpoint-2" and verify_checkpoint(run / "checkpoint-2")["step"] == 2
    assert [path.name for path in run.glob("checkpoint-*")] == ["checkpoint-2"]
    assert not (run / "completed.json").exists()


def assert_resumes(ranks: Ranks, flags: dict[str, Any], undisturbed: Path) -> None:
    run = Path(flags["output_dir"])
    assert ranks(train_here, flags | {"resume_from": "latest"}) == [None, None]
    assert (run / "completed.json").exists()
    assert (run / "srde_weights.safetensors").read_bytes() == (undisturbed / "srde_weights.safetensors").read_bytes()
    assert without_clocks(metrics(run)) == without_clocks(metrics(undisturbed))


@pytest.mark.parametrize("in_background", [True, False])
def test_the_run_stops(
    inputs: Inputs, two_ranks: Ranks, undisturbed: Path, small_disk: Path, in_background: bool
) -> None:
    run = small_disk / "run"
    flags = inputs.flags(run, save_in_background=in_background, **LARGE)
    errors = two_ranks(train_here, flags)
    assert errors[0] == errors[1]
    assert "checkpoint-4 was not saved: rank " in errors[0] and "No space left on device" in errors[0]
    assert "'checkpoint-2' stays the latest checkpoint" in errors[0] and "\n" not in errors[0]
    assert_only_the_first_checkpoint(run)
    assert read_heartbeat(run).get("bad_input", True)
    enlarge(small_disk)
    assert_resumes(two_ranks, flags, undisturbed)


def train_with_io_errors(flags: dict[str, Any]) -> str | None:
    """`train_here`, on a disk that takes no shards."""

    def write_shard(*arguments: Any) -> Any:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with patch.object(save, "write_shard", write_shard):
        return train_here(flags)


def test_only_a_fault_that_may_pass_lets_the_supervisor_start_again(
    inputs: Inputs, two_ranks: Ranks, tmp_path: Path
) -> None:
    errors = two_ranks(train_with_io_errors, inputs.flags(tmp_path / "run", max_steps=1, warmup_steps=0))
    assert "checkpoint-1 was not saved: rank 0: Input/output error" in errors[0]
    assert read_heartbeat(tmp_path / "run")["bad_input"] is False


@pytest.mark.parametrize("in_background", [True, False])
def test_the_run_goes_on_but_does_not_end_well_without_its_last_checkpoint(
    inputs: Inputs, two_ranks: Ranks, undisturbed: Path, small_disk: Path, in_background: bool
) -> None:
    run = small_disk / "run"
    flags = inputs.flags(run, on_save_failure="continue", save_in_background=in_background, **LARGE)
    (error, warnings), (other_error, other_warnings) = two_ranks(train_with_warnings, flags)
    assert error == other_error and error is not None and "checkpoint-6 was not saved" in error
    assert len(warnings) == 2 and other_warnings == []
    for step, warning in zip((4, 6), warnings, strict=True):  # the last step is tried again at the end
        assert f"checkpoint-{step} was not saved" in warning and "Training continues" in warning
    assert_only_the_first_checkpoint(run)
    assert [line["step"] for line in metrics(run)] == [1, 2, 3, 4, 5, 6]
    enlarge(small_disk)
    assert_resumes(two_ranks, flags, undisturbed)


def test_the_run_ends_well_when_there_is_room_in_time(
    inputs: Inputs, two_ranks: Ranks, undisturbed: Path, small_disk: Path
) -> None:
    run = small_disk / "run"
    flags = inputs.flags(run, on_save_failure="continue", **LARGE)
    (error, warnings), other = two_ranks(train_until_there_is_room, flags, small_disk)
    assert error is None and other == (None, [])
    assert len(warnings) == 1 and "checkpoint-4 was not saved" in warnings[0]
    assert latest(run) == "checkpoint-6" and (run / "completed.json").exists()
    assert weights(run).keys() == weights(undisturbed).keys()
    assert (run / "srde_weights.safetensors").read_bytes() == (undisturbed / "srde_weights.safetensors").read_bytes()
    assert without_clocks(metrics(run)) == without_clocks(metrics(undisturbed))


def train_until_it_is_read_only(flags: dict[str, Any]) -> str | None:
    """`train_here` with an output folder that turns read-only at the beginning of step 4, after the first save."""

    def harden(output: SRDEOutput) -> SRDEOutput:
        mount_read_only(flags["output_dir"])
        return output

    with at_training_forward(7, 0, harden):
        return train_here(flags)


def mount_read_only(folder: Path) -> None:
    """Over itself, since files are open in it; whoever opens one from now on cannot write."""
    subprocess.run(["mount", "--bind", str(folder), str(folder)], check=True)
    subprocess.run(["mount", "-o", "remount,bind,ro", str(folder)], check=True)


def test_storage_that_turns_read_only(inputs: Inputs, two_ranks: Ranks, undisturbed: Path, small_disk: Path) -> None:
    enlarge(small_disk)
    run = small_disk / "run"
    flags = inputs.flags(run, **LARGE)
    errors = two_ranks(train_until_it_is_read_only, flags)
    subprocess.run(["umount", "--lazy", str(run)], check=True)
    assert errors[0] == errors[1]
    assert errors[0] is not None and "Read-only file system" in errors[0] and "\n" not in errors[0]
    assert_only_the_first_checkpoint(run)
    assert_resumes(two_ranks, flags, undisturbed)


def train_with_small_files(flags: dict[str, Any], most_bytes: int) -> str | None:
    """`train_here` with no file of rank 1 growing beyond `most_bytes`: an error while writing that needs no root."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    if os.environ["RANK"] == "1":
        resource.setrlimit(resource.RLIMIT_FSIZE, (most_bytes, hard))
    try:
        return train_here(flags)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_file_that_cannot_grow_on_one_rank(
    inputs: Inputs, two_ranks: Ranks, undisturbed: Path, tmp_path: Path
) -> None:
    flags = inputs.flags(tmp_path / "run", **LARGE)
    errors = two_ranks(train_with_small_files, flags, 50_000)
    assert errors[0] == errors[1]
    assert "checkpoint-2 was not saved: rank 1: File too large." in errors[0]
    assert not (tmp_path / "run/latest").exists() and not list((tmp_path / "run").glob("checkpoint-*"))
