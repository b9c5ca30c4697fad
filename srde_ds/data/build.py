"""Build a folder of packed rows from JSONL, with a manifest that says what is in it."""

from __future__ import annotations

import hashlib
import json
import logging
import multiprocessing
import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from datasets.exceptions import DatasetGenerationError
from transformers import PreTrainedTokenizerBase

from srde_ds.data.manifest import (
    FILE_NAME,
    FORMAT_VERSION,
    DomainCounts,
    Manifest,
    Split,
    check_domains,
    check_tokenizer,
    load_manifest,
    tokenizer_identity,
)
from srde_ds.data.packing import Document, check_markers, fit, pack, tokenize
from srde_ds.data.records import Record, read_jsonl
from srde_ds.errors import SRDEError

__all__ = ["Manifest", "build_dataset", "load_manifest"]

log = logging.getLogger(__name__)

RECORDS_A_BATCH = 500
DOCUMENTS_A_BUFFER = 20_000
"""documents of a domain that are shuffled and packed together: bounds memory, costs no fill worth naming"""


def build_dataset(
    *,
    tokenizer: PreTrainedTokenizerBase,
    jsonl_data: str | Path,
    eval_file: str | Path | None,
    output_dir: str | Path,
    domains: Sequence[str],
    max_length: int,
    too_long: str,
    seed: int,
    num_processes: int = 1,
) -> Manifest:
    """Write `output_dir/train/`, `output_dir/validation/` (with `eval_file`) and `output_dir/manifest.json`.

    The folder appears complete or not at all. One that was built from the same files, tokenizer and options
    is used as it is. All input is checked before the first record is tokenised.

    Raises:
        SRDEError: bad input, a domain without records, held-out prompts in the training file, or a folder
            that exists and holds something else.
    """
    output_dir = Path(output_dir)
    files = {"train": Path(jsonl_data)} | ({"validation": Path(eval_file)} if eval_file else {})
    hashes = {split: _file_hash(path) for split, path in files.items()}
    manifest = Manifest(FORMAT_VERSION, max_length, too_long, seed, list(domains), tokenizer_identity(tokenizer), {})
    if output_dir.exists() and (not output_dir.is_dir() or any(output_dir.iterdir())):
        existing = load_manifest(output_dir)
        _check_same(existing, manifest, hashes, tokenizer, output_dir)
        log.info("'%s' was built from the same files and options: it is used as it is", output_dir)
        return existing
    _check_records(files, domains, tokenizer)
    building = output_dir.with_name(output_dir.name + ".tmp")
    shutil.rmtree(building, ignore_errors=True)
    building.mkdir(parents=True)
    try:
        with _tokenizing(tokenizer, num_processes) as tokenized:
            for split, path in files.items():
                writer = _SplitWriter(manifest, tokenizer, tokenized)
                manifest.splits[split] = writer.write(path, hashes[split], building, split)
        (building / FILE_NAME).write_text(json.dumps(manifest.to_dict(), indent=2) + "\n", encoding="utf-8")
        building.rename(output_dir)
    finally:
        shutil.rmtree(building, ignore_errors=True)
    return manifest


def _check_same(
    existing: Manifest, wanted: Manifest, hashes: dict[str, str], tokenizer: PreTrainedTokenizerBase, folder: Path
) -> None:
    remedy = f"'{folder}' exists already: choose another output folder or delete it"
    try:
        check_domains(existing, wanted.domains)
        check_tokenizer(existing, tokenizer)
    except SRDEError as error:
        raise SRDEError(f"{remedy}. {error}") from None
    for key in ("max_length", "too_long", "seed"):
        built, asked = getattr(existing, key), getattr(wanted, key)
        if built != asked:
            raise SRDEError(f"{remedy}. It was built with {key}={built}, not {asked}.")
    if {split: entry.file_sha256 for split, entry in existing.splits.items()} != hashes:
        raise SRDEError(f"{remedy}. It was built from other files or other content.")


