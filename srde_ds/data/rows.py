"""Packed rows in Arrow files that `datasets` memory-maps: one file per domain and split."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import datasets
import numpy as np
import pyarrow as pa

from srde_ds.data.manifest import DomainCounts, Split
from srde_ds.data.packing import Document, fit, pack

DOCUMENTS_A_BUFFER = 20_000
"""documents of a domain that are shuffled and packed together; bounds memory at almost no loss of fill"""
ROWS_A_BATCH = 256
_TOKENS = ("input_ids", "labels", "position_ids")


def row_features(domains: Sequence[str], max_length: int) -> datasets.Features:
    """The columns of packed rows."""
    tokens = datasets.List(datasets.Value("int32"), length=max_length)
    return datasets.Features(
        {name: tokens for name in _TOKENS}
        | {"domain": datasets.ClassLabel(names=list(domains)), "length": datasets.Value("int32")}
    )


class DomainRows:
    """Takes one domain's documents, shuffles and packs them, and writes the rows to a file.

    Documents longer than `max_length` are treated as `too_long` says. All documents are counted.
    """

    def __init__(
        self,
        path: Path,
        *,
        domains: Sequence[str],
        domain: str,
        max_length: int,
        too_long: str,
        seed: int,
        pad_id: int,
        packing: bool = True,
    ) -> None:
        self.index = list(domains).index(domain)
        self.max_length, self.too_long, self.seed, self.pad_id = max_length, too_long, seed, pad_id
        self.packing = packing
        self.counts = DomainCounts()
        self.digest = hashlib.sha256()
        """hash of each row's domain, length, input_ids and labels, in order"""
        self._schema = row_features(domains, max_length).arrow_schema
        self._file = pa.OSFile(str(path), "wb")
        self._writer = pa.ipc.new_stream(self._file, self._schema)
        self._documents: list[Document] = []
        self._packed = 0

    def __enter__(self) -> DomainRows:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            self._pack()
        self._writer.close()
        self._file.close()

    def add(self, document: Document) -> None:
        """Add a document. Raises an SRDEError if it is too long and `too_long` says error."""
        self.counts.documents += 1
        self.counts.by_parts += document.by_parts
        self.counts.too_long += len(document) > self.max_length
        self.counts.longest = max(self.counts.longest, len(document))
        kept = fit(document, self.max_length, self.too_long)
        if kept is None:
            self.counts.dropped += 1
            return
        self._documents.append(kept)
        if len(self._documents) == DOCUMENTS_A_BUFFER:
            self._pack()

    def _pack(self) -> None:
        documents, self._documents = self._documents, []
        waiting: list[dict[str, Any]] = []
        generator = np.random.default_rng([self.seed, self.index, self._packed])
        for row in pack(documents, self.max_length, self.pad_id, generator, packing=self.packing):
            self.counts.rows += 1
            self.counts.tokens += row["length"]
            self.counts.response_tokens += int((row["labels"] >= 0).sum())
            self.digest.update(np.array([self.index, row["length"]], np.int32).tobytes())
            self.digest.update(row["input_ids"].tobytes() + row["labels"].tobytes())
            waiting.append(row)
            if len(waiting) == ROWS_A_BATCH:
                self._write(waiting)
                waiting = []
        self._write(waiting)
        self._packed += 1

    def _write(self, rows: list[dict[str, Any]]) -> None:
        if not rows:
            return
        columns = [
            pa.FixedSizeListArray.from_arrays(pa.array(np.concatenate([row[name] for row in rows])), self.max_length)
            for name in _TOKENS
        ]
        columns += [pa.array(np.full(len(rows), self.index)), pa.array([row["length"] for row in rows], pa.int32())]
        self._writer.write_table(pa.table(columns, schema=self._schema))


def write_split(
    folder: Path,
    files: Sequence[Path],
    *,
    made_from: tuple[str, str],
    counts: dict[str, DomainCounts],
    digests: Sequence[str],
    max_length: int,
) -> Split:
    """Make a folder for `datasets.load_from_disk` from the files of a split's domains, and its entry in the manifest.

    The files are linked rather than copied if possible.

    Args:
        made_from: path and SHA-256 of the JSONL file.
        digests: hash of each file's rows.
    """
    folder.mkdir(parents=True)
    names = [f"data-{number:05d}-of-{len(files):05d}.arrow" for number in range(len(files))]
    for name, file in zip(names, files, strict=True):
        try:
            os.link(file, folder / name)
        except OSError:  # on another file system, or one without links
            shutil.copyfile(file, folder / name)
    content = hashlib.sha256("".join(digests).encode()).hexdigest()
    state: dict[str, Any] = {
        "_data_files": [{"filename": name} for name in names],
        "_fingerprint": content[:16],
        "_format_columns": None,
        "_format_kwargs": {},
        "_format_type": None,
        "_output_all_columns": False,
        "_split": folder.name,
    }
    (folder / "state.json").write_text(json.dumps(state, indent=2))
    datasets.DatasetInfo(features=row_features(list(counts), max_length)).write_to_directory(str(folder))
    rows = sum(count.rows for count in counts.values())
    filled = sum(count.tokens for count in counts.values())
    return Split(
        file=made_from[0],
        file_sha256=made_from[1],
        rows=rows,
        fill_rate=round(filled / max(1, rows * max_length), 4),
        content_sha256=content,
        domains=counts,
    )
