"""Writes files and folders whole or not at all."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import logging
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import IO, TypeVar

from srde_ds.errors import SRDEError

log = logging.getLogger(__name__)

Result = TypeVar("Result")

# What is wrong with a disk's room, permissions or a path's name stays wrong until somebody repairs it.
LASTING_FAULTS = {
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EROFS,
    errno.EACCES,
    errno.EPERM,
    errno.ENAMETOOLONG,
    errno.ELOOP,
}

# A folder that others may only pass through (mode 711), and what SMB and some FUSE answer to a flush of a folder.
_NO_FOLDER_FLUSH = {errno.EACCES, errno.EINVAL, errno.ENOTSUP, errno.EBADF}


@contextmanager
def replacement(
    target: Path, *, durable: bool = False, many_writers: bool = False, overwrite: bool = False
) -> Iterator[Path]:
    """A context with a path beside `target` to write a file or a folder to.

    What was written gets the name `target` when the block ends, and is removed if the block raises. A kill leaves
    either the old file or the new one. A file is replaced; a folder must not exist yet, except with `overwrite`.

    Args:
        durable: also after a power cut, the old file or the new one is there. The block must fsync files in a folder.
        many_writers: several processes may write `target` at the same time; the last one wins.
        overwrite: replace a folder too. A kill in between may leave neither the old one nor the new one.
    """
    own = f".{os.getpid()}" if many_writers else ""
    partial = target.with_name(f"{target.name}{own}.tmp")
    try:
        remove(partial)  # left by a kill
        yield partial
        if durable:
            sync(partial)
        if overwrite:
            remove(target)
        os.replace(partial, target)
        if durable:
            sync(target.parent)
    finally:
        remove(partial)


@contextmanager
def output(target: Path) -> Iterator[Path]:
    """`replacement` for a file that the user named. It follows links, keeps a file's permissions, and leaves a
    `target.tmp` of the user's alone; pipes and devices, such as /dev/stdout, are written directly."""
    if _is_device(target) or _is_device(target := target.resolve()):
        yield target
        return
    with replacement(target, many_writers=True) as partial:
        yield partial
        if target.is_file():
            shutil.copymode(target, partial)


def _is_device(path: Path) -> bool:
    folder = path.parent.resolve()
    return folder == Path("/dev") or folder.is_relative_to("/proc") or path.is_fifo()


@contextmanager
def new_files(folder: Path) -> Iterator[Path]:
    """A context with an empty folder, whose files move to `folder` when the block ends, and vanish if it raises."""
    with TemporaryDirectory(prefix=".", suffix=".tmp", dir=folder) as partial:
        yield Path(partial)
        for path in Path(partial).iterdir():
            os.replace(path, folder / path.name)


@contextmanager
def scratch_folder(path: Path) -> Iterator[Path]:
    """An empty folder that exists while the block runs."""
    remove(path)
    path.mkdir()
    try:
        yield path
    finally:
        remove(path)


@contextmanager
def file_lock(path: Path, busy: str) -> Iterator[None]:
    """Hold the file `path`, which exists only while the block runs. Parent folders made for it are removed if they are
    empty.

    Some storage (Lustre, FUSE, NFS) may know no locks: then nothing is held, and a line says so.

    Raises:
        SRDEError: somebody else holds it; the message is `busy`.
    """
    made = [parent for parent in path.parents if not parent.exists()]
    try:
        if made:
            path.parent.mkdir(parents=True, exist_ok=True)
        while not _is_same(file := _locked(path, busy), path):  # its holder has removed it in between
            file.close()
        try:
            yield
        finally:
            path.unlink(missing_ok=True)
            file.close()
    finally:
        for parent in made:
            with suppress(OSError):  # not empty: it holds the result
                parent.rmdir()


def _locked(path: Path, busy: str) -> IO[bytes]:
    file = path.open("ab")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        raise SRDEError(busy) from None
    except OSError as error:
        told = "%s: this storage has no file locks (%s). Let only one process at a time write here."
        log.warning(told, path.parent, error.strerror)
    return file


def _is_same(file: IO[bytes], path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False


def write_text(target: Path, text: str, *, durable: bool = False, many_writers: bool = False) -> None:
    """Write a UTF-8 text file; for the arguments see `replacement`."""
    with replacement(target, durable=durable, many_writers=many_writers) as partial:
        partial.write_text(text, encoding="utf-8")


def file_hash(path: Path) -> str:
    """SHA-256 of a file's bytes, hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def check_ordinary(path: Path, place: str, remedy: str) -> None:
    """Refuse folders, pipes and devices: some would block whoever reads them, or never end.

    Args:
        place: the beginning of the error message, such as "hostfile=hosts".
        remedy: its end, without the full stop.
    """
    if path.exists() and not path.is_file():
        raise SRDEError(f"{place}: not an ordinary file: {remedy}.")


def eventually(read: Callable[[], Result], missing: type[Exception], seconds: float) -> Result:
    """The result of `read`, which another host has made possible: network storage may show new files with some delay.

    Args:
        missing: what `read` raises until then; the last one is raised after `seconds`.
    """
    deadline = time.monotonic() + seconds
    while True:
        try:
            return read()
        except missing:
            if time.monotonic() > deadline:
                raise
        time.sleep(0.1)


def sync(path: Path) -> None:
    """Flush a file's content, or the names in a folder, to disk, so that they survive a power cut.

    A folder that this user may not list, or that its storage cannot flush, is left to the storage, as databases do.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:
        if error.errno not in _NO_FOLDER_FLUSH or not path.is_dir():
            raise


def remove(path: Path) -> None:
    """Remove a file, or a folder with its content, if it exists."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def may_pass(error: OSError) -> bool:
    """Whether the same may succeed later, as when a file server is out of reach for a while."""
    return error.errno not in LASTING_FAULTS


def io_reason(error: OSError) -> str:
    """The fault and the file, for a one-line message."""
    return (error.strerror or str(error) or type(error).__name__) + (f" ({error.filename})" if error.filename else "")
