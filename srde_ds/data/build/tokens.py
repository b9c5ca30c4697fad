"""Tokenised documents on disk, between the stages that tokenise and pack."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from transformers import PreTrainedTokenizerBase

from srde_ds.data.build.row_rules import read_table, write_table
from srde_ds.data.packing import Document, check_markers, tokenize
from srde_ds.data.records import Record
from srde_ds.data.rows import DomainRows
from srde_ds.errors import SRDEError

_tokenizer: PreTrainedTokenizerBase


def set_tokenizer(tokenizer: PreTrainedTokenizerBase) -> None:
    """The tokenizer of this process; handed over once, not with every piece of work."""
    global _tokenizer
    _tokenizer = tokenizer


def tokenize_records(
    path: Path, *, parts: Sequence[str], part_of: Sequence[int], index_of: Sequence[int]
) -> dict[str, Any]:
    """Tokenise records of the files `parts` (written by make_records), in the order given.

    Columns: `input_ids` list of int32, `is_response` list of bool, `by_parts`, and `usable`: False where a
    response holds the text of the EOS token.
    """
    records, usable = [], []
    for line in read_lines([Path(part) for part in parts], part_of, index_of):
        content = json.loads(line)
        record = Record(content["domain"], content["messages"], None, content["source"], _place(content))
        try:
            check_markers(_tokenizer, record)
            usable.append(True)
        except SRDEError:
            usable.append(False)
        records.append(record)
    documents = tokenize(records, _tokenizer)
    offsets = pa.array(np.cumsum([0, *map(len, documents)]), pa.int32())
    ids = np.concatenate([document.input_ids for document in documents])
    responses = np.concatenate([document.is_response for document in documents])
    columns = {
        "input_ids": pa.ListArray.from_arrays(offsets, pa.array(ids)),
        "is_response": pa.ListArray.from_arrays(offsets, pa.array(responses)),
        "by_parts": pa.array([document.by_parts for document in documents]),
        "usable": pa.array(usable),
    }
    write_table(path, pa.table(columns))
    return {"documents": len(documents), "tokens": len(ids)}


def _place(content: dict[str, Any]) -> str:
    return f"source {content['source']}, row {content['row']}"


def read_lines(parts: Sequence[Path], part_of: Sequence[int], index_of: Sequence[int]) -> Iterator[str]:
    """The records' JSON, in the order given."""
    tables = [read_table(part)["line"].combine_chunks() for part in parts]
    for part, index in zip(part_of, index_of, strict=True):
        yield tables[part][index].as_py()


class Tokens:
    """The documents of one file of `tokenize_records`."""

    def __init__(self, path: Path | str) -> None:
        table = read_table(path)
        ids, responses = table["input_ids"].combine_chunks(), table["is_response"].combine_chunks()
        self._ids = ids.values.to_numpy()
        self._responses = responses.values.to_numpy(zero_copy_only=False)
        self._offsets = ids.offsets.to_numpy()
        self._by_parts = table["by_parts"].to_numpy()
        self.usable: np.ndarray = table["usable"].to_numpy()
        self.lengths: np.ndarray = np.diff(self._offsets)

    def __getitem__(self, index: int) -> Document:
        part = slice(self._offsets[index], self._offsets[index + 1])
        return Document(self._ids[part], self._responses[part], "", bool(self._by_parts[index]))


def pack_documents(
    path: Path, *, files: Sequence[str], file_of: Sequence[int], index_of: Sequence[int], **options: Any
) -> dict[str, Any]:
    """Pack documents of files of `tokenize_records`, all of one domain, in the order given.

    Args:
        options: of DomainRows.
    """
    tokens = [Tokens(file) for file in files]
    with DomainRows(path, **options) as rows:
        for file, index in zip(file_of, index_of, strict=True):
            rows.add(tokens[file][index])
    return {"counts": asdict(rows.counts), "digest": rows.digest.hexdigest()}
