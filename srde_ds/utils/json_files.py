"""Reads files of JSON; one line for what cannot be read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from srde_ds.errors import SRDEError
from srde_ds.utils.files import check_ordinary


def read_json(path: Path, remedy: str) -> dict[str, Any]:
    """The object in a file.

    Raises:
        SRDEError: there is none; the message names the remedy.
    """
    return parsed_object(path, _text(path, remedy), "it", remedy)


def read_lines(path: Path, remedy: str) -> list[dict[str, Any]]:
    """The objects in a file of lines. Only a line feed ends a line, since texts may contain other separators.

    Raises:
        SRDEError: there are none; the message names the remedy.
    """
    return _objects(path, _text(path, remedy).split("\n"), remedy)


def read_growing_lines(path: Path, remedy: str) -> list[dict[str, Any]]:
    """As `read_lines`, of a file whose last line a kill may have cut; it is left out then."""
    lines = _bytes(path, remedy).splitlines(keepends=True)
    if lines and is_torn(lines[-1]):
        lines.pop()
    return _objects(path, [line.decode(errors="replace") for line in lines], remedy)


def is_torn(line: bytes) -> bool:
    """Whether a kill has cut the last line of a file: it has no line feed, and is not JSON."""
    if line.endswith(b"\n"):
        return False
    try:
        json.loads(line)
    except (ValueError, RecursionError):
        return True
    return False


def parsed_object(path: Path, text: str, what: str, remedy: str) -> dict[str, Any]:
    """The JSON object that a text of this file holds.

    Raises:
        SRDEError: it holds none; the message names `what` and the remedy.
    """
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise SRDEError(f"'{path}': not valid JSON ({error}): {remedy}.") from None
    if not isinstance(content, dict):
        raise SRDEError(f"'{path}': {what} must hold a JSON object; {remedy}.")
    return content


def _objects(path: Path, lines: list[str], remedy: str) -> list[dict[str, Any]]:
    found = [parsed_object(path, line, "each line", remedy) for line in lines if line.strip()]
    if not found:
        raise SRDEError(f"'{path}' is empty: {remedy}.")
    return found


def _text(path: Path, remedy: str) -> str:
    try:
        return _bytes(path, remedy).decode()
    except UnicodeDecodeError as error:
        raise SRDEError(f"'{path}': not UTF-8 ({error.reason} at byte {error.start}): {remedy}.") from None


def _bytes(path: Path, remedy: str) -> bytes:
    check_ordinary(path, f"'{path}'", remedy)
    try:
        return path.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        raise SRDEError(f"no such file '{path}': {remedy}.") from None
