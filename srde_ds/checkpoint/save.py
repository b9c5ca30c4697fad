"""Writes checkpoints. A folder appears complete or not at all (docs/checkpoints.md).

The caller passes the collectives; torch.distributed is not used here. Threads only write files. The ranks communicate
only in the calling thread, so that this never overlaps with the collectives of training.
"""

from __future__ import annotations

import copy
import logging
import os
import shutil
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from srde_ds.checkpoint.layout import (
    COMMON,
    RUN_STATE,
    rank_name,
    read_json,
    saved_checkpoints,
    write_json,
    write_latest,
    write_manifest,
)
from srde_ds.checkpoint.shards import FileRecord, ShardIndex, shard_name, write_shard, write_tensors
from srde_ds.checkpoint.tensor_slice import TensorSlice
from srde_ds.errors import SRDEError
from srde_ds.utils.files import file_hash, io_reason, sync
from srde_ds.utils.together import Ranks, attempt
from srde_ds.weights.locate import read_latest

logger = logging.getLogger(__name__)

Result = TypeVar("Result")

# A rank's progress with a part; the largest counts. A rank that fails waits for those that are still writing.
_DONE, _FAILED, _RUNNING = 0, 1, 2
# Waiting ranks poll often enough that no collective comes near its timeout.
_LOOK_AGAIN_SECONDS = 0.1


class SaveFailed(SRDEError):
    """A checkpoint could not be written; earlier ones remain. All ranks raise this together."""


class _Content(NamedTuple):
    """What a rank writes; see `CheckpointSaver.start`."""

    slices: Sequence[TensorSlice]
    rank_state: Mapping[str, Any]
    run_state: Mapping[str, Any]
    common_tensors: Mapping[str, Tensor]


class _Part(NamedTuple):
    """A part of a save that all ranks must finish before the next part begins."""

    work: Callable[[], None]
    problem: str
    saved_step: int | None
    """the step that counts as saved once this part is done"""


