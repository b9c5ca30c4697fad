"""Files of prompts."""

from __future__ import annotations

import json
from pathlib import Path

from srde_ds.data.conversation import Message, Tools
from srde_ds.data.records import parse_prompt
from srde_ds.errors import SRDEError

Prompt = tuple[str, list[Message], Tools | None]
"""Place (file:line), conversation, and descriptions of the functions that the answer may call"""


def read_prompts(path: str | Path) -> list[Prompt]:
    """The prompts of a `.jsonl` file, see `parse_prompt`, or of another file, each line one. Empty lines are left out.

    Raises:
        SRDEError: no such file, no prompt in it, or a line that is not understood.
    """
    path = Path(path)
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise SRDEError(f"prompts_file='{path}': cannot be read ({error}). Give a text or JSONL file.") from None
    prompts = []
    for number, line in enumerate(lines, start=1):
        place = f"{path}:{number}"
        if line.strip():
            values = _object(line, place) if path.suffix.lower() == ".jsonl" else {"prompt": line.strip()}
            prompts.append((place, *parse_prompt(values, place)))
    if not prompts:
        raise SRDEError(f"prompts_file='{path}': holds no prompt; give one a line.")
    return prompts


def _object(line: str, place: str) -> object:
    try:
        return json.loads(line)
    except ValueError as error:
        raise SRDEError(f"{place}: not valid JSON ({error}).") from None
