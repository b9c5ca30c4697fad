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


def read_lines(path: Path, remedy: str, *, whole: bool = True) -> list[dict[str, Any]]:
    """The objects in a file of lines. Only a line feed ends a line, since texts may contain other separators.

    Args:
        whole: whether the last line must be complete; otherwise one that a kill has cut is left out.

    Raises:
        SRDEError: there are none; the message names the remedy.
    """
    lines = [line for line in _text(path, remedy).split("\n") if line.strip()]
    if lines and not whole and not lines[-1].endswith("}"):
        lines.pop()
    if not lines:
        raise SRDEError(f"'{path}' is empty: {remedy}.")
    return [parsed_object(path, line, "each line", remedy) for line in lines]


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


def _text(path: Path, remedy: str) -> str:
    check_ordinary(path, f"'{path}'", remedy)
    try:
        return path.read_text(encoding="utf-8")
    except (FileNotFoundError, NotADirectoryError):
        raise SRDEError(f"no such file '{path}': {remedy}.") from None
    except UnicodeDecodeError as error:
        raise SRDEError(f"'{path}': not UTF-8 ({error.reason} at byte {error.start}): {remedy}.") from None
