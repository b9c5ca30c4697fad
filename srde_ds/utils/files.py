"""Files and folders that are there whole or not at all."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


@contextmanager
def replacement(target: Path, *, durable: bool = False, many_writers: bool = False) -> Iterator[Path]:
    """A path beside `target` to write a file or a folder to.

    It takes the name `target` when the block ends, and is removed when the block raises, so that a kill leaves the old
    file or the new one. A file is replaced; a folder must not be there yet.

    Args:
        durable: also a power cut leaves the old file or the new one. The files in a folder are the block's to fsync.
        many_writers: several processes may write `target` at the same time; the last one wins.
    """
    own = f".{os.getpid()}" if many_writers else ""
    partial = target.with_name(f"{target.name}{own}.tmp")
    try:
        remove(partial)  # what a kill left
        yield partial
        if durable:
            sync(partial)
        os.replace(partial, target)
        if durable:
            sync(target.parent)
    finally:
        remove(partial)


@contextmanager
def scratch_folder(path: Path) -> Iterator[Path]:
    """An empty folder for as long as the block runs. Folders made above it go too, if they are empty then."""
    remove(path)
    made = [parent for parent in path.parents if not parent.exists()]
    path.mkdir(parents=True)
    try:
        yield path
    finally:
        remove(path)
        for parent in made:
            with suppress(OSError):  # it holds the result
                parent.rmdir()


def write_text(target: Path, text: str, *, durable: bool = False, many_writers: bool = False) -> None:
    """Write a text file in UTF-8 as `replacement` says."""
    with replacement(target, durable=durable, many_writers=many_writers) as partial:
        partial.write_text(text, encoding="utf-8")


def sync(path: Path) -> None:
    """Make a file's content, or the names in a folder, survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove(path: Path) -> None:
    """Remove a file or a folder with all that is in it, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def io_reason(error: OSError) -> str:
    """What went wrong and with which file, for a message of one line."""
    return f"{error.strerror or error}" + (f" ({error.filename})" if error.filename else "")
