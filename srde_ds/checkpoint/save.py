"""Writing checkpoints: a folder appears complete or not at all (docs/checkpoints.md).

No torch.distributed here: the caller passes the two collectives. Threads only write files. What the ranks must agree
on, they agree on in the calling thread, so that it never runs beside the collectives of training.
"""

from __future__ import annotations

import copy
import logging
import os
import shutil
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from srde_ds.checkpoint.layout import (
    COMMON,
    RUN_STATE,
    file_hash,
    rank_name,
    read_json,
    saved_checkpoints,
    write_json,
    write_latest,
    write_manifest,
)
from srde_ds.checkpoint.shards import FileRecord, ShardIndex, shard_name, write_shard, write_tensors
from srde_ds.distributed.tensor_shard import TensorPiece
from srde_ds.errors import SRDEError
from srde_ds.utils.files import io_reason, sync
from srde_ds.weights.locate import read_latest

logger = logging.getLogger(__name__)

# What a rank says of its part of a phase; the largest counts. One that fails waits for those that still write.
_DONE, _FAILED, _RUNNING = 0, 1, 2
# Waiting ranks look again so often that no collective of theirs comes near its timeout.
_LOOK_AGAIN_SECONDS = 0.1


class SaveFailed(SRDEError):
    """A checkpoint could not be written; the former ones stand. Raised on all ranks alike."""


class Collectives(NamedTuple):
    """This rank among those that save together.

    Attributes:
        all_reduce_max: the largest of the ranks' integers.
        gather: every rank's (small) object, by rank.
    """

    rank: int
    world_size: int
    all_reduce_max: Callable[[int], int]
    gather: Callable[[Any], list[Any]]


class _Phase(NamedTuple):
    """A part of a save that all ranks must have done before the next one begins."""

    work: Callable[[], None]
    problem: str
    saved_step: int | None
    """what is saved once the phase is done"""


class CheckpointSaver:
    """Writes checkpoints in a thread of each rank, one at a time.

    Every rank calls `start`, `poll`, `wait` at the same place. As a context manager it finishes the save in flight at
    the block's end and after an SRDEError, which ranks raise together; after any other exception, with which the other
    ranks may not be here, only this rank's thread is awaited and the checkpoint stays half-written.

    Args:
        output_dir: the run's folder, on a file system that all ranks see.
        keep: checkpoints to keep.

    Attributes:
        saved_step: of the last checkpoint that is complete; the caller may set it after resuming.
    """

    def __init__(self, output_dir: str | Path, collectives: Collectives, *, keep: int) -> None:
        self.run, self.collectives, self.keep = Path(output_dir), collectives, keep
        self.saved_step: int | None = None
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._phases: deque[_Phase] = deque()
        self._running: Future[None] | None = None
        self._host = _HostCopies()

    def start(
        self,
        step: int,
        *,
        pieces: Sequence[TensorPiece],
        rank_state: Mapping[str, Any],
        run_state: Mapping[str, Any],
        common_tensors: Mapping[str, Tensor],
        copy_first: bool = True,
    ) -> None:
        """Begin to write `checkpoint-<step>`, after the save in flight, if any, is done.

        Args:
            pieces: this rank's runs; over all ranks each element of each tensor exactly once.
            rank_state: JSON-able state of this rank (random number generators).
            run_state: JSON-able state of the run, written by rank 0 (config, data position, adapter metadata, ...).
            common_tensors: tensors that all ranks share (supports, ...), written by rank 0.
            copy_first: return when everything is copied to host memory; otherwise nothing given may change before
                `wait` returns.

        Raises:
            SaveFailed: this or the former checkpoint cannot be written.
        """
        self.wait()
        rank, run, name = self.collectives.rank, self.run, f"checkpoint-{step}"
        problem = f"{name} was not saved"
        with self._together(problem):
            if rank == 0:
                _prepare(run, name)
            else:
                common_tensors = {}
            if copy_first:
                pieces, common_tensors = self._host.copies(pieces, common_tensors)
                rank_state, run_state = copy.deepcopy((rank_state, run_state))

        records: dict[str, FileRecord] = {}

        def write() -> None:
            records.update(_write_files(run / f"{name}.tmp", rank, pieces, rank_state, run_state, common_tensors))

        def publish() -> None:
            if rank == 0:
                _publish(run, name, step, self.collectives.world_size, records)

        def remove_older() -> None:
            if rank == 0:
                _remove_older(run, self.keep, newest=name)

        older = f"{name} was saved, but an older checkpoint could not be removed"
        self._phases.extend(
            [_Phase(write, problem, None), _Phase(publish, problem, step), _Phase(remove_older, older, None)]
        )
        self._running = self._thread.submit(write)

    def poll(self) -> bool:
        """Whether nothing is in flight any more. One small collective while something is; without waiting for files.

        Raises:
            SaveFailed: on every rank, if any rank failed, with that rank's reason. Until `latest` is moved, the
                previous checkpoint stands untouched.
        """
        if self._running is None:
            return True
        running = self._running
        state = _RUNNING if not running.done() else _FAILED if running.exception() else _DONE
        state = self.collectives.all_reduce_max(state)
        if state == _RUNNING:
            return False
        phase, self._running = self._phases.popleft(), None
        if state == _FAILED:
            self._phases.clear()
            with self._together(phase.problem):
                running.result()
        if phase.saved_step is not None:
            self.saved_step = phase.saved_step
        if self._phases:
            self._running = self._thread.submit(self._phases[0].work)
        return self._running is None

    def wait(self) -> None:
        """Finish the save in flight, if any; errors as `poll`."""
        while not self.poll():
            assert self._running is not None
            wait([self._running], _LOOK_AGAIN_SECONDS)

    def __enter__(self) -> CheckpointSaver:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if error is None:
            self.wait()
        elif isinstance(error, SRDEError):
            try:
                self.wait()
            except SaveFailed as failure:
                logger.warning("%s", failure)  # beside the error that ends the run
        elif self._running is not None:
            wait([self._running])

    @contextmanager
    def _together(self, problem: str) -> Iterator[None]:
        """Run the block on all ranks: it succeeds on all, or raises on all, with the first failing rank's reason."""
        rank = self.collectives.rank
        foreseen, reason = False, "an unforeseen error, see its traceback"
        try:
            yield
            foreseen, reason = True, ""
        except SRDEError as error:
            foreseen, reason = True, str(error)
        except OSError as error:
            foreseen, reason = True, io_reason(error)
        finally:  # also on the way out of an unforeseen exception: no rank may wait for this one
            reports: list[tuple[bool, str]] = self.collectives.gather((foreseen, reason))
        failures = [(number, why) for number, (_, why) in enumerate(reports) if why]
        if not failures:
            return
        if rank == 0:
            with suppress(OSError):  # what cannot be removed now is removed by the next save
                _clear_leftovers(self.run)
        standing = None
        with suppress(OSError):
            standing = read_latest(self.run)
        stays = f" '{standing}' stays the latest checkpoint." if standing else ""
        number, why = failures[0]
        message = f"'{self.run}': {problem}: rank {number}: {why.rstrip('.')}.{stays}"
        raise SaveFailed(message) if all(known for known, _ in reports) else SRDEError(message)


