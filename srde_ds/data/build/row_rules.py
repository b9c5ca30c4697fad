"""Rules for single rows, and the hashes by which later rules compare them."""

from __future__ import annotations

import json
import re
import unicodedata
from collections import Counter
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import rensa

from srde_ds.data.build.tables import write_table
from srde_ds.data.conversation import all_text, has_surrogates
from srde_ds.data.sources.examples import BrokenRow, Example, trimmed
from srde_ds.data.sources.reading import Reader

NUM_PERM = 128
"""hash functions of a MinHash signature; its estimate of a similarity is off by 0.03 on average"""
SHINGLE = 5
"""words in a run that is compared"""
MINHASH_VERSION = f"rensa RMinHash {rensa.RMinHash.ALGORITHM_VERSION}"
_SEED = 1
# Scripts without spaces between words: from Thai to Burmese, Khmer, Japanese, Chinese. Their characters count as words.
_UNSPACED = "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\U00020000-\U0003ffff"
_WORD = re.compile(rf"[{_UNSPACED}]|[^\W{_UNSPACED}]+")
_CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]")
# Placeholders that generated datasets write when they have nothing to say.
_PLACEHOLDERS = {"<nooutput>", "<noinput>"}


def make_records(
    path: Path, *, reader: Reader, start: int, stop: int, labels: dict[str, str], near_duplicates: bool
) -> dict[str, Any]:
    """Write rows [start, stop) of a source as clean records to an Arrow file.

    Columns: `line` (the record as JSON), `row`; the hashes (uint64) `content` and `asked` (a list: of all before each
    answer), both without the system message, `system` (of that) and `group` (0: none); and with `near_duplicates` the
    MinHash `signature` (uint32 × NUM_PERM, as bytes).

    Args:
        labels: the records' `domain`, `source` and `revision`.

    Returns:
        `kept`; `counts`: rows read, normalised, and left out by each rule; `reasons` why rows are broken.
    """
    counts: Counter[str] = Counter({"read": stop - start})
    reasons: Counter[str] = Counter()
    rows: list[int] = []
    lines: list[str] = []
    texts: list[str] = []
    hashes: dict[str, list[int]] = {"content": [], "group": [], "system": []}
    asked: list[list[int]] = []
    for row, example in zip(range(start, stop), reader.examples(start, stop), strict=True):
        if isinstance(example, BrokenRow):
            counts["broken"] += 1
            reasons[str(example)] += 1
            continue
        if not example.answered:
            counts["no answer"] += 1
            continue
        cleaned, changed = normalise(example)
        if _is_empty(cleaned):
            counts["empty"] += 1
            continue
        if _lost_characters(cleaned):
            counts["broken"] += 1
            reasons["lost characters"] += 1
            continue
        if _unclear_choices(cleaned):
            counts["broken"] += 1
            reasons["choices that are empty or the same"] += 1
            continue
        counts["normalised"] += changed
        said = " ".join(all_text(m) for m in cleaned.messages if m["role"] != "system")
        system, questions = _questions(cleaned)
        rows.append(row)
        lines.append(json.dumps(_record(cleaned, labels, row), ensure_ascii=False))
        texts.append(said)
        hashes["content"].append(hashed(_plain(said)))
        hashes["group"].append(hashed(_plain(cleaned.group)) if cleaned.group else 0)
        hashes["system"].append(hashed(_plain(system)))
        asked.append([hashed(_plain(question)) for question in questions])
    columns = {"line": pa.array(lines, pa.large_string()), "row": pa.array(rows, pa.int64())}
    columns |= {name: pa.array(np.array(values, np.uint64)) for name, values in hashes.items()}
    columns["asked"] = pa.array(asked, pa.list_(pa.uint64()))
    if near_duplicates:
        flat = signatures(texts).reshape(-1).view(np.uint8)
        columns["signature"] = pa.FixedSizeBinaryArray.from_buffers(
            pa.binary(4 * NUM_PERM), len(texts), [None, pa.py_buffer(flat)]
        )
    write_table(path, pa.table(columns))
    return {"kept": len(rows), "counts": dict(counts), "reasons": dict(reasons.most_common(3))}


