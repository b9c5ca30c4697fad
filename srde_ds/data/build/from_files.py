"""Builds a folder of packed rows from files whose records are taken as they are."""

from __future__ import annotations

import hashlib
import json
import logging
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import KW_ONLY, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Self

import pyarrow as pa
from transformers import PreTrainedTokenizerBase

from srde_ds.config import DataConfig
from srde_ds.data.build.artifacts import Artifact, ArtifactStore, one_build
from srde_ds.data.build.input_checks import InputChecks
from srde_ds.data.build.rows_folder import Documents, check_replaceable, write_rows
from srde_ds.data.build.tables import write_table
from srde_ds.data.build.tokens import DOCUMENTS_A_FILE, Tokens, set_tokenizer, tokenize_records
from srde_ds.data.conversation import TrainOn
from srde_ds.data.files import find_files, splits_by_name
from srde_ds.data.inputs import BadRecords, ReadOptions, only_held_out, read_records
from srde_ds.data.manifest import (
    FORMAT_VERSION,
    Manifest,
    check_domains,
    check_tokenizer,
    load_manifest,
    tokenizer_identity,
)
from srde_ds.data.packing import pad_token_id
from srde_ds.data.records import SPLITS, Record
from srde_ds.errors import SRDEError
from srde_ds.utils.files import file_hash, scratch_folder

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class RowsOfFiles:
    """The files of a build (each option is a path, a folder or a pattern), how they are read, and how their records
    become rows. The fields are options of the same names, apart from two.

    Attributes:
        reading: the options of how files are read.
        optional_domains: domains that need no training records.
    """

    jsonl_data: str | Path
    eval_file: str | Path | None
    domains: list[str]
    reading: ReadOptions = field(default_factory=ReadOptions)
    train_on: TrainOn = "all"
    optional_domains: Sequence[str] = ()
    _: KW_ONLY
    max_length: int
    too_long: str
    seed: int
    packing: bool = True

    @classmethod
    def of(cls, data: DataConfig, seed: int, jsonl_data: str | Path, domains: Sequence[str] | None = None) -> Self:
        """How these files become rows for a run with these options; `domains` defaults to the run's."""
        return cls(
            jsonl_data=jsonl_data,
            eval_file=data.eval_file,
            domains=list(domains or data.domains),
            reading=ReadOptions.of(data),
            train_on=data.train_on,
            max_length=data.max_length,
            too_long=data.too_long,
            seed=seed,
            packing=data.packing,
        )

    def name(self, split: str) -> str:
        """The option's value that a split's records come from."""
        return str(self.eval_file if self.eval_file and split == "validation" else self.jsonl_data)

    def records(self, bad: BadRecords) -> Iterator[tuple[str, Record]]:
        """The split and the record, for all records. Those of `eval_file` make up the split validation, but for those
        that it says are for training.

        Raises:
            SRDEError: `jsonl_data` holds a validation record as well.
        """
        how: dict[str, Any] = {"options": self.reading, "bad": bad, "train_on": self.train_on}
        for record in read_records(self.jsonl_data, self.domains, **how):
            if record.split == "validation" and self.eval_file:
                raise SRDEError(f"{record.where}: a validation record besides eval_file={self.eval_file}: keep one.")
            yield record.split, record
        if self.eval_file:
            records = list(read_records(self.eval_file, self.domains, option="eval_file", **how))
            yield from (("validation", record) for record in only_held_out(records, self.eval_file))

    def files(self) -> dict[str, list[Path]]:
        """The files by option's value."""
        options = {str(self.jsonl_data): "jsonl_data"} | ({str(self.eval_file): "eval_file"} if self.eval_file else {})
        return {name: find_files(name, option, tell=False) for name, option in options.items()}

    def hashes(self) -> dict[str, str]:
        """SHA-256 by option's value: of the file, or of the hashes of several files in order."""
        return {name: files_hash(paths) for name, paths in self.files().items()}

    def named_splits(self) -> list[str]:
        """The split that each file's name says, or an empty text, in the order of `files`."""
        found = [(paths, splits_by_name(paths)) for paths in self.files().values()]
        return [splits.get(path, "") for paths, splits in found for path in paths]


