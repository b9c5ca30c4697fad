"""The folder protocol: complete or absent, whatever dies or fills up, and training goes on meanwhile."""

from __future__ import annotations

import errno
import math
import multiprocessing
import os
import random
import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from srde_ds.checkpoint import save as saving
from srde_ds.checkpoint.resume import (
    find_checkpoint,
    load_common_tensors,
    load_rank_state,
    load_run_state,
    verify_checkpoint,
)
from srde_ds.checkpoint.save import CheckpointSaver, SaveFailed
from srde_ds.errors import SRDEError
from srde_ds.utils.together import Collectives
from tests.checkpoint_helpers import (
    ALONE,
    SUPPORT,
    contents,
    cut,
    make_tensors,
    names,
    on_ranks,
    save,
    save_on_ranks,
    value_of,
)


def test_every_rank_gets_back_what_it_saved(tmp_path: Path) -> None:
    results = save_on_ranks(tmp_path, 7, 3)
    folder = tmp_path / "checkpoint-7"
    assert results == [folder] * 3
    assert (tmp_path / "latest").read_text() == "checkpoint-7\n"
    manifest = verify_checkpoint(find_checkpoint("latest", tmp_path))
    assert (manifest["step"], manifest["world_size"], manifest["format_version"]) == (7, 3, 1)
    assert sorted([*manifest["files"], "manifest.json"]) == names(folder)
    assert {path.suffix for path in folder.iterdir()} == {".json", ".safetensors"}
    assert value_of(folder) == 7
    assert load_run_state(folder) == {"tokens": 7}
    assert [load_rank_state(folder, rank) for rank in range(3)] == [{"rng": [7, rank]} for rank in range(3)]
    assert torch.equal(load_common_tensors(folder)["layers.0.support"], SUPPORT["layers.0.support"])
    with pytest.raises(SRDEError, match="no state of rank 3"):
        load_rank_state(folder, 3)


def test_retention_keeps_the_last_saved_and_ignores_what_it_cannot_read(tmp_path: Path) -> None:
    (tmp_path / "checkpoint-notes").mkdir()
    (tmp_path / "checkpoint-1").mkdir()  # no manifest: not ours to delete
    for step in (2, 3, 4):
        save(tmp_path, step, keep=2)
    assert names(tmp_path) == ["checkpoint-1", "checkpoint-3", "checkpoint-4", "checkpoint-notes", "latest"]
    # A run that went back to step 3 and saves step 5 and 3 again: saving order counts, not the number.
    save(tmp_path, 3, keep=2)
    assert "checkpoint-4" in names(tmp_path) and "checkpoint-3" in names(tmp_path)
    save(tmp_path, 5, keep=1)
    assert names(tmp_path) == ["checkpoint-1", "checkpoint-5", "checkpoint-notes", "latest"]


def test_the_same_step_again_replaces_the_former_one(tmp_path: Path) -> None:
    save(tmp_path, 2)
    save(tmp_path, 2, run_state={"tokens": 99}, slices=cut(make_tensors(8.0), 1)[0])
    folder = find_checkpoint("latest", tmp_path)
    assert load_run_state(folder) == {"tokens": 99} and value_of(folder) == 8
    assert names(tmp_path) == ["checkpoint-2", "latest"]


# --- kills -----------------------------------------------------------------------------------------------------------


class Killed(BaseException):
    """Nothing in the code under test may catch it."""


class Kill:
    """Counts file operations; from number `at` on, each one fails, as if the process were gone."""

    OPERATIONS = ("mkdir", "rename", "replace", "fsync", "unlink", "rmdir", "open")

    def __init__(self, monkeypatch: pytest.MonkeyPatch, at: float) -> None:
        self.count = 0
        for name in self.OPERATIONS:
            monkeypatch.setattr(os, name, self._guarded(getattr(os, name), at))

    def _guarded(self, operation: Callable[..., Any], at: float) -> Callable[..., Any]:
        def guarded(*args: Any, **kwargs: Any) -> Any:
            self.count += 1
            if self.count >= at:
                raise Killed
            return operation(*args, **kwargs)

        return guarded