def _questions(example: Example) -> tuple[str, list[str]]:
    """The system message, and what is asked at each answer: all before it, without thoughts and calls."""
    system = " ".join(message["content"] for message in example.messages if message["role"] == "system")
    turns = [message for message in example.messages if message["role"] != "system"]
    said = [message["content"] for message in turns]
    return system, [" ".join(said[:place]) for place, turn in enumerate(turns) if turn["role"] == "assistant"]


def normalise(example: Example) -> tuple[Example, bool]:
    """Bring texts to NFC, with line feeds, without control characters or outer space; whether that changed anything.

    A message's first line keeps its indentation.
    """
    messages = [m | {key: trimmed(_normal(m[key])) for key in ("content", "reasoning_content") if key in m}
                for m in example.messages]  # fmt: skip
    answer = _normal(example.answer).strip() if example.answer is not None else None
    more = dict(example.more)
    if "choices" in more:
        more["choices"] = [_normal(choice).strip() for choice in more["choices"]]
    return Example(messages, answer or None, example.group, more), messages != example.messages


def _normal(text: str) -> str:
    text = unicodedata.normalize("NFC", text.replace("\r\n", "\n").replace("\r", "\n"))
    return _CONTROL.sub("", text)


def _is_empty(example: Example) -> bool:
    texts = [all_text(message) for message in example.messages if message["role"] != "tool"]
    return not all(texts) or texts[-1].casefold() in _PLACEHOLDERS


def _lost_characters(example: Example) -> bool:
    """Whether characters were lost, which leaves U+FFFD or lone halves of a surrogate pair."""
    texts = [*map(all_text, example.messages), example.answer or "", example.group or ""]
    return any("\ufffd" in text or has_surrogates(text) for text in texts)


def _unclear_choices(example: Example) -> bool:
    """Whether choices have become empty or the same."""
    choices = example.more.get("choices", [])
    return not all(choices) or len(set(choices)) < len(choices)


def _record(example: Example, labels: dict[str, str], row: int) -> dict[str, Any]:
    answer = {} if example.answer is None else {"answer": example.answer}
    return {"messages": example.messages, **example.more, **answer, **labels, "row": row}


def _plain(text: str) -> str:
    return " ".join(text.casefold().split())


def hashed(text: str) -> int:
    """A 64-bit hash of a text."""
    return int.from_bytes(blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "little")


def words(text: str) -> list[str]:
    """The lower-case words of a text, without punctuation; the characters of scripts without spaces."""
    return _WORD.findall(text.casefold())


def ngram_hashes(word_hashes: np.ndarray, size: int) -> np.ndarray:
    """uint64 [N - size + 1]: hashes of all runs of `size` words, from the words' hashes uint64 [N]."""
    count = len(word_hashes) - size + 1
    if count < 1:
        return np.empty(0, np.uint64)
    # Each position has its own odd multiplier, so that order counts; overflow acts as the modulus.
    multipliers = np.cumprod(np.full(size, 0x9E3779B97F4A7C15, np.uint64))
    return np.correlate(word_hashes, multipliers)


def signatures(texts: list[str]) -> np.ndarray:
    """MinHash signatures uint32 [texts, NUM_PERM] over the texts' runs of SHINGLE words (fewer in a shorter text)."""
    known: dict[str, int] = {}
    shingles: list[np.ndarray] = []
    for text in texts:
        found = words(text) or [text]
        for word in found:
            if word not in known:
                known[word] = hashed(word)
        values = np.fromiter((known[word] for word in found), np.uint64, len(found))
        shingles.append(ngram_hashes(values, min(SHINGLE, len(values))))
    if not texts:
        return np.empty((0, NUM_PERM), np.uint32)
    offsets = np.cumsum([0, *map(len, shingles)], dtype=np.uint64)
    matrix = rensa.RMinHash.digest_matrix_from_flat_token_hashes(np.concatenate(shingles), offsets, NUM_PERM, _SEED)
    return np.array(matrix.to_rows(), np.uint32).reshape(len(texts), NUM_PERM)