class CheckpointSaver:
    """Writes checkpoints, one at a time, in a thread of each rank.

    Every rank calls `start`, `poll` and `wait` at the same points. As a context manager it finishes a save in progress
    at the block's end and after an SRDEError, which ranks raise together. Any other exception may be this rank's alone:
    then it waits only for its own thread, and the checkpoint stays half-written.

    Args:
        output_dir: the run's folder, on a file system that all ranks see.
        keep: number of checkpoints to keep.

    Attributes:
        saved_step: step of the last complete checkpoint; the caller may set it after resuming.
    """

    def __init__(self, output_dir: str | Path, ranks: Ranks, *, keep: int) -> None:
        self.run, self.ranks, self.keep = Path(output_dir), ranks, keep
        self.saved_step: int | None = None
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._parts: deque[_Part] = deque()
        self._running: Future[None] | None = None
        self._host = _HostCopies()

    def start(
        self,
        step: int,
        *,
        slices: Sequence[TensorSlice],
        rank_state: Mapping[str, Any],
        run_state: Mapping[str, Any],
        common_tensors: Mapping[str, Tensor],
        copy_first: bool = True,
    ) -> None:
        """Begin to write `checkpoint-<step>`, once any save in progress is done.

        Args:
            slices: what this rank holds. Together the ranks must give each element of each tensor exactly once.
            rank_state: state of this rank that JSON can hold (random number generators).
            run_state: state of the run that JSON can hold, written by rank 0 (config, data position, adapter metadata).
            common_tensors: tensors that all ranks share, such as supports, written by rank 0.
            copy_first: copy everything to host memory before returning; otherwise no argument may change before
                `wait` returns.

        Raises:
            SaveFailed: this checkpoint, or the previous one, cannot be written.
        """
        self.wait()
        rank, run, name = self.ranks.rank, self.run, f"checkpoint-{step}"
        problem = f"{name} was not saved"

        def prepare() -> _Content:
            if rank == 0:
                _prepare(run, name)
            content = _Content(slices, rank_state, run_state, common_tensors if rank == 0 else {})
            return self._host.copy(content) if copy_first else content

        content = self._together(prepare, problem)

        records: dict[str, FileRecord] = {}

        def write() -> None:
            records.update(_write_files(run / f"{name}.tmp", rank, content))

        def publish() -> None:
            if rank == 0:
                _publish(run, name, step, self.ranks.world_size, records)

        self._parts.extend(
            [
                _Part(write, problem, None),
                _Part(publish, problem, step),
                _Part(partial(self._remove_older, step), problem, None),
            ]
        )
        self._running = self._thread.submit(write)

    def poll(self) -> bool:
        """Whether no save is in progress. While one is, this is a small collective; it does not wait for files.

        Raises:
            SaveFailed: on every rank, if any rank failed, with that rank's reason. The previous checkpoint is untouched
                until `latest` moves.
        """
        if self._running is None:
            return True
        running = self._running
        state = _RUNNING if not running.done() else _FAILED if running.exception() else _DONE
        state = self.ranks.all_reduce_max(state)
        if state == _RUNNING:
            return False
        part, self._running = self._parts.popleft(), None
        if state == _FAILED:
            self._parts.clear()
            self._together(running.result, part.problem)
        if part.saved_step is not None:
            self.saved_step = part.saved_step
        if self._parts:
            self._running = self._thread.submit(self._parts[0].work)
        return self._running is None

    def wait(self) -> None:
        """Finish the save in progress, if any; raises the errors of `poll`."""
        while not self.poll():
            assert self._running is not None
            wait([self._running], _LOOK_AGAIN_SECONDS)

    def remove_older(self) -> None:
        """Keep `keep` checkpoints, also where a kill came after the last save and before it removed an older one."""
        assert self.saved_step is not None
        newest = self.saved_step
        self._together(partial(self._remove_older, newest), f"checkpoint-{newest} was saved")

    def _remove_older(self, newest: int) -> None:
        if self.ranks.rank != 0:
            return
        try:
            _remove_older(self.run, self.keep, newest)
        except OSError as error:  # the new checkpoint is complete
            logger.warning(
                "'%s': checkpoint-%d was saved, but an older checkpoint could not be removed: %s. The next save tries "
                "again.",
                *(self.run, newest, io_reason(error)),
            )

    def __enter__(self) -> CheckpointSaver:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close(error)

    def close(self, error: BaseException | None) -> None:
        """What leaving the context does, after `error` or without one."""
        if error is None:
            self.wait()
        elif isinstance(error, SRDEError):
            try:
                self.wait()
            except SaveFailed as failure:
                logger.warning("%s", failure)  # beside the error that ends the run
        elif self._running is not None:
            wait([self._running])

    def _together(self, work: Callable[[], Result], problem: str) -> Result:
        """The result of `work`, once it has succeeded on all ranks; otherwise SaveFailed on all, with the reason."""
        outcome = attempt(work, self.ranks)
        failure, error = outcome.failure, outcome.own.exception()
        if failure is None or (error is not None and not isinstance(error, SRDEError | OSError)):
            return outcome.own.result()
        if self.ranks.rank == 0:
            _clear_leftovers(self.run)
        standing = None
        with suppress(OSError):
            standing = read_latest(self.run)
        stays = f" '{standing}' stays the latest checkpoint." if standing else ""
        message = f"'{self.run}': {problem}: rank {failure.rank}: {failure.reason.rstrip('.')}.{stays}"
        raise SaveFailed(message, may_pass=failure.may_pass) if failure.foreseen else SRDEError(message)


class _HostCopies:
    """Copies of tensors in host memory, pinned for GPU tensors. Each save reuses the buffers of the last one."""

    def __init__(self) -> None:
        self._buffers: list[Tensor] = []

    def copy(self, content: _Content) -> _Content:
        sources = [part.data for part in content.slices] + list(content.common_tensors.values())
        if [_kind(buffer) for buffer in self._buffers] != [_kind(source) for source in sources]:
            self._buffers = []  # freed before the new ones are made
            self._buffers = [
                torch.empty(source.shape, dtype=source.dtype, pin_memory=source.is_cuda) for source in sources
            ]
        for buffer, source in zip(self._buffers, sources, strict=True):
            buffer.copy_(source.detach(), non_blocking=True)
        if any(source.is_cuda for source in sources):
            torch.cuda.current_stream().synchronize()
        data = iter(self._buffers)
        return _Content(
            [replace(part, data=next(data)) for part in content.slices],
            *copy.deepcopy((content.rank_state, content.run_state)),
            {name: next(data) for name in content.common_tensors},
        )


