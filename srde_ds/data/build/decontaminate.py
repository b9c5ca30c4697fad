"""Finds training documents that contain parts of evaluation items: n-grams of words that occur in both."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from srde_ds.data.build.row_rules import hashed, ngram_hashes, words
from srde_ds.data.build.tables import read_table, write_table
from srde_ds.data.conversation import all_text
from srde_ds.data.files import find_files, read_items
from srde_ds.data.forms import FORMS, convert
from srde_ds.errors import SRDEError

NGRAM = 13
"""words in an n-gram; a shorter evaluation item is searched for as a whole"""
MOST_DOCUMENTS = 10
"""an n-gram that occurs in more training documents than this is a common phrase, not a leak"""
_QUESTIONS = ("prompt", "question", "query", "problem", "problem_text", "goal", "instruction", "input")


def evaluation_ngrams(texts: Iterable[str]) -> np.ndarray:
    """Sorted distinct hashes (uint64) of the items' n-grams."""
    found: set[int] = set()
    for text in texts:
        values = _hashes(words(text))
        found.update(ngram_hashes(values, min(NGRAM, len(values))).tolist() if len(values) else [])
    return np.array(sorted(found), np.uint64)


def read_evaluation_file(name: str | Path) -> Iterator[str]:
    """The questions in the records of a file, folder or pattern.

    Of a record in a known form that is what the user says, after its `context`; else the first field with a question.

    Raises:
        SRDEError: the file does not exist, or a record holds no question.
    """
    for path in find_files(name, "decontaminate_against"):
        try:
            for place, item in read_items(path):
                if isinstance(item, SRDEError):
                    raise item
                yield from _questions(item, place)
        except SRDEError as error:
            raise SRDEError(f"decontaminate_against={name}: {error}") from None


def _questions(item: dict[str, Any], place: str) -> list[str]:
    """What a record asks; a question with choices also without them, as others may put it."""
    fields = {key: value for key, value in item.items() if value is not None}
    asked = _asked(fields, place) or next((str(fields[name]) for name in _QUESTIONS if fields.get(name)), "")
    if not asked:
        raise SRDEError(f"{place} holds no question: give records with messages or one of {', '.join(_QUESTIONS)}.")
    context = fields.get("context")
    if isinstance(context, str) and context.strip() not in asked:
        asked = f"{context}\n{asked}"
    alone = fields.get("question")
    return [asked, alone] if isinstance(alone, str) and alone.strip() and alone != asked else [asked]


def _asked(fields: dict[str, Any], place: str) -> str:
    """The user's turns of a record in a known form; empty if it has none."""
    form = next((one for one in FORMS.values() if one.fits(fields)), None)
    if form is None:
        return ""
    known = {key: value for key, value in fields.items() if key in form.known}
    try:
        converted = convert(known, place, form=form.name, answered=False)[1]
    except SRDEError:
        return ""
    turns = converted.get("messages", [{"role": "user", "content": converted.get("prompt")}])
    users = [turn for turn in turns if isinstance(turn, dict) and turn.get("role") in ("user", "human")]
    return " ".join(turn["content"] for turn in users if isinstance(turn.get("content"), str))


def find_ngrams(path: Path, *, records: Path, ngrams: Path) -> dict[str, Any]:
    """Write which n-grams of the file `ngrams` (.npy) occur in which of a part's records: columns `index`, `ngram`."""
    wanted = np.load(ngrams)
    # Only n-grams of the evaluation items' sizes can match: NGRAM, or the length of a short item.
    documents: list[np.ndarray] = []
    matches: list[np.ndarray] = []
    for index, line in enumerate(read_table(records)["line"].to_pylist()):
        messages = json.loads(line)["messages"]
        values = _hashes(words(" ".join(all_text(message) for message in messages if message["role"] != "system")))
        asked = _hashes(words(" ".join(message["content"] for message in messages[:-1] if message["role"] == "user")))
        runs = np.concatenate([ngram_hashes(values, NGRAM), ngram_hashes(asked, len(asked)) if len(asked) else asked])
        found = np.unique(runs[np.isin(runs, wanted)])
        documents.append(np.full(len(found), index))
        matches.append(found)
    index_of = np.concatenate([*documents, np.empty(0, np.int64)]).astype(np.int64)
    ngram_of = np.concatenate([*matches, np.empty(0, np.uint64)])
    write_table(path, pa.table({"index": pa.array(index_of), "ngram": pa.array(ngram_of)}))
    return {"matches": len(index_of)}


def contaminated(index: np.ndarray, ngram: np.ndarray, keep: np.ndarray) -> tuple[np.ndarray, int]:
    """`[N]` bool, documents that contain an evaluation n-gram, and how many n-grams counted as common phrases.

    Args:
        index: the document of each match.
        ngram: the n-gram of each match.
        keep: `[N]` bool, documents that earlier rules have kept.
    """
    held = keep[index]
    index, ngram = index[held], ngram[held]
    distinct, position, documents = np.unique(ngram, return_inverse=True, return_counts=True)
    form = documents > MOST_DOCUMENTS
    flagged = np.zeros(len(keep), bool)
    if len(distinct):
        flagged[index[~form[position]]] = True
    return flagged, int(form.sum())


_KNOWN: dict[str, int] = {}


def _hashes(found: list[str]) -> np.ndarray:
    if len(_KNOWN) > 2_000_000:
        _KNOWN.clear()
    for word in found:
        if word not in _KNOWN:
            _KNOWN[word] = hashed(word)
    return np.fromiter((_KNOWN[word] for word in found), np.uint64, len(found))