@pytest.mark.parametrize(("step", "keep"), [(2, 9), (2, 1), (1, 9)], ids=["next", "next and retention", "replace"])
def test_a_kill_before_any_file_operation_leaves_a_complete_latest(tmp_path: Path, step: int, keep: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        save(tmp_path / "count", 1)
        counter = Kill(patch, math.inf)
        save(tmp_path / "count", step, keep=keep, slices=cut(make_tensors(5.0), 1)[0])
    assert counter.count > 12
    seen = set()
    for at in range(1, counter.count + 1):
        run = tmp_path / str(at)
        save(run, 1)
        with pytest.MonkeyPatch.context() as patch:
            Kill(patch, at)
            with pytest.raises(Killed):
                save(run, step, keep=keep, slices=cut(make_tensors(5.0), 1)[0])
        seen.add(value_of(find_checkpoint("latest", run)))
        for path in run.glob("checkpoint-?"):
            verify_checkpoint(path)  # no folder only looks like a checkpoint
        save(run, 3)
        assert value_of(find_checkpoint("latest", run)) == 3
        assert not [name for name in names(run) if name.endswith((".tmp", ".old"))]
    assert seen == {1, 5}


def _save_forever(run: Path, step: int) -> None:
    torch.set_num_threads(1)
    saver = CheckpointSaver(run, ALONE, keep=2)
    while True:
        step += 1
        saver.start(step // 2, **contents(step // 2))  # every step twice: replacements too


def test_sigkill_at_random_moments_leaves_a_complete_latest(tmp_path: Path) -> None:
    save(tmp_path, 1)
    draw = random.Random(3)
    context = multiprocessing.get_context("fork")
    step = 1
    for _ in range(20):
        child = context.Process(target=_save_forever, args=(tmp_path, 2 * step))
        child.start()
        published, deadline = (tmp_path / "latest").stat().st_ino, time.monotonic() + 20
        while (tmp_path / "latest").stat().st_ino == published and time.monotonic() < deadline:
            time.sleep(0.001)
        assert time.monotonic() < deadline, "the child saved nothing"
        time.sleep(draw.uniform(0, 0.04))
        child.kill()
        child.join()
        folder = find_checkpoint("latest", tmp_path)
        assert value_of(folder) >= step
        step = int(value_of(folder))


# --- failures on one rank --------------------------------------------------------------------------------------------

FILES = (
    "shard-00000.safetensors",
    "shard-00001.safetensors",
    "rank-00001.json",
    "run.json",
    "manifest.json",
    "latest.tmp",
)


@pytest.mark.parametrize("full", FILES)
def test_disk_full_keeps_the_old_checkpoint_and_stops_every_rank(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, full: str
) -> None:
    save_on_ranks(tmp_path, 1, 2)
    fsync = os.fsync

    def fsync_on_a_full_disk(descriptor: int) -> None:
        if os.readlink(f"/proc/self/fd/{descriptor}").endswith(full):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        fsync(descriptor)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fsync_on_a_full_disk)
        results = save_on_ranks(tmp_path, 2, 2)
    failing = 1 if "00001" in full else 0
    assert [type(result) for result in results] == [SaveFailed, SaveFailed]
    assert str(results[0]) == str(results[1])
    assert f"checkpoint-2 was not saved: rank {failing}: No space left on device" in str(results[0])
    assert "'checkpoint-1' stays the latest checkpoint" in str(results[0])
    assert value_of(find_checkpoint("latest", tmp_path)) == 1
    assert "checkpoint-2.tmp" not in names(tmp_path)
    assert save_on_ranks(tmp_path, 2, 2) == [tmp_path / "checkpoint-2"] * 2


def test_what_cannot_be_removed_is_no_failure_of_the_save(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """As on NFS, where a file that a process has open keeps its folder."""

    def rmtree(path: Path) -> None:
        raise OSError(errno.ENOTEMPTY, os.strerror(errno.ENOTEMPTY), str(path))

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", rmtree)
        for step in (1, 2, 3, 4):
            save(tmp_path, step, keep=2)
    assert "checkpoint-4 was saved, but an older checkpoint could not be removed: Directory not empty" in caplog.text
    assert value_of(find_checkpoint("latest", tmp_path)) == 4
    save(tmp_path, 5, keep=2)
    assert names(tmp_path) == ["checkpoint-4", "checkpoint-5", "latest"]


@pytest.mark.parametrize(("number", "passing"), [(errno.ENOSPC, False), (errno.EIO, True)])
def test_a_failed_save_knows_whether_another_start_may_help(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, passing: bool
) -> None:
    def write_shard(folder: Path, rank: int, pieces: Any) -> Any:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(saving, "write_shard", write_shard)
    assert [error.may_pass for error in save_on_ranks(tmp_path, 1, 2)] == [passing] * 2


def test_common_tensors_keep_no_file_open(tmp_path: Path) -> None:
    save(tmp_path, 1)
    tensors = load_common_tensors(tmp_path / "checkpoint-1")
    assert tensors and str(tmp_path) not in Path("/proc/self/maps").read_text()


def test_an_unforeseen_error_on_one_rank_does_not_leave_the_others_waiting(tmp_path: Path) -> None:
    results = save_on_ranks(tmp_path, 1, 3, {1: {"rank_state": {"rng": object()}}})
    assert [type(result) for result in results] == [SRDEError, TypeError, SRDEError]
    assert "rank 1: an unforeseen error" in str(results[0])


def test_missing_elements_are_found_when_saving(tmp_path: Path) -> None:
    results = save_on_ranks(tmp_path, 1, 2, {1: {"slices": cut(make_tensors(), 2)[1][:-1]}})
    assert "is missing elements" in str(results[0]) and str(results[1]) == str(results[0])
    assert not (tmp_path / "checkpoint-1").exists() and not (tmp_path / "latest").exists()


def test_a_file_where_the_run_folder_should_be(tmp_path: Path) -> None:
    (tmp_path / "run").write_text("")
    with pytest.raises(SRDEError, match="checkpoint-1 was not saved: rank 0: File exists"):
        save(tmp_path / "run", 1)


def test_leftovers_of_any_step_go_with_the_next_save(tmp_path: Path) -> None:
    (tmp_path / "checkpoint-900.tmp").mkdir()
    (tmp_path / "checkpoint-900.tmp" / "shard-00000.safetensors").write_bytes(b"half")
    save(tmp_path, 1)
    assert names(tmp_path) == ["checkpoint-1", "latest"]


# --- in the background -----------------------------------------------------------------------------------------------


class Gate:
    """Holds every rank's writing until it is opened, as a slow disk would."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.open = threading.Event()
        original = vars(saving)["write_shard"]

        def write_shard(*args: Any) -> Any:
            assert self.open.wait(20)
            return original(*args)

        monkeypatch.setattr(saving, "write_shard", write_shard)


def test_what_is_saved_is_what_was_there_at_the_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gate = Gate(monkeypatch)
    given = contents(3)
    given["common_tensors"] = {name: tensor.clone() for name, tensor in SUPPORT.items()}
    saver = CheckpointSaver(tmp_path, ALONE, keep=2)
    saver.start(3, **given)
    assert not saver.poll() and saver.saved_step is None
    for piece in given["slices"]:
        piece.data.add_(100)  # training goes on
    given["common_tensors"]["layers.0.support"].zero_()
    given["rank_state"]["rng"].append("later")
    given["run_state"]["tokens"] = 0
    gate.open.set()
    saver.wait()
    folder = find_checkpoint("latest", tmp_path)
    assert saver.poll() and saver.saved_step == 3
    assert value_of(folder) == 3 and load_run_state(folder) == {"tokens": 3}
    assert load_rank_state(folder, 0) == {"rng": [3, 0]}
    assert torch.equal(load_common_tensors(folder)["layers.0.support"], SUPPORT["layers.0.support"])


def test_both_ways_of_saving_write_the_same_files(tmp_path: Path) -> None:
    def in_background(ranks: Collectives) -> None:
        with CheckpointSaver(tmp_path / "background", ranks, keep=2) as saver:
            saver.start(3, **contents(3, ranks))

    assert on_ranks(2, in_background) == [None, None]
    save_on_ranks(tmp_path / "waiting", 3, 2)
    folders = [tmp_path / run / "checkpoint-3" for run in ("background", "waiting")]
    assert names(folders[0]) == names(folders[1])
    for name in names(folders[0]):
        if name != "manifest.json":  # holds the time
            assert (folders[0] / name).read_bytes() == (folders[1] / name).read_bytes(), name
    assert verify_checkpoint(folders[0])["files"] == verify_checkpoint(folders[1])["files"]


def test_the_next_save_waits_for_the_one_in_flight(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gate = Gate(monkeypatch)
    saver = CheckpointSaver(tmp_path, ALONE, keep=2)
    saver.start(1, **contents(1))
    threading.Timer(0.3, gate.open.set).start()
    saver.start(2, **contents(2))
    assert saver.saved_step == 1 and verify_checkpoint(tmp_path / "checkpoint-1")
    saver.wait()
    assert value_of(find_checkpoint("latest", tmp_path)) == 2


def test_no_collective_runs_in_a_thread_of_the_saver(tmp_path: Path) -> None:
    def work(ranks: Collectives) -> set[str]:
        callers = set()

        def gather(value: Any) -> list[Any]:
            callers.add(threading.current_thread().name)
            return ranks.gather(value)

        watched = ranks._replace(gather=gather, all_reduce_max=lambda value: max(gather(value)))
        save(tmp_path, 1, watched)
        return callers - {threading.current_thread().name}

    assert on_ranks(2, work) == [set(), set()]


def test_a_failing_rank_waits_for_those_that_still_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rank 1's disk is full at once, rank 0 writes on: nobody may remove the folder under its hands."""
    gate = Gate(monkeypatch)
    held = vars(saving)["write_shard"]

    def write_shard(folder: Path, rank: int, pieces: Any) -> Any:
        if rank == 1:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return held(folder, rank, pieces)

    monkeypatch.setattr(saving, "write_shard", write_shard)

    def work(ranks: Collectives) -> tuple[list[bool], str, list[str]]:
        saver = CheckpointSaver(tmp_path, ranks, keep=2)
        saver.start(1, **contents(1, ranks))
        time.sleep(0.1)
        polls = [saver.poll() for _ in range(3)]
        gate.open.set()
        with pytest.raises(SaveFailed) as caught:
            saver.wait()
        ranks.gather(None)  # rank 0 has tidied up
        return polls, str(caught.value), names(tmp_path)

    expected = f"'{tmp_path}': checkpoint-1 was not saved: rank 1: No space left on device."
    assert on_ranks(2, work) == [([False] * 3, expected, [])] * 2


@pytest.mark.parametrize(("error", "complete"), [(SRDEError("loss is nan"), True), (ValueError("a bug"), False)])
def test_on_the_way_out_of_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, complete: bool
) -> None:
    """Ranks raise SRDEErrors together and can finish; with any other exception this rank may be alone."""
    gate = Gate(monkeypatch)
    calls: list[int] = []

    def all_reduce_max(value: int) -> int:
        calls.append(value)
        return value

    ranks = ALONE._replace(all_reduce_max=all_reduce_max)
    with pytest.raises(type(error)), CheckpointSaver(tmp_path, ranks, keep=2) as saver:
        saver.start(1, **contents(1))
        threading.Timer(0.2, gate.open.set).start()
        raise error
    assert (tmp_path / "checkpoint-1").exists() == complete == bool(calls)
    # Its own files are written in any case: no thread is left behind.
    assert (tmp_path / ("checkpoint-1" if complete else "checkpoint-1.tmp") / "rank-00000.json").exists()


def test_a_failed_save_does_not_hide_the_error_that_ends_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def write_shard(*args: Any) -> Any:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(saving, "write_shard", write_shard)
    with pytest.raises(SRDEError, match="loss is nan"), CheckpointSaver(tmp_path, ALONE, keep=2) as saver:
        saver.start(1, **contents(1))
        raise SRDEError("loss is nan")
    assert "checkpoint-1 was not saved: rank 0: No space left on device" in caplog.text


def test_host_memory_is_used_again(tmp_path: Path) -> None:
    saver = CheckpointSaver(tmp_path, ALONE, keep=2)
    places = []
    for step in (1, 2, 3):
        given = contents(step)
        if step == 3:  # other shapes, as when a support shrinks
            given["slices"] = cut(make_tensors(3.0), 1, seed=4)[0]
        saver.start(step, **given)
        places.append([buffer.data_ptr() for buffer in saver._host._buffers])
        saver.wait()
        assert value_of(tmp_path / f"checkpoint-{step}") == step
    assert places[0] == places[1] != places[2]
