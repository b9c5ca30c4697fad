"""Finds training documents that contain parts of evaluation items: n-grams of words that occur in both."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from srde_ds.data.build.row_rules import hashed, ngram_hashes, words
from srde_ds.data.build.selection import joined
from srde_ds.data.build.tables import read_table, write_table
from srde_ds.data.conversation import all_text
from srde_ds.data.files import find_files, read_items
from srde_ds.data.forms import FORMS, convert
from srde_ds.errors import SRDEError

NGRAM = 13
"""words in an n-gram; a shorter evaluation item is searched for as a whole"""
MOST_QUESTIONS = 10
"""an n-gram that occurs under more different questions than this is a common phrase, not a leak"""
_QUESTIONS = ("prompt", "question", "query", "problem", "problem_text", "goal", "instruction", "input")


def evaluation_ngrams(texts: Iterable[str]) -> np.ndarray:
    """Sorted distinct hashes (uint64) of the items' n-grams, and of each item as a whole."""
    found: set[int] = set()
    for text in texts:
        if len(values := _hashes(words(text))):
            found.update(ngram_hashes(values, min(NGRAM, len(values))).tolist())
            found.update(ngram_hashes(values, len(values)).tolist())
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
            # These files have no option for it.
            fault = re.sub(r"give (its encoding, such as )?--.*", "save it as UTF-8.", str(error))
            raise SRDEError(f"decontaminate_against={name}: {fault}") from None


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
    """Write which n-grams of the file `ngrams` (.npy) occur in which of a part's records.

    Columns: `index`, `ngram`, and `whole`, whether it is all that is asked, in more than NGRAM words.
    """
    wanted = np.load(ngrams)
    documents: list[np.ndarray] = []
    matches: list[np.ndarray] = []
    are_whole: list[np.ndarray] = []
    for index, line in enumerate(read_table(records)["line"].to_pylist()):
        messages = json.loads(line)["messages"]
        values = _hashes(words(" ".join(all_text(message) for message in messages if message["role"] != "system")))
        users = [_hashes(words(m["content"])) for m in messages[:-1] if m["role"] == "user"]
        turns = [*users, *(np.concatenate(users[:count]) for count in range(2, len(users) + 1))]
        asked = [turn for turn in turns if len(turn)]
        whole = [ngram_hashes(turn, len(turn)) for turn in asked]
        runs = np.concatenate([ngram_hashes(values, NGRAM), *whole])
        found = np.unique(runs[np.isin(runs, wanted)])
        documents.append(np.full(len(found), index))
        matches.append(found)
        long = [one for one, turn in zip(whole, asked, strict=True) if len(turn) > NGRAM]
        are_whole.append(np.isin(found, long))
    columns = {
        "index": np.concatenate([*documents, np.empty(0, np.int64)]).astype(np.int64),
        "ngram": np.concatenate([*matches, np.empty(0, np.uint64)]),
        "whole": np.concatenate([*are_whole, np.empty(0, bool)]),
    }
    write_table(path, pa.table({name: pa.array(values) for name, values in columns.items()}))
    return {"matches": len(columns["index"])}


def contaminated(
    index: np.ndarray, ngram: np.ndarray, whole: np.ndarray, question: np.ndarray, keep: np.ndarray
) -> tuple[np.ndarray, int]:
    """`[N]` bool, documents that contain an evaluation n-gram, and how many n-grams counted as common phrases.

    However many documents answer the same question, they do not make its words a common phrase.

    Args:
        index, ngram, whole: the columns of `find_ngrams`, of all matches.
        question: `[N]` uint64, a hash of what each document asks.
        keep: `[N]` bool, documents that earlier rules have kept.
    """
    held = keep[index]
    index, ngram, whole = index[held], ngram[held], whole[held]
    _, first = np.unique(joined(ngram, question[index]), return_index=True)
    distinct, questions = np.unique(ngram[first], return_counts=True)
    common = ~whole & np.isin(ngram, distinct[questions > MOST_QUESTIONS])
    flagged = np.zeros(len(keep), bool)
    flagged[index[~common]] = True
    return flagged, len(np.unique(ngram[common]))


_KNOWN: dict[str, int] = {}


def _hashes(found: list[str]) -> np.ndarray:
    if len(_KNOWN) > 2_000_000:
        _KNOWN.clear()
    for word in found:
        if word not in _KNOWN:
            _KNOWN[word] = hashed(word)
    return np.fromiter((_KNOWN[word] for word in found), np.uint64, len(found))
