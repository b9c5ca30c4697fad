"""Files of prompts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from srde_ds.errors import SRDEError


def read_prompts(path: str | Path) -> list[tuple[str, list[dict[str, str]]]]:
    """Place (file:line) and conversation of each prompt: of a `.jsonl` file `prompt` or `messages` (of these those
    before the last answer) in each object, of another file each line. Empty lines are left out.

    Raises:
        SRDEError: no such file, no prompt in it, or a line that is not understood.
    """
    path = Path(path)
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise SRDEError(f"prompts_file='{path}': cannot be read ({error}). Give a text or JSONL file.") from None
    prompts = []
    for number, line in enumerate(lines, start=1):
        place = f"{path}:{number}"
        if line.strip():
            messages = _messages(line, place) if path.suffix == ".jsonl" else _user(line.strip())
            prompts.append((place, messages))
    if not prompts:
        raise SRDEError(f"prompts_file='{path}': holds no prompt; give one a line.")
    return prompts


def _user(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


def _messages(line: str, place: str) -> list[dict[str, str]]:
    try:
        item = json.loads(line)
    except ValueError as error:
        raise SRDEError(f"{place}: not valid JSON ({error}).") from None
    if isinstance(item, dict) and isinstance(item.get("prompt"), str) and item["prompt"].strip():
        return _user(item["prompt"])
    messages = item.get("messages") if isinstance(item, dict) else None
    if not isinstance(messages, list) or not all(_is_message(message) for message in messages):
        raise SRDEError(f"{place}: needs 'prompt' (a text) or 'messages' (a list of role and content).")
    while messages and messages[-1]["role"] == "assistant":
        messages = messages[:-1]
    if not messages:
        raise SRDEError(f"{place}: 'messages' ask nothing: there is none before the answer.")
    return [{"role": message["role"], "content": message["content"]} for message in messages]


def _is_message(message: Any) -> bool:
    return isinstance(message, dict) and all(isinstance(message.get(key), str) for key in ("role", "content"))
