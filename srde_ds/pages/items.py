"""Items to browse: compressed into the page, and unpacked by its script when shown."""

from __future__ import annotations

import base64
import gzip
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from srde_ds.utils.escape import terminal

MOST_BYTES = 9_000_000
"""most bytes of packed items; this leaves plotly and the charts 6 MB of the 15 that a page may have"""
_JOINED = 0
"""replaces an answer's text that follows from its tokens"""
_LENGTHS = (20000, 4000, 1000, 400, 150)  # most characters of a text; the first limit that fits is used


@dataclass(frozen=True)
class Answer:
    """A model's answer.

    Attributes:
        text: the answer; None: the model was not asked.
        correct: the verdict; None: there is nothing to compare with.
        tokens: pieces that make up `text`, if their experts are known.
        shares: the share of each expert in each of these tokens, in percent. The last tokens may be missing.
    """

    text: str | None
    correct: bool | None
    tokens: Sequence[str] = ()
    shares: Sequence[Sequence[int]] = ()


@dataclass(frozen=True)
class Item:
    """An item of an evaluation, or an example: `messages` are pairs of role and text."""

    domain: str
    source: str
    messages: Sequence[tuple[str, str]]
    expected: str | None = None
    answers: Sequence[Answer] = field(default=())


def pack(items: Iterable[Item], domains: Sequence[str]) -> tuple[str, int | None]:
    """The items as gzipped JSON in base64, and the number of characters that texts were cut to; None if all are whole.

    Control characters are made visible, as everywhere.
    """
    numbers = {name: number for number, name in enumerate(domains)}
    listed = list(items)
    for length in _LENGTHS:
        rows = [_row(item, numbers, length) for item in listed]
        packed = gzip.compress(json.dumps(rows, ensure_ascii=False, separators=(",", ":")).encode("utf-8"), 6, mtime=0)
        if len(packed) * 4 / 3 <= MOST_BYTES:
            break
    longest = max((len(text) for item in listed for text in _texts(item)), default=0)
    return base64.b64encode(packed).decode(), length if longest > length else None


def _texts(item: Item) -> Iterable[str]:
    return (
        text for text in (*(text for _, text in item.messages), item.expected, *(a.text for a in item.answers)) if text
    )


def _row(item: Item, numbers: dict[str, int], length: int) -> list[object]:
    """An item in the form for the page's script: domain, source, messages, expected, answers."""

    def shown(text: str | None) -> str | None:
        return text if text is None else terminal(text if len(text) <= length else f"{text[:length]} …")

    answers: list[list[object]] = []
    for answer in item.answers:
        if answer.tokens and "".join(answer.tokens) == answer.text and len(answer.text) <= length:
            # The script joins the tokens: otherwise the repeated text would be a third of the page.
            answers.append([_JOINED, answer.correct, [terminal(token) for token in answer.tokens], answer.shares])
        else:
            answers.append([shown(answer.text), answer.correct])
    messages = [[terminal(role), shown(text)] for role, text in item.messages]
    return [numbers[item.domain], terminal(item.source), messages, shown(item.expected), answers]
