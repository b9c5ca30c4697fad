"""Tokenised documents on disk, between the passes that tokenise and pack."""

from __future__ import annotations

import gc
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from transformers import PreTrainedTokenizerBase

from srde_ds.data.build.tables import read_table, write_table
from srde_ds.data.packing import Document, check_markers, tokenize_each
from srde_ds.data.records import Record
from srde_ds.data.rows import DomainRows
from srde_ds.errors import SRDEError

DOCUMENTS_A_FILE = 2000
_RECORD_FIELDS = {field.name for field in fields(Record)}
_tokenizer: PreTrainedTokenizerBase


def set_tokenizer(tokenizer: PreTrainedTokenizerBase) -> None:
    """Set the tokenizer of this process, once rather than with every task."""
    global _tokenizer
    _tokenizer = tokenizer


@contextmanager
def no_garbage_collection() -> Iterator[None]:
    """For work that makes many objects and no cycles: each full collection also walks all objects of the libraries."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


@no_garbage_collection()
def tokenize_records(
    path: Path, *, parts: Sequence[str], part_of: Sequence[int], index_of: Sequence[int]
) -> dict[str, Any]:
    """Tokenise records of the files `parts` (whose column `line` holds a record as JSON), in the given order.

    Columns: `input_ids` list of int32, `is_response` list of bool, `by_parts`, `where` (the record's place), and two
    reasons why a document cannot be used, in which case it has no tokens: `marker`, a response contains the text of
    EOS; and `refusal`, the chat template refuses it. Both are empty for a document that can be used.
    """
    records = [_record(line) for line in read_lines([Path(part) for part in parts], part_of, index_of)]
    markers = [_fault(check_markers, _tokenizer, record) for record in records]
    usable = [record for record, marker in zip(records, markers, strict=True) if not marker]
    tokenized = iter(tokenize_each(usable, _tokenizer) if usable else [])
    outcomes = [SRDEError(marker) if marker else next(tokenized) for marker in markers]
    refusals = [
        str(outcome) if isinstance(outcome, SRDEError) and not marker else ""
        for outcome, marker in zip(outcomes, markers, strict=True)
    ]
    documents = [
        Document(np.empty(0, np.int32), np.empty(0, bool), record.where, False)
        if isinstance(outcome, SRDEError)
        else outcome
        for record, outcome in zip(records, outcomes, strict=True)
    ]
    offsets = pa.array(np.cumsum([0, *map(len, documents)]), pa.int32())
    ids = np.concatenate([document.input_ids for document in documents])
    responses = np.concatenate([document.is_response for document in documents])
    columns = {
        "input_ids": pa.ListArray.from_arrays(offsets, pa.array(ids)),
        "is_response": pa.ListArray.from_arrays(offsets, pa.array(responses)),
        "by_parts": pa.array([document.by_parts for document in documents]),
        "where": pa.array([record.where for record in records], pa.string()),
        "marker": pa.array(markers, pa.string()),
        "refusal": pa.array(refusals, pa.string()),
    }
    write_table(path, pa.table(columns))
    return {"documents": len(documents), "tokens": len(ids)}


def _record(line: str) -> Record:
    """The record from its `vars` as JSON, or from a line of data.jsonl, whose place is its source and row."""
    content = json.loads(line)
    place = {"where": f"source {content['source']}, row {content['row']}"} if "row" in content else {}
    return Record(**{"answer": None} | place | {key: content[key] for key in content if key in _RECORD_FIELDS})


def _fault(check: Callable[..., object], *arguments: Any) -> str:
    try:
        check(*arguments)
    except SRDEError as error:
        return str(error)
    return ""


def read_lines(parts: Sequence[Path], part_of: Sequence[int], index_of: Sequence[int]) -> Iterator[str]:
    """The records' JSON, in the given order."""
    tables = [read_table(part)["line"].combine_chunks() for part in parts]
    for part, index in zip(part_of, index_of, strict=True):
        yield tables[part][index].as_py()


class Tokens:
    """The documents in a file of `tokenize_records`."""

    def __init__(self, path: Path | str) -> None:
        table = read_table(path)
        ids, responses = table["input_ids"].combine_chunks(), table["is_response"].combine_chunks()
        self._ids = ids.values.to_numpy()
        self._responses = responses.values.to_numpy(zero_copy_only=False)
        self._offsets = ids.offsets.to_numpy()
        self._by_parts = table["by_parts"].to_numpy()
        self._where = table["where"]
        self.markers: list[str] = table["marker"].to_pylist()
        self.refusals: list[str] = table["refusal"].to_pylist()
        self.lengths: np.ndarray = np.diff(self._offsets)

    def __getitem__(self, index: int) -> Document:
        part = slice(self._offsets[index], self._offsets[index + 1])
        where = self._where[index].as_py()
        return Document(self._ids[part], self._responses[part], where, bool(self._by_parts[index]))


def pack_documents(
    path: Path, *, files: Sequence[str], file_of: Sequence[int], index_of: Sequence[int], **options: Any
) -> dict[str, Any]:
    """Pack documents from files of `tokenize_records`, all of one domain, in the given order.

    Args:
        options: arguments of DomainRows.
    """
    tokens = [Tokens(file) for file in files]
    with DomainRows(path, **options) as rows:
        for file, index in zip(file_of, index_of, strict=True):
            rows.add(tokens[file][index])
    return {"counts": asdict(rows.counts), "digest": rows.digest.hexdigest()}