class _HostCopies:
    """Tensors in host memory, pinned for those of a GPU; the next save's go where the last one's were."""

    def __init__(self) -> None:
        self._buffers: list[Tensor] = []

    def copies(
        self, pieces: Sequence[TensorPiece], tensors: Mapping[str, Tensor]
    ) -> tuple[list[TensorPiece], dict[str, Tensor]]:
        sources = [piece.data for piece in pieces] + list(tensors.values())
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
        return [replace(piece, data=next(data)) for piece in pieces], {name: next(data) for name in tensors}


def _kind(tensor: Tensor) -> tuple[torch.Size, torch.dtype]:
    return tensor.shape, tensor.dtype


def _prepare(run: Path, name: str) -> None:
    run.mkdir(parents=True, exist_ok=True)
    sync(run.parent)
    _clear_leftovers(run)
    (run / f"{name}.tmp").mkdir()


def _write_files(
    partial: Path,
    rank: int,
    pieces: Sequence[TensorPiece],
    rank_state: Mapping[str, Any],
    run_state: Mapping[str, Any],
    common_tensors: Mapping[str, Tensor],
) -> dict[str, FileRecord]:
    """Write this rank's files, and return what the manifest says of those that only rank 0 writes."""
    records: dict[str, FileRecord] = {}
    try:
        shard = write_shard(partial, rank, pieces)
        # The shard's hash travels in the rank's small file: no rank reads another's gigabytes.
        write_json(partial / rank_name(rank), {"shard": shard, "state": dict(rank_state)})
        if rank == 0:
            records[RUN_STATE] = write_json(partial / RUN_STATE, run_state)
            records[COMMON] = write_tensors(partial / COMMON, common_tensors, {})
    except OSError:
        # At once, not when the ranks have agreed: what else the run writes needs room on a full disk.
        for name in (shard_name(rank), rank_name(rank)):
            with suppress(OSError):
                (partial / name).unlink()
        raise
    return records


def _publish(run: Path, name: str, step: int, world_size: int, records: Mapping[str, FileRecord]) -> None:
    """Give the finished `.tmp` folder its name, then move `latest`. An existing one of that name steps aside first."""
    partial, final = run / f"{name}.tmp", run / name
    every = dict(records)
    for rank in range(world_size):
        every |= _rank_records(partial, rank)
    ShardIndex(partial)  # every element is there once, or the checkpoint is not worth its name
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
    """Undo what a kill left behind: half-written folders go, a folder that had stepped aside comes back."""
    for path in run.glob("checkpoint-*.old"):
        if path.with_suffix("").exists():
            shutil.rmtree(path)
        else:
            os.rename(path, path.with_suffix(""))
    for path in run.glob("checkpoint-*.tmp"):
        shutil.rmtree(path)


def _remove_older(run: Path, keep: int, newest: str) -> None:
    _clear_leftovers(run)  # the former folder of this name
    others = sorted((time, path) for time, path in saved_checkpoints(run) if path.name != newest)
    for _, path in others[: max(0, len(others) - (keep - 1))]:
        # Renamed first: a kill while its files go leaves no checkpoint that only looks like one.
        partial = path.with_name(f"{path.name}.tmp")
        os.rename(path, partial)
        shutil.rmtree(partial)