def _kind(tensor: Tensor) -> tuple[torch.Size, torch.dtype]:
    return tensor.shape, tensor.dtype


def _prepare(run: Path, name: str) -> None:
    run.mkdir(parents=True, exist_ok=True)
    sync(run.parent)
    _clear_leftovers(run)
    (run / f"{name}.tmp").mkdir()


def _write_files(partial: Path, rank: int, content: _Content) -> dict[str, FileRecord]:
    """Write this rank's files, and return the manifest's records of those that only rank 0 writes."""
    records: dict[str, FileRecord] = {}
    try:
        shard = write_shard(partial, rank, content.slices)
        # The shard's hash is in the rank's small file, so that no rank has to read another's gigabytes.
        write_json(partial / rank_name(rank), {"shard": shard, "state": dict(content.rank_state)})
        if rank == 0:
            records[RUN_STATE] = write_json(partial / RUN_STATE, content.run_state)
            records[COMMON] = write_tensors(partial / COMMON, content.common_tensors, {})
    except OSError:
        # At once, without waiting for the other ranks: on a full disk the run's other files need room.
        for name in (shard_name(rank), rank_name(rank)):
            with suppress(OSError):
                (partial / name).unlink()
        raise
    return records


def _publish(run: Path, name: str, step: int, world_size: int, records: Mapping[str, FileRecord]) -> None:
    """Give the finished `.tmp` folder its name, then move `latest`. A folder that has the name is renamed first."""
    partial, final = run / f"{name}.tmp", run / name
    every = dict(records)
    for rank in range(world_size):
        every |= _rank_records(partial, rank)
    ShardIndex(partial)  # refuses a checkpoint in which an element is missing or occurs twice
    write_manifest(partial, step, world_size, every)
    if final.exists():
        os.rename(final, run / f"{name}.old")
    os.rename(partial, final)
    sync(run)
    write_latest(run, name)


def _rank_records(folder: Path, rank: int) -> dict[str, FileRecord]:
    path, shard = folder / rank_name(rank), folder / shard_name(rank)
    if not path.exists() or not shard.exists():
        raise SRDEError(
            f"rank 0 does not see the files of rank {rank} in '{folder}': "
            "output_dir must be on storage that all nodes share"
        )
    record: FileRecord = read_json(path)["shard"]
    return {path.name: {"bytes": path.stat().st_size, "sha256": file_hash(path)}, shard.name: record}


def _clear_leftovers(run: Path) -> None:
    """Clean up after a kill: remove half-written folders, and give a folder that was renamed its name back.

    What cannot be removed now, such as an open file on NFS, is left to the next save, unless that needs its name.
    """
    for path in run.glob("checkpoint-*.old"):
        with suppress(OSError):
            if path.with_suffix("").exists():
                shutil.rmtree(path)
            else:
                os.rename(path, path.with_suffix(""))
    for path in run.glob("checkpoint-*.tmp"):
        with suppress(OSError):
            shutil.rmtree(path)


def _remove_older(run: Path, keep: int, newest: int) -> None:
    """Remove earlier checkpoints. Later ones stay: a run that went back replaces them when it reaches them again."""
    _clear_leftovers(run)  # removes the old folder of this name
    others = sorted((step, path) for step, path in saved_checkpoints(run) if step < newest)
    for _, path in others[: max(0, len(others) - (keep - 1))]:
        # Renamed first, so that a kill during the removal leaves no folder that looks like a checkpoint.
        partial = path.with_name(f"{path.name}.tmp")
        os.rename(path, partial)
        shutil.rmtree(partial)