def _check_records(files: dict[str, Path], domains: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> None:
    """Read every line once: syntax, domains without records, held-out prompts that training would see."""
    held_out: dict[Any, str] = {}
    if "validation" in files:
        for record in read_jsonl(files["validation"], domains):
            check_markers(tokenizer, record)
            held_out.setdefault(_prompts(record)[-1], record.where)
    counts: Counter[str] = Counter()
    leaked: dict[Any, str] = {}
    for record in read_jsonl(files["train"], domains):
        check_markers(tokenizer, record)
        counts[record.domain] += 1
        for prompt in _prompts(record):
            if prompt in held_out:
                leaked.setdefault(prompt, record.where)
    empty = [domain for domain in domains if not counts[domain]]
    if empty:
        raise SRDEError(
            f"'{files['train']}' has no record of domain '{empty[0]}': add some, or leave it out of domains."
        )
    if leaked:
        prompt, where = next(iter(leaked.items()))
        raise SRDEError(
            f"'{files['validation']}': {len(leaked)} held-out prompts occur in the training file too, the first is "
            f"{held_out[prompt]} = {where}: remove them from one of the files."
        )


def _prompts(record: Record) -> list[Any]:
    """What stands before each response, without the system message."""
    turns = [(m["role"], m["content"]) for m in record.messages if m["role"] != "system"]
    return [tuple(turns[:i]) for i, (role, _) in enumerate(turns) if role == "assistant"]


Batch = list[tuple[str, Document]]
"""(domain, document) pairs"""
Tokenized = Callable[[Iterator[list[Record]]], Iterable[Batch]]
"""Batches of records to batches of documents, in the same order"""


class _SplitWriter:
    """Packs and writes one file; holds the counts while rows stream by."""

    def __init__(self, manifest: Manifest, tokenizer: PreTrainedTokenizerBase, tokenized: Tokenized) -> None:
        self.domains, self.max_length = manifest.domains, manifest.max_length
        self.too_long, self.seed = manifest.too_long, manifest.seed
        self.pad_id = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
        self.tokenized = tokenized
        self.counts = {domain: DomainCounts() for domain in self.domains}
        self.digest = hashlib.sha256()

    def write(self, path: Path, file_hash: str, folder: Path, split: str) -> Split:
        tokens = datasets.List(datasets.Value("int32"), length=self.max_length)
        features = datasets.Features(
            {
                "input_ids": tokens,
                "labels": tokens,
                "position_ids": tokens,
                "domain": datasets.ClassLabel(names=self.domains),
                "length": datasets.Value("int32"),
            }
        )
        cache = folder / "cache"
        try:
            # A fingerprint of our own: the generator needs no hashing, and its cache is deleted below.
            rows = datasets.Dataset.from_generator(
                self._rows,
                features=features,
                gen_kwargs={"path": path},
                cache_dir=str(cache),
                split=split,
                fingerprint=f"srde-{split}",
            )
        except DatasetGenerationError as error:
            raise (error.__cause__ if isinstance(error.__cause__, SRDEError) else error) from None
        rows.save_to_disk(str(folder / split))
        total = len(rows)
        del rows
        shutil.rmtree(cache)
        filled = sum(counts.tokens for counts in self.counts.values())
        return Split(
            file=str(path),
            file_sha256=file_hash,
            rows=total,
            fill_rate=round(filled / (total * self.max_length), 4),
            content_sha256=self.digest.hexdigest(),
            domains=self.counts,
        )

    def _rows(self, path: Path) -> Iterator[dict[str, Any]]:
        buffers: dict[str, list[Document]] = {domain: [] for domain in self.domains}
        flushed: Counter[str] = Counter()
        records = read_jsonl(path, self.domains)
        batches = iter(lambda: list(islice(records, RECORDS_A_BATCH)), [])
        for domain, document in chain.from_iterable(self.tokenized(batches)):
            kept = self._counted(domain, document)
            if kept is not None:
                buffers[domain].append(kept)
            if len(buffers[domain]) == DOCUMENTS_A_BUFFER:
                yield from self._packed(domain, buffers[domain], flushed[domain])
                flushed[domain] += 1
                buffers[domain] = []
        for domain, documents in buffers.items():
            yield from self._packed(domain, documents, flushed[domain])
            counts = self.counts[domain]
            if counts.documents and not counts.rows:
                raise SRDEError(
                    f"'{path}': all {counts.documents} documents of domain '{domain}' are longer than "
                    f"max_length={self.max_length}: raise max_length, or give --too_long truncate."
                )

    def _counted(self, domain: str, document: Document) -> Document | None:
        counts = self.counts[domain]
        counts.documents += 1
        counts.by_parts += document.by_parts
        counts.too_long += len(document) > self.max_length
        kept = fit(document, self.max_length, self.too_long)
        counts.dropped += kept is None
        return kept

    def _packed(self, domain: str, documents: list[Document], flush: int) -> Iterator[dict[str, Any]]:
        index, counts = self.domains.index(domain), self.counts[domain]
        generator = np.random.default_rng([self.seed, index, flush])
        for row in pack(documents, self.max_length, self.pad_id, generator):
            counts.rows += 1
            counts.tokens += row["length"]
            counts.response_tokens += int((row["labels"] >= 0).sum())
            self.digest.update(np.array([index, row["length"]], np.int32).tobytes())
            self.digest.update(row["input_ids"].tobytes() + row["labels"].tobytes())
            yield row | {"domain": index}


@contextmanager
def _tokenizing(tokenizer: PreTrainedTokenizerBase, num_processes: int) -> Iterator[Tokenized]:
    if num_processes == 1:
        yield partial(map, partial(_tokenize_batch, tokenizer))
        return
    context = multiprocessing.get_context("spawn")
    with context.Pool(num_processes, initializer=_start_worker, initargs=(tokenizer,)) as pool:
        yield partial(pool.imap, _work)


def _tokenize_batch(tokenizer: PreTrainedTokenizerBase, records: list[Record]) -> Batch:
    documents = tokenize(records, tokenizer)
    return [(record.domain, document) for record, document in zip(records, documents, strict=True)]


_worker_tokenizer: PreTrainedTokenizerBase


def _start_worker(tokenizer: PreTrainedTokenizerBase) -> None:
    global _worker_tokenizer
    _worker_tokenizer = tokenizer


def _work(records: list[Record]) -> Batch:
    return _tokenize_batch(_worker_tokenizer, records)


def _file_hash(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except FileNotFoundError:
        raise SRDEError(f"no such file '{path}': give an existing JSONL file.") from None
    except OSError as error:
        raise SRDEError(f"'{path}' cannot be read: {error.strerror}.") from None