def build_dataset(
    inputs: RowsOfFiles,
    output_dir: str | Path,
    tokenizer: PreTrainedTokenizerBase,
    *,
    num_processes: int = 1,
    overwrite: bool = False,
) -> Manifest:
    """Write `output_dir/train/`, the held-out splits and `output_dir/manifest.json`.

    Held out are the records of `eval_file` (split validation), and records of `jsonl_data` that name their split. The
    folder appears complete or not at all. A folder that was built from the same files, tokenizer and options is used as
    it is. All input is checked before the first record is tokenised.

    Raises:
        SRDEError: bad input, a domain without records, held-out prompts in the training files, or, without `overwrite`,
            a folder that holds something else. Even with it, a folder that no build has made.
    """
    output_dir = Path(output_dir)
    if not output_dir.name:
        raise SRDEError(f"output='{output_dir}' is no name for a new folder. Give another one.")
    if overwrite:
        check_replaceable(output_dir, [path for paths in inputs.files().values() for path in paths])
    hashes = inputs.hashes()
    made_for = inputs.max_length, inputs.too_long, inputs.seed, inputs.domains, tokenizer_identity(tokenizer)
    manifest = Manifest(FORMAT_VERSION, *made_for, splits={})
    manifest.reading, manifest.train_on = inputs.reading.to_dict(), inputs.train_on
    manifest.packing, manifest.named_splits = inputs.packing, inputs.named_splits()
    if not overwrite and output_dir.exists() and (not output_dir.is_dir() or any(output_dir.iterdir())):
        existing = load_manifest(output_dir)
        _check_same(existing, manifest, inputs, hashes, tokenizer, output_dir)
        log.info("'%s' was built from the same files and options, so it is used as it is", output_dir)
        return existing
    with ExitStack() as stack:
        building = output_dir.with_name(f"{output_dir.name}.building")
        try:
            stack.enter_context(one_build(output_dir, building.with_name(f"{building.name}.lock")))
            scratch = stack.enter_context(scratch_folder(building))
        except OSError as error:
            raise SRDEError(f"'{output_dir}' cannot be made: {error.strerror}. Choose another folder.") from None
        with ArtifactStore(scratch / "artifacts", num_processes, partial(set_tokenizer, tokenizer)) as store:
            records = _RecordFiles(scratch)
            manifest.bad_records = check_files(inputs, tokenizer, records.add)
            documents, refused = _tokenize(records.close(), inputs, store)
            manifest.bad_records += refused
            _check_trained(documents, inputs)
            made_from = {split: (inputs.name(split), hashes[inputs.name(split)]) for split in SPLITS}
            write_rows(output_dir, manifest, documents, made_from, pad_token_id(tokenizer), store)
    return manifest


def check_files(
    inputs: RowsOfFiles, tokenizer: PreTrainedTokenizerBase, keep: Callable[[str, Record], None] | None = None
) -> int:
    """Read all records and refuse what cannot be trained on, before anything is tokenised.

    Args:
        keep: is called with the split and record of each good record.

    Returns:
        The number of bad records left out.

    Raises:
        SRDEError: bad records, a domain without training records, held-out prompts in the training files.
    """
    bad, checks = BadRecords(), InputChecks(inputs.domains, tokenizer)
    for split, record in inputs.records(bad):
        try:
            checks.add(split, record)
        except SRDEError as error:
            bad.add(error)
            continue
        if keep is not None:
            keep(split, record)
    bad.report(inputs.reading.on_bad_record)
    held_out = str(inputs.eval_file or inputs.jsonl_data)
    checks.finish(str(inputs.jsonl_data), held_out, optional=inputs.optional_domains)
    return bad.count


def _check_same(
    existing: Manifest,
    wanted: Manifest,
    inputs: RowsOfFiles,
    hashes: dict[str, str],
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
) -> None:
    remedy = f"'{folder}' exists already: choose another output folder or delete it"
    try:
        check_domains(existing, wanted.domains)
        check_tokenizer(existing, tokenizer)
    except SRDEError as error:
        raise SRDEError(f"{remedy}. {error}") from None
    for key in ("max_length", "too_long", "seed", "train_on", "packing", "reading"):
        built, asked = getattr(existing, key), getattr(wanted, key)
        if built != asked:
            raise SRDEError(f"{remedy}. It was built with {key}={built}, not {asked}.")
    needed = ["train", *(["validation"] if inputs.eval_file else []), *existing.splits]
    made_from = {split: entry.file_sha256 for split, entry in existing.splits.items()}
    if any(made_from.get(split) != hashes[inputs.name(split)] for split in needed):
        raise SRDEError(f"{remedy}. It was built from other files or other content.")
    if existing.named_splits not in (None, wanted.named_splits):
        raise SRDEError(f"{remedy}. It was built when the names of the files told other splits.")


