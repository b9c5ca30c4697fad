"""`run.lock` in a run's folder lets only one training at a time write there."""

from __future__ import annotations

import fcntl
import json
import logging
import os
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from srde_ds.errors import SRDEError
from srde_ds.liveness.launcher_watch import start_time
from srde_ds.utils.files import check_ordinary, write_text

logger = logging.getLogger(__name__)

FILE = "run.lock"
TOUCH_SECONDS = 10.0
# If another host does not touch its lock for so long, its process was killed. No clocks are compared.
STALE_SECONDS = 60.0
_LOOK_SECONDS = 1.0
_MAX_BYTES = 2**12
_held: set[Path] = set()
"""locks of this process"""


@contextmanager
def run_lock(output_dir: str | Path) -> Iterator[None]:
    """Hold the folder until the block ends; create it if it does not exist. Only rank 0 calls this.

    A lock whose process is gone is taken over. A lock of another host is watched until it is touched, for
    STALE_SECONDS at most.

    Raises:
        SRDEError: another training is using the folder.
    """
    folder = Path(output_dir)
    made = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / FILE
    done = threading.Event()
    try:
        own = _take(path)
        _held.add(path.resolve())
        threading.Thread(target=_keep_touching, args=(path, own, done), name="run lock", daemon=True).start()
        try:
            yield
        finally:
            done.set()
            _held.discard(path.resolve())
            # If storage fails here, the next run takes the lock over, since this process is gone.
            with suppress(OSError, SRDEError):
                if _read(path) == own:
                    path.unlink(missing_ok=True)
    finally:
        if made:
            with suppress(OSError):  # it holds what the run has written
                folder.rmdir()


def refuse_living_run(output_dir: str | Path) -> None:
    """Refuse a folder that a process of this host is training in, without waiting or writing anything.

    Raises:
        SRDEError: there is such a process; the message names it.
    """
    owner = _read(Path(output_dir) / FILE)
    if owner and _is_here(owner) and _is_alive(owner, Path(output_dir) / FILE):
        raise _refusal(Path(output_dir), owner)


def held_since(output_dir: str | Path, now: float) -> float | None:
    """When the training that uses the folder began; None: there is none, or it was killed.

    Args:
        now, and the result: seconds since the epoch. Unlike a training, its watcher may go by clocks.
    """
    path = Path(output_dir) / FILE
    owner: dict[str, Any] = {}
    with suppress(SRDEError):
        owner = _read(path)
    since, touched = owner.get("time"), _touched(path) if owner else None
    if not isinstance(since, float) or touched is None:
        return None
    alive = _is_alive(owner, path) if _is_here(owner) else now - touched / 1e9 < STALE_SECONDS
    return since if alive else None


def _take(path: Path) -> dict[str, Any]:
    """Write the lock, and give its content.

    Raises:
        SRDEError: it belongs to a living training.
    """
    own: dict[str, Any]
    own = {"host": socket.gethostname(), "pid": os.getpid(), "started": start_time(os.getpid()), "machine": _machine()}
    own["time"] = time.time()
    with _one_at_a_time(path.parent):
        if path.exists():
            _refuse_unless_stale(path)
            path.unlink(missing_ok=True)
        try:
            write_text(path, json.dumps(own))
        except OSError:
            path.unlink(missing_ok=True)
            raise
    return own


def _refuse_unless_stale(path: Path) -> None:
    owner = _read(path)
    if not (owner and _is_here(owner)):
        name = owner.get("host", "a host that it does not name")
        logger.info("%s belongs to %s: waiting up to %.0f s to see whether it is alive.", path, name, STALE_SECONDS)
        if _is_touched(path):
            raise _refusal(path.parent, owner)
    elif _is_alive(owner, path):
        raise _refusal(path.parent, owner)


@contextmanager
def _one_at_a_time(folder: Path) -> Iterator[None]:
    """Let processes that try to take the lock at the same moment go one by one, if the storage knows file locks."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _is_touched(path: Path) -> bool:
    """Whether the lock is touched within STALE_SECONDS; False as soon as it is gone."""
    deadline, first = time.monotonic() + STALE_SECONDS, _touched(path)
    while first is not None and time.monotonic() < deadline:
        time.sleep(_LOOK_SECONDS)
        if (now := _touched(path)) != first:
            return now is not None
    return False


def _touched(path: Path) -> int | None:
    try:
        with open(path, "rb") as file:  # opening it makes network storage ask its server
            return os.fstat(file.fileno()).st_mtime_ns
    except FileNotFoundError:
        return None


def _keep_touching(path: Path, own: dict[str, Any], done: threading.Event) -> None:
    """Touch the lock until `done`. A process that was stopped for long may find it taken over when it wakes up."""
    while not done.wait(TOUCH_SECONDS):
        with suppress(OSError, SRDEError):  # storage may answer again later
            if (owner := _read(path)) not in ({}, own):
                logger.critical(
                    "%s now belongs to process %s of %s, since this one gave no sign of life for %.0f s. It ends, and "
                    "saves nothing.",
                    path,
                    owner.get("pid"),
                    owner.get("host"),
                    STALE_SECONDS,
                )
                os._exit(1)
            os.utime(path)


def _read(path: Path) -> dict[str, Any]:
    """The content of a lock; empty if there is none, or it is not written yet.

    Raises:
        SRDEError: it is a folder, a pipe or a device.
    """
    try:
        check_ordinary(path, f"'{path}'", "remove it to train there")
        with open(path, encoding="utf-8") as file:
            content = json.loads(file.read(_MAX_BYTES))
    except (OSError, ValueError, RecursionError):
        return {}
    named = isinstance(content, dict) and isinstance(content.get("pid"), int)
    return content if named else {}


def _is_here(owner: dict[str, Any]) -> bool:
    return bool(owner.get("machine") == _machine())


def _is_alive(owner: dict[str, Any], path: Path) -> bool:
    if owner["pid"] == os.getpid() and path.resolve() not in _held:
        return False  # failed storage kept this process from removing it
    started = start_time(owner["pid"])
    return started is not None and started == owner.get("started")


def _machine() -> str:
    """Identifies this boot of this machine and the process namespace: containers number processes by themselves."""
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip() + " " + os.readlink("/proc/self/ns/pid")


def _refusal(folder: Path, owner: dict[str, Any]) -> SRDEError:
    who = f"process {owner['pid']} of host {owner.get('host')}" if owner else "another process"
    remedy = "Wait for it or stop it, or choose another --output_dir"
    return SRDEError(f"output_dir={folder}: {who} is training there ({FILE}). {remedy}.")
