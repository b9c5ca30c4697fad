"""Files of results: checked before the work starts, and written whole or not at all."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

from srde_ds.errors import SRDEError
from srde_ds.utils.files import output


def check_output(path: Path) -> None:
    """Raise an SRDEError if no file can be made at `path`. Folders may be missing, since `write_lines` makes them."""
    if path.is_dir():
        raise SRDEError(f"output_file={path}: it is a folder. Give a file's name.")
    there = next(parent for parent in path.absolute().parents if parent.exists())
    if not there.is_dir() or not os.access(there, os.W_OK):
        reason = "not writable" if there.is_dir() else "not a folder"
        raise SRDEError(f"output_file={path}: '{there}' is {reason}. Give another --output_file.")


def write_lines(path: Path, lines: Iterable[str]) -> None:
    """Write a text file; a crash leaves the old one or the new one.

    Raises:
        SRDEError: it cannot be written; then no part of it is left.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with output(path) as partial, partial.open("w", encoding="utf-8") as file:
            file.writelines(f"{line}\n" for line in lines)
    except OSError as error:
        raise SRDEError(f"output_file={path}: cannot be written: {error.strerror}.") from None