class _RecordFiles:
    """Records on disk, by split and domain, in files that are tokenised one at a time to bound memory."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._files: dict[tuple[str, str], list[tuple[Path, int]]] = defaultdict(list)
        self._lines: dict[tuple[str, str], list[str]] = defaultdict(list)

    def add(self, split: str, record: Record) -> None:
        lines = self._lines[split, record.domain]
        lines.append(json.dumps(vars(record), ensure_ascii=False))
        if len(lines) == DOCUMENTS_A_FILE:
            self._write((split, record.domain))

    def close(self) -> dict[tuple[str, str], list[tuple[Path, int]]]:
        """The files and their numbers of records, by split and domain."""
        for place in [place for place, lines in self._lines.items() if lines]:
            self._write(place)
        return self._files

    def _write(self, place: tuple[str, str]) -> None:
        lines = self._lines.pop(place)
        path = self._folder / f"{sum(map(len, self._files.values()))}.arrow"
        write_table(path, pa.table({"line": pa.array(lines, pa.large_string())}))
        self._files[place].append((path, len(lines)))


def _tokenize(
    files: dict[tuple[str, str], list[tuple[Path, int]]], inputs: RowsOfFiles, store: ArtifactStore
) -> tuple[dict[tuple[str, str], Documents], int]:
    """The documents of each split and domain, in the order of the records, and the number of records left out."""
    work = [_tokenizing(path, count) for of_place in files.values() for path, count in of_place]
    tokenized = iter(store.run("tokens", tokenize_records, work))
    bad = BadRecords()
    documents = {place: Documents([], [], []) for place in _places(files, inputs.domains)}
    for place, of_place in files.items():
        for artifact in (next(tokenized) for _ in of_place):
            _add(documents[place], artifact, bad)
    bad.report(inputs.reading.on_bad_record)
    return documents, bad.count


def _check_trained(documents: dict[tuple[str, str], Documents], inputs: RowsOfFiles) -> None:
    """Refuse a domain all of whose training records turned out to be bad when they were tokenised.

    Raises:
        SRDEError: with the domain and the remedy.
    """
    for (split, domain), made in documents.items():
        if split == "train" and not made.index_of and domain not in inputs.optional_domains:
            raise SRDEError(
                f"'{inputs.jsonl_data}': all records of domain '{domain}' are bad, as the report says: correct them, "
                "or leave it out of domains."
            )


def _places(files: dict[tuple[str, str], Any], domains: Sequence[str]) -> list[tuple[str, str]]:
    """Every domain, for each split that has records."""
    splits = {split for split, _ in files}
    return [(split, domain) for split in SPLITS if split in splits for domain in domains]


def _tokenizing(path: Path, count: int) -> tuple[str, dict[str, Any]]:
    return path.stem, {"parts": [str(path)], "part_of": [0] * count, "index_of": list(range(count))}


def _add(documents: Documents, artifact: Artifact, bad: BadRecords) -> None:
    """Add the documents of a file of tokens, except those that cannot be used."""
    number = len(documents.files)
    documents.files.append(artifact)
    tokens = Tokens(artifact.path)
    for index, fault in enumerate(map(str.__add__, tokens.markers, tokens.refusals)):
        if fault:
            bad.add(SRDEError(fault))
        else:
            documents.file_of.append(number)
            documents.index_of.append(index)


def files_hash(paths: Sequence[Path]) -> str:
    """SHA-256 of a file, or of the hashes of several files.

    Raises:
        SRDEError: a file cannot be read.
    """
    hashes = [_readable_hash(path) for path in paths]
    return hashes[0] if len(hashes) == 1 else hashlib.sha256("".join(hashes).encode()).hexdigest()


def _readable_hash(path: Path) -> str:
    try:
        return file_hash(path)
    except FileNotFoundError:
        raise SRDEError(f"no such file '{path}': give an existing file.") from None
    except OSError as error:
        raise SRDEError(f"'{path}' cannot be read: {error.strerror}.") from None
