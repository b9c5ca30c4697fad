"""Read training and held-out records from JSONL, one checked record a line."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from srde_ds.errors import SRDEError, nearest

ROLES = ("system", "user", "assistant")
SPLITS = ("train", "validation", "test")


@dataclass(frozen=True)
class Record:
    """One document: a conversation that ends with the assistant, and the domain it belongs to."""

    domain: str
    messages: list[dict[str, str]]
    answer: str | None
    source: str
    where: str = ""
    """`file:line`, for error messages."""
    split: str = "train"
    choices: list[str] | None = None
    """Of a multiple-choice item: the texts to choose from; `answer` is one of them."""
    tests: str | None = None
    """Of a programming item: Python that fails unless the program before it is right."""

    @property
    def prompt(self) -> list[dict[str, str]]:
        """Everything before the last response."""
        return self.messages[:-1]


def read_jsonl(path: str | Path, domains: Sequence[str]) -> Iterator[Record]:
    """The records of a JSONL file. Blank lines are skipped, unknown keys ignored, `null` counts as absent.

    Raises:
        SRDEError: a missing or empty file, or a bad line, named as `file:line`.
    """
    path = Path(path)
    found = False
    try:
        with path.open("rb") as lines:
            for number, line in enumerate(lines, 1):
                if line.strip():
                    found = True
                    yield _parse(line, f"{path}:{number}", domains)
    except FileNotFoundError:
        raise SRDEError(f"no such file '{path}': give an existing JSONL file.") from None
    except OSError as error:
        raise SRDEError(f"'{path}' cannot be read: {error.strerror}.") from None
    if not found:
        raise SRDEError(f"'{path}' is empty: it must hold one JSON object a line.")


def _parse(line: bytes, where: str, domains: Sequence[str]) -> Record:
    try:
        content = json.loads(line.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise SRDEError(f"{where}: not valid JSON in UTF-8 ({error}).") from None
    if not isinstance(content, dict):
        raise SRDEError(f"{where}: must be a JSON object, not {_kind(content)}.")
    fields = {key: value for key, value in content.items() if value is not None}
    domain = _text(fields, "domain", where)
    if domain not in domains:
        raise SRDEError(
            f"{where}: unknown domain '{domain}', must be one of {', '.join(domains)}.{nearest(domain, domains)}"
        )
    if "messages" in fields and ("prompt" in fields or "response" in fields):
        raise SRDEError(f"{where}: has both 'messages' and 'prompt'/'response': keep one form.")
    if "messages" in fields:
        messages = _messages(fields["messages"], where)
    elif "prompt" in fields or "response" in fields:
        prompt, response = _text(fields, "prompt", where), _text(fields, "response", where)
        messages = [{"role": "user", "content": prompt}, {"role": "assistant", "content": response}]
    else:
        raise SRDEError(f"{where}: needs 'prompt' and 'response', or 'messages'.")
    choices = _choices(fields["choices"], where) if "choices" in fields else None
    if choices is not None:
        answer: str | None = _right_choice(fields, choices, where)
    else:
        answer = _text(fields, "answer", where) if "answer" in fields else None
    tests = _text(fields, "tests", where) if "tests" in fields else None
    if choices is not None and tests is not None:
        raise SRDEError(f"{where}: has both 'choices' and 'tests': keep the one that the item is scored by.")
    source = _text(fields, "source", where) if fields.get("source", "") != "" else ""
    split = _text(fields, "split", where) if "split" in fields else "train"
    if split not in SPLITS:
        raise SRDEError(
            f"{where}: unknown split '{split}', must be one of {', '.join(SPLITS)}.{nearest(split, SPLITS)}"
        )
    return Record(domain, messages, answer, source, where, split, choices, tests)


def _choices(value: Any, where: str) -> list[str]:
    if not isinstance(value, list) or len(value) < 2:
        raise SRDEError(f"{where}: field 'choices' must be a list of at least two texts.")
    choices = [_text({"choices": choice}, "choices", where) for choice in value]
    if len(set(choices)) < len(choices):
        raise SRDEError(f"{where}: field 'choices' holds the same text twice: keep one of them.")
    return choices


def _right_choice(fields: dict[str, Any], choices: list[str], where: str) -> str:
    """The text that `answer` means: the text itself, else a letter (A is the first), or a number (0 is the first)."""
    answer = fields.get("answer")
    if isinstance(answer, str):
        if answer in choices:
            return answer
        number = ord(answer.strip().upper()) - ord("A") if len(answer.strip()) == 1 else -1
    else:
        number = answer if isinstance(answer, int) and not isinstance(answer, bool) else -1
    if not 0 <= number < len(choices):
        last = len(choices) - 1
        raise SRDEError(
            f"{where}: field 'answer' is {json.dumps(answer)}: with 'choices' it must be one of them, the letter of "
            f"one (A to {chr(ord('A') + last)}) or its number (0 to {last})."
        )
    return choices[number]


def _messages(value: Any, where: str) -> list[dict[str, str]]:
    if not isinstance(value, list) or not all(isinstance(message, dict) for message in value):
        raise SRDEError(f"{where}: field 'messages' must be a list of objects with 'role' and 'content'.")
    messages = []
    for index, message in enumerate(value):
        place = f"{where}: messages[{index}]"
        role = _text(message, "role", place)
        if role not in ROLES:
            raise SRDEError(f"{place}: unknown role '{role}', must be one of {', '.join(ROLES)}.{nearest(role, ROLES)}")
        messages.append({"role": role, "content": _text(message, "content", place)})
    roles = [message["role"] for message in messages]
    if not roles or roles[-1] != "assistant":
        raise SRDEError(f"{where}: the last of 'messages' must be from the assistant.")
    if "system" in roles[1:]:
        raise SRDEError(f"{where}: a system message must be the first of 'messages'.")
    turns = roles[1:] if roles[0] == "system" else roles
    if turns[0] != "user":
        raise SRDEError(f"{where}: 'messages' must hold a user message before the first from the assistant.")
    return messages


def _text(fields: dict[str, Any], key: str, where: str) -> str:
    value = fields.get(key)
    if value is None:
        raise SRDEError(f"{where}: field '{key}' is missing.")
    if not isinstance(value, str):
        raise SRDEError(f"{where}: field '{key}' must be text, not {_kind(value)}.")
    if not value.strip():
        raise SRDEError(f"{where}: field '{key}' is empty.")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        raise SRDEError(f"{where}: field '{key}' holds half a surrogate pair: write the whole character.") from None
    return value


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "text", bool: "a truth value", type(None): "null"}
    return names.get(type(value), "a number")
