"""The files that a build's passes make, named by what they are made from, so that none is made twice.

An artifact is one file. Its name is a fingerprint of the code that makes it and of all inputs, among them the names of
artifacts that it depends on. A killed build finds its finished artifacts again, and a changed option changes only the
names of the artifacts that depend on it.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import multiprocessing
import os
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from srde_ds.errors import SRDEError
from srde_ds.utils.files import file_lock, replacement, write_text

Work = Callable[..., dict[str, Any]]
"""`work(path, **arguments)` writes the file `path` and returns figures that JSON can hold. A module-level function."""


@dataclass(frozen=True)
class Artifact:
    """A finished file."""

    path: Path
    key: str
    figures: dict[str, Any]


def fingerprint(*parts: Any) -> str:
    """A fingerprint, in 32 hex digits, of anything that JSON can hold."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]


@cache
def code_fingerprint(*modules: str) -> str:
    """The fingerprint of the modules' source, so that a new release does not use artifacts of an older one."""
    return fingerprint(*(inspect.getsource(sys.modules[name]) for name in modules))


def one_build(folder: Path, lock: Path) -> AbstractContextManager[None]:
    """Keep other builds out of `folder` while the block runs.

    Args:
        lock: a file that this build holds, outside of what it may remove.

    Raises:
        SRDEError: on entering, if another build holds it.
    """
    busy = f"'{folder}': another build is using this folder. Wait for it, or choose another folder."
    return file_lock(lock, busy)


class ArtifactStore:
    """The folder of artifacts, for one build at a time (see `one_build`), and the processes that make them."""

    def __init__(self, folder: Path, num_processes: int = 1, initialize: Callable[[], None] | None = None) -> None:
        self.folder = folder
        self.num_processes = num_processes
        self.wall_seconds: defaultdict[str, float] = defaultdict(float)
        self.cpu_seconds: defaultdict[str, float] = defaultdict(float)
        """both by pass; CPU time of all processes"""
        self.made: dict[str, int] = {}
        """number of new artifacts, by pass"""
        self._initialize = initialize
        self._pool: ProcessPoolExecutor | None = None

    def __enter__(self) -> ArtifactStore:
        self.folder.mkdir(parents=True, exist_ok=True)
        self._remove_unfinished()  # from a build that was killed
        if self._initialize:
            self._initialize()
        return self

    def __exit__(self, *_: object) -> None:
        if self._pool:
            self._pool.shutdown(cancel_futures=True)
            self._pool = None

    def run(self, name: str, work: Work, parts: Sequence[tuple[str, dict[str, Any]]]) -> list[Artifact]:
        """Make the artifacts of the pass `name` that do not exist yet, and return all of them in order.

        Args:
            parts: key and arguments of `work` for each artifact.

        Raises:
            SRDEError: from `work`, or because a process died.
        """
        started = time.perf_counter()
        paths = [self.folder / name / f"{key}.arrow" for key, _ in parts]
        missing = {path: arguments for path, (_, arguments) in zip(paths, parts, strict=True) if not _done(path)}
        self.made[name] = self.made.get(name, 0) + len(missing)
        (self.folder / name).mkdir(parents=True, exist_ok=True)
        if self.num_processes == 1 or len(missing) == 1:
            for path, arguments in missing.items():
                _make(work, path, arguments)
        elif missing:
            self._make_in_pool(work, missing)
        made = [Artifact(p, k, json.loads(_figures(p).read_text())) for p, (k, _) in zip(paths, parts, strict=True)]
        self.wall_seconds[name] += time.perf_counter() - started
        self.cpu_seconds[name] += sum(part.figures["cpu_seconds"] for part in made if part.path in missing)
        return made

    def _make_in_pool(self, work: Work, missing: dict[Path, dict[str, Any]]) -> None:
        if self._pool is None:
            self._pool = worker_pool(self.num_processes, self._initialize)
        futures = [self._pool.submit(_make, work, path, arguments) for path, arguments in missing.items()]
        try:
            for future in as_completed(futures):
                future.result()
        except BrokenProcessPool:
            # The pool has killed its other processes while they were writing.
            self._pool.shutdown()
            self._pool = None
            self._remove_unfinished()
            raise process_died(self.num_processes) from None
        finally:
            for future in futures:
                future.cancel()

    def _remove_unfinished(self) -> None:
        for half in self.folder.rglob("*.tmp"):
            half.unlink()

    @contextmanager
    def timed(self, name: str) -> Iterator[None]:
        """Add the block's time to that of the pass `name`."""
        wall, cpu = time.perf_counter(), time.process_time()
        try:
            yield
        finally:
            self.wall_seconds[name] += time.perf_counter() - wall
            self.cpu_seconds[name] += time.process_time() - cpu


def worker_pool(num_processes: int, initialize: Callable[[], None] | None) -> ProcessPoolExecutor:
    """A pool of processes that end with this process, however it ends."""
    return ProcessPoolExecutor(num_processes, multiprocessing.get_context("spawn"), _start_worker, (initialize,))


def process_died(num_processes: int) -> SRDEError:
    """The error to raise in place of BrokenProcessPool."""
    return SRDEError(
        f"num_processes={num_processes}: a process was killed, most likely for lack of memory: lower it, start again."
    )


def slices(count: int, size: int) -> Iterable[tuple[int, int]]:
    """The ranges [0, size), [size, 2 size), ... up to `count`."""
    return ((start, min(start + size, count)) for start in range(0, count, size))


def _figures(path: Path) -> Path:
    return path.with_suffix(".json")


def _done(path: Path) -> bool:
    # The figures are written last. After a power cut, either file may be empty.
    try:
        return bool(path.stat().st_size == json.loads(_figures(path).read_text())["file_bytes"])
    except (FileNotFoundError, ValueError, KeyError):
        return False


def _make(work: Work, path: Path, arguments: dict[str, Any]) -> None:
    started = time.process_time()
    with replacement(path, many_writers=True) as half:
        figures = work(half, **arguments) | {"file_bytes": half.stat().st_size}
    figures["cpu_seconds"] = time.process_time() - started
    write_text(_figures(path), json.dumps(figures), many_writers=True)


def _start_worker(initialize: Callable[[], None] | None) -> None:
    # A build that is killed cannot stop its processes, so they stop themselves.
    parent = multiprocessing.parent_process()
    assert parent is not None
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()
    os.environ.update(TOKENIZERS_PARALLELISM="false", RAYON_NUM_THREADS="1")  # the processes are the parallelism
    if initialize:
        initialize()


def _end_with(process: multiprocessing.process.BaseProcess) -> None:
    process.join()
    os._exit(1)
