"""Build a folder of packed rows from JSONL, with a manifest that says what is in it."""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from srde_ds.data.build.artifacts import process_died, worker_pool
from srde_ds.data.conversation import TrainOn
from srde_ds.data.manifest import (
    FILE_NAME,
    FORMAT_VERSION,
    Manifest,
    Split,
    check_domains,
    check_tokenizer,
    load_manifest,
    tokenizer_identity,
)
from srde_ds.data.packing import Document, check_markers, pad_token_id, tokenize
from srde_ds.data.records import SPLITS, Record, read_jsonl
from srde_ds.data.rows import DomainRows, write_split
from srde_ds.errors import SRDEError

__all__ = ["Manifest", "build_dataset", "load_manifest"]

log = logging.getLogger(__name__)

RECORDS_A_BATCH = 500
BATCHES_UNDER_WAY = 64


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
    overwrite: bool = False,
    train_on: TrainOn = "all",
    packing: bool = True,
) -> Manifest:
    """Write `output_dir/train/`, the held-out splits and `output_dir/manifest.json`.

    Held out are the records of `eval_file` (split validation), and those of `jsonl_data` that name their split. The
    folder appears complete or not at all. One that was built from the same files, tokenizer and options is used as it
    is. All input is checked before the first record is tokenised.

    Raises:
        SRDEError: bad input, a domain without records, held-out prompts in the training file, or a folder that exists
            and holds something else (without `overwrite`).
    """
    output_dir = Path(output_dir)
    hashes = {Path(path): file_hash(Path(path)) for path in (jsonl_data, eval_file) if path}
    manifest = Manifest(FORMAT_VERSION, max_length, too_long, seed, list(domains), tokenizer_identity(tokenizer), {})
    manifest.train_on, manifest.packing = train_on, packing
    inputs = _Inputs(Path(jsonl_data), Path(eval_file) if eval_file else None, list(domains), train_on)
    if not overwrite and output_dir.exists() and (not output_dir.is_dir() or any(output_dir.iterdir())):
        existing = load_manifest(output_dir)
        _check_same(existing, manifest, inputs, hashes, tokenizer, output_dir)
        log.info("'%s' was built from the same files and options: it is used as it is", output_dir)
        return existing
    splits = _check_records(inputs, tokenizer)
    building = output_dir.with_name(output_dir.name + ".tmp")
    shutil.rmtree(building, ignore_errors=True)
    try:
        building.mkdir(parents=True)
    except OSError as error:
        raise SRDEError(f"'{output_dir}' cannot be made: {error.strerror}. Choose another folder.") from None
    try:
        with _tokenizing(tokenizer, num_processes) as tokenized:
            for split in splits:
                manifest.splits[split] = _write_split(
                    split, inputs, hashes, building, manifest, pad_token_id(tokenizer), tokenized
                )
        (building / FILE_NAME).write_text(json.dumps(manifest.to_dict(), indent=2) + "\n", encoding="utf-8")
        if overwrite:
            shutil.rmtree(output_dir, ignore_errors=True)
        building.rename(output_dir)
    finally:
        shutil.rmtree(building, ignore_errors=True)
    return manifest


@dataclass(frozen=True)
class _Inputs:
    """The files, and which records of them make up which split."""

    jsonl_data: Path
    eval_file: Path | None
    domains: list[str]
    train_on: TrainOn

    def path(self, split: str) -> Path:
        return self.eval_file if self.eval_file and split == "validation" else self.jsonl_data

    def records(self, split: str) -> Iterator[Record]:
        for record in read_jsonl(self.path(split), self.domains, self.train_on):
            if record.split == split or self.path(split) == self.eval_file:
                yield record


def _check_same(
    existing: Manifest,
    wanted: Manifest,
    inputs: _Inputs,
    hashes: dict[Path, str],
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
) -> None:
    remedy = f"'{folder}' exists already: choose another output folder or delete it"
    try:
        check_domains(existing, wanted.domains)
        check_tokenizer(existing, tokenizer)
    except SRDEError as error:
        raise SRDEError(f"{remedy}. {error}") from None
    for key in ("max_length", "too_long", "seed", "train_on", "packing"):
        built, asked = getattr(existing, key), getattr(wanted, key)
        if built != asked:
            raise SRDEError(f"{remedy}. It was built with {key}={built}, not {asked}.")
    needed = ["train", *(["validation"] if inputs.eval_file else []), *existing.splits]
    made_from = {split: entry.file_sha256 for split, entry in existing.splits.items()}
    if any(made_from.get(split) != hashes[inputs.path(split)] for split in needed):
        raise SRDEError(f"{remedy}. It was built from other files or other content.")


def _check_records(inputs: _Inputs, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Read every line once: syntax, domains without records, held-out prompts that training would see.

    Returns:
        the splits that have records.
    """
    held_out: dict[int, str] = {}
    trained: set[int] = set()
    counts: Counter[str] = Counter()
    splits: Counter[str] = Counter()
    files = [inputs.jsonl_data, *([inputs.eval_file] if inputs.eval_file else [])]
    for path in files:
        for record in read_jsonl(path, inputs.domains):
            check_markers(tokenizer, record)
            split = "validation" if path == inputs.eval_file else record.split
            if split == "validation" and inputs.eval_file and path != inputs.eval_file:
                raise SRDEError(f"{record.where}: a validation record, with eval_file={inputs.eval_file}: keep one.")
            splits[split] += 1
            if split == "train":
                counts[record.domain] += 1
                trained.update(map(hash, _prompts(record)))
            else:
                held_out.setdefault(hash(_prompts(record)[-1]), record.where)
    empty = [domain for domain in inputs.domains if not counts[domain]]
    if empty:
        raise SRDEError(
            f"'{inputs.jsonl_data}' has no record of domain '{empty[0]}': add some, or leave it out of domains."
        )
    leaked = [prompt for prompt in held_out if prompt in trained]
    if leaked:
        where = next(r.where for r in inputs.records("train") if leaked[0] in map(hash, _prompts(r)))
        first = f"{held_out[leaked[0]]} = {where}"
        raise SRDEError(
            f"'{files[-1]}': {len(leaked)} held-out prompts occur in the training file too, the first is {first}: "
            "remove them from one of the files."
        )
    return [split for split in SPLITS if splits[split]]


def _prompts(record: Record) -> list[Any]:
    """What stands before each response, without the system message."""
    turns = [(m["role"], m["content"]) for m in record.messages if m["role"] != "system"]
    return [tuple(turns[:i]) for i, (role, _) in enumerate(turns) if role == "assistant"]


Batch = list[tuple[str, Document]]
"""(domain, document) pairs"""
Tokenized = Callable[[Iterator[list[Record]]], Iterable[Batch]]
"""Batches of records to batches of documents, in the same order"""


def _write_split(
    split: str,
    inputs: _Inputs,
    hashes: dict[Path, str],
    folder: Path,
    manifest: Manifest,
    pad_id: int,
    tokenized: Tokenized,
) -> Split:
    """Tokenise, pack and write one split; only a buffer of documents a domain is held in memory."""
    path = inputs.path(split)
    parts = folder / "parts"
    parts.mkdir()
    options: dict[str, Any] = {"domains": manifest.domains, "max_length": manifest.max_length, "pad_id": pad_id}
    options |= {"too_long": manifest.too_long, "seed": manifest.seed, "packing": manifest.packing}
    with ExitStack() as stack:
        rows = {
            domain: stack.enter_context(DomainRows(parts / f"{number}.arrow", domain=domain, **options))
            for number, domain in enumerate(manifest.domains)
        }
        records = inputs.records(split)
        batches = iter(lambda: list(islice(records, RECORDS_A_BATCH)), [])
        for domain, document in chain.from_iterable(tokenized(batches)):
            rows[domain].add(document)
    for domain, made in rows.items():
        if made.counts.documents and not made.counts.rows:
            raise SRDEError(
                f"'{path}': all {made.counts.documents} documents of domain '{domain}' are longer than "
                f"max_length={manifest.max_length}: raise max_length, or give --too_long truncate."
            )
    written = write_split(
        folder / split,
        [parts / f"{number}.arrow" for number in range(len(rows))],
        made_from=(str(path), hashes[path]),
        counts={domain: made.counts for domain, made in rows.items()},
        digests=[made.digest.hexdigest() for made in rows.values()],
        max_length=manifest.max_length,
    )
    shutil.rmtree(parts)
    return written


@contextmanager
def _tokenizing(tokenizer: PreTrainedTokenizerBase, num_processes: int) -> Iterator[Tokenized]:
    if num_processes == 1:
        yield partial(map, partial(_tokenize_batch, tokenizer))
        return
    try:
        with worker_pool(num_processes, partial(_set_tokenizer, tokenizer)) as pool:
            yield partial(_in_order, pool)
    except BrokenProcessPool:
        raise process_died(num_processes) from None


def _in_order(pool: ProcessPoolExecutor, batches: Iterator[list[Record]]) -> Iterator[Batch]:
    """The results in the order of the batches, of which few are under way, so that memory does not grow."""
    waiting: deque[Future[Batch]] = deque()
    for batch in batches:
        waiting.append(pool.submit(_work, batch))
        if len(waiting) == BATCHES_UNDER_WAY:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()


def _tokenize_batch(tokenizer: PreTrainedTokenizerBase, records: list[Record]) -> Batch:
    documents = tokenize(records, tokenizer)
    return [(record.domain, document) for record, document in zip(records, documents, strict=True)]


_worker_tokenizer: PreTrainedTokenizerBase


def _set_tokenizer(tokenizer: PreTrainedTokenizerBase) -> None:
    global _worker_tokenizer
    _worker_tokenizer = tokenizer


def _work(records: list[Record]) -> Batch:
    return _tokenize_batch(_worker_tokenizer, records)


def file_hash(path: Path) -> str:
    """SHA-256 of a file.

    Raises:
        SRDEError: it is not there or cannot be read.
    """
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except FileNotFoundError:
        raise SRDEError(f"no such file '{path}': give an existing JSONL file.") from None
    except OSError as error:
        raise SRDEError(f"'{path}' cannot be read: {error.strerror}.") from None
