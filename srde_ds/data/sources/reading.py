"""Opens a source of any kind as rows that every process can read by number."""

from __future__ import annotations

import glob
import hashlib
import json
import logging
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from importlib import metadata
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Protocol

import datasets
from huggingface_hub import HfApi

from srde_ds.data.build.artifacts import fingerprint
from srde_ds.data.files import (
    find_files,
    has_plain_lines,
    read_items,
    splits_by_name,
    warn_of_test_files,
    without_nulls,
)
from srde_ds.data.sources.examples import BrokenRow, Example, of_a_source, unanswered
from srde_ds.data.sources.formatters import FORMATTERS
from srde_ds.data.sources.registry import Source
from srde_ds.data.synthetic import tasks
from srde_ds.data.synthetic.science import SCIENCE
from srde_ds.errors import SRDEError
from srde_ds.utils.escape import one_line
from srde_ds.utils.files import file_hash
from srde_ds.utils.retry import SourceError, with_retries

log = logging.getLogger(__name__)

ROWS_A_PART = 5000
ITEMS_A_BLOCK = 1000
"""items of a reasoning-gym task that are made from one seed: some tasks draw all of them at once"""
ROWS_LOOKED_AT = 100
"""number of lines that are read to find the columns of a JSONL file"""
Maker = Callable[[int], tuple[str, str]]
"""Makes the prompt and answer of an item, by number"""


class Reader(Protocol):
    """Reads a source's rows by number. It can be pickled and sent to another process."""

    @property
    def count(self) -> int:
        """Number of rows."""
        ...

    def examples(self, start: int, stop: int) -> Iterator[Example | BrokenRow]:
        """Each row's example, which may lack an answer, or what is wrong with it."""


@dataclass(frozen=True)
class OpenSource:
    """A source ready to be read; `content` changes whenever its rows do."""

    source: Source
    reader: Reader
    revision: str
    """a commit of the Hub, a hash of the files, or the generator's version"""
    content: str
    rewritten: TemporaryDirectory[str] | None = None
    """holds the rows as they can be read, if the source has another form; exists as long as this object"""


def open_source(source: Source, *, revision: str | None, seed: int, rows: int) -> OpenSource:
    """Download or find a source and check its columns.

    Args:
        revision: the commit of a Hub source, as an earlier build found it.
        seed: seed of a generated source.
        rows: number of rows of a generated source.

    Raises:
        SourceError: it is gone, gated, unreachable or unreadable, or has other columns.
    """
    if source.generated:
        return _open_generated(source, seed, rows)
    reader: Reader
    rewritten = None
    if source.kind == "jsonl":
        paths = _files(source)
        path = paths[0]
        if len(paths) > 1 or source.encoding or not has_plain_lines(path):
            rewritten = with_retries(lambda: _rewrite(paths, source.encoding), source.name)
            path = Path(rewritten.name) / "rows.jsonl"
        starts, count, revision = with_retries(lambda: _scan_lines(path), source.name)
        columns = _columns_of(path)
        reader = JsonlReader(str(path), starts, count, source, rewritten is not None)
    else:
        if source.kind == "hub":
            revision = revision or source.revision or with_retries(lambda: _newest(source), source.name)
            hub_revision = revision
            data = with_retries(lambda: _from_hub(source, hub_revision), source.name)
            if "[" in source.split and not source.data_files:  # a slice's files hold the whole split
                folder = rewritten = TemporaryDirectory(prefix="srde-source-")
                data = with_retries(lambda: _copied(data, folder.name), source.name)
        else:
            paths = _local(source)
            revision = with_retries(lambda: _hash_files(paths), source.name)
            data = with_retries(lambda: _from_disk(source, paths), source.name)
        columns = data.column_names
        reader = ArrowReader(tuple(file["filename"] for file in data.cache_files), len(data), source)
    if reader.count == 0:
        raise SourceError("it has no rows")
    missing = [column for column in source.real_columns() if column not in columns]
    if missing:
        raise SourceError(f"its columns do not fit: there is no '{missing[0]}', only {', '.join(columns) or 'none'}")
    return OpenSource(source, reader, str(revision), fingerprint(source.location, source.config, revision), rewritten)


@dataclass(frozen=True)
class ArrowReader:
    """Rows of memory-mapped Arrow files."""

    files: tuple[str, ...]
    count: int
    source: Source

    def examples(self, start: int, stop: int) -> Iterator[Example | BrokenRow]:
        """See `Reader`."""
        data = _arrow(self.files)
        read = data.select_columns(self.source.read_columns(data.column_names))
        # As Arrow: images and sounds are not decoded, which needs further packages and fails for broken ones.
        for row in read.with_format("arrow")[start:stop].to_pylist():
            yield _formatted(self.source, {name: without_nulls(value) for name, value in row.items()})


@dataclass(frozen=True)
class JsonlReader:
    """Lines of a file; `starts` has the positions of every ROWS_A_PARTth line that is not blank."""

    path: str
    starts: tuple[int, ...]
    count: int
    source: Source
    rewritten: bool = False
    """a text in place of a row says what is wrong with it"""

    def examples(self, start: int, stop: int) -> Iterator[Example | BrokenRow]:
        """See `Reader`; `start` is a multiple of ROWS_A_PART."""
        assert start % ROWS_A_PART == 0
        with open(self.path, "rb") as file:
            file.seek(self.starts[start // ROWS_A_PART])
            lines = (line for line in file if line.strip())
            for _, line in zip(range(stop - start), lines, strict=False):
                try:
                    row = json.loads(line)
                except UnicodeDecodeError:
                    yield BrokenRow("not UTF-8: give the source's encoding, such as cp1252")
                    continue
                except (ValueError, RecursionError):
                    yield BrokenRow("not valid JSON")
                    continue
                if isinstance(row, dict):
                    yield _formatted(self.source, row)
                else:
                    yield BrokenRow(row if self.rewritten else "not a JSON object")


@dataclass(frozen=True)
class GymReader:
    """Items of a reasoning-gym task, made by number."""

    task: str
    options: str
    """as JSON"""
    seed: int
    count: int

    def examples(self, start: int, stop: int) -> Iterator[Example | BrokenRow]:
        """See `Reader`."""
        for index in range(start, stop):
            block, place = divmod(index, ITEMS_A_BLOCK)
            # An item's seed is the sum of the task's and its number, so this is item `index` of a task of any size.
            items = _gym(self.task, self.options, self.seed + block * ITEMS_A_BLOCK, ITEMS_A_BLOCK)
            try:
                item = items[place]
            except IndexError as error:
                yield BrokenRow(one_line(str(error)))
                continue
            question, answer = item["question"].strip(), item["answer"]
            yield unanswered(question) if answer is None else _task_example(question, str(answer).strip())


@dataclass(frozen=True)
class TasksReader:
    """Items of one domain of srde_ds.data.synthetic.tasks, whose tasks take turns."""

    domain: str
    seed: int
    count: int

    def examples(self, start: int, stop: int) -> Iterator[Example]:
        """See `Reader`."""
        makers = _makers(self.domain, self.seed)
        for index in range(start, stop):
            place, task = divmod(index, len(makers))
            yield _task_example(*makers[task](place))


def _task_example(prompt: str, answer: str) -> Example:
    turns = [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]
    return Example(turns, answer or None)


def _formatted(source: Source, row: dict[str, Any]) -> Example | BrokenRow:
    if source.formatter == "by_keys" and row.get("domain") not in (None, source.domain):
        return BrokenRow(f"its domain is '{row['domain']}', not '{source.domain}'")
    try:
        return FORMATTERS[str(source.formatter)].format(source.renamed(row))
    except BrokenRow as error:
        return error
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        return BrokenRow(f"{type(error).__name__} {error}")


def _newest(source: Source) -> str:
    return str(HfApi().dataset_info(source.location).sha)


def _from_hub(source: Source, revision: str) -> datasets.Dataset:
    # `data_files` are read as one split, whatever they hold.
    return datasets.load_dataset(
        source.location,
        source.config,
        split="train" if source.data_files else source.split,
        revision=revision,
        data_files=source.data_files,
    )


def _copied(data: datasets.Dataset, folder: str) -> datasets.Dataset:
    data.save_to_disk(folder)
    return datasets.load_from_disk(folder)


def _from_disk(source: Source, paths: Sequence[Path]) -> datasets.Dataset:
    if source.kind == "parquet":
        files = [glob.escape(str(path.absolute())) for path in paths]
        return datasets.load_dataset("parquet", data_files=files, split="train")
    data = datasets.load_from_disk(source.location)
    if isinstance(data, datasets.DatasetDict):
        data = data[source.split]
    if data._indices is not None:
        raise ValueError("the folder holds a selection of rows: save it after flatten_indices()")
    return data


def _local(source: Source) -> list[Path]:
    """The files of a local source, in a fixed order."""
    if source.kind == "folder":
        paths = [path for path in Path(source.location).rglob("*") if path.is_file()]
    elif Path(source.location).exists():  # its name may look like a pattern
        paths = [Path(source.location)]
    else:
        paths = [Path(path) for path in glob.glob(source.location, recursive=True)]
    if not paths:
        raise SourceError(f"no such {'folder' if source.kind == 'folder' else 'file'} '{source.location}'")
    return sorted(paths) if source.kind == "folder" else _training(sorted(paths))


def _training(paths: Sequence[Path]) -> list[Path]:
    """The files without those whose names say that they are held out."""
    warn_of_test_files(paths)
    splits = splits_by_name(paths)
    held_out = [path for path in paths if splits.get(path, "train") != "train"]
    if held_out:
        log.info("not read, by their names of splits: %s", ", ".join(map(str, held_out)))
    return [path for path in paths if path not in held_out]


def _files(source: Source) -> list[Path]:
    _local(source)  # a missing file gives the same error as for other sources
    try:
        return _training(find_files(source.location, source.kind))
    except SRDEError as error:
        raise SourceError(str(error).removeprefix(f"{source.kind}={source.location}: ").removesuffix(".")) from None


def _rewrite(paths: Sequence[Path], encoding: str | None) -> TemporaryDirectory[str]:
    """Write the records of files of any kind as plain lines, which can be read from any position."""
    folder: TemporaryDirectory[str] = TemporaryDirectory(prefix="srde-source-")
    try:
        with (Path(folder.name) / "rows.jsonl").open("w", encoding="utf-8") as lines:
            for path in paths:
                for place, row in read_items(path, encoding=encoding):
                    said = row if isinstance(row, dict) else of_a_source(row).removeprefix(f"{place}: ")
                    lines.write(json.dumps(said, default=str) + "\n")
    except SRDEError as error:
        raise SourceError(of_a_source(error)) from None
    return folder


def _hash_files(paths: Sequence[Path]) -> str:
    digest = hashlib.sha256()
    for path in paths:
        digest.update(bytes.fromhex(file_hash(path)))
    return digest.hexdigest()


def _scan_lines(path: Path) -> tuple[tuple[int, ...], int, str]:
    """The starts of every ROWS_A_PARTth line, the number of lines, and the hash of the file."""
    digest, starts, count, position = hashlib.sha256(), [], 0, 0
    with path.open("rb") as file:
        for line in file:
            digest.update(line)
            if line.strip():
                if count % ROWS_A_PART == 0:
                    starts.append(position)
                count += 1
            position += len(line)
    return tuple(starts), count, digest.hexdigest()


def _columns_of(path: Path) -> list[str]:
    """The keys in the first lines of a JSONL file. A line that is not a JSON object has none."""
    columns: dict[str, None] = {}
    with path.open("rb") as file:
        for line in islice(filter(bytes.strip, file), ROWS_LOOKED_AT):
            try:
                row = json.loads(line)
            except (ValueError, RecursionError):
                continue
            columns |= dict.fromkeys(row if isinstance(row, dict) else ())
    return list(columns)


def generator_version(source: Source) -> str:
    """The packages that make a generated source's items, and their versions.

    Raises:
        SourceError: one of them is missing.
    """
    packages = ["periodictable", "scipy"] if source.tasks == "science" else ["reasoning-gym"]
    try:
        return ", ".join(f"{package} {metadata.version(package)}" for package in packages)
    except metadata.PackageNotFoundError as error:
        raise SourceError(
            f"package '{error.name}' is missing: pip install {error.name}, or 'srde-ds[quickstart]' for all tasks"
        ) from None


def _open_generated(source: Source, seed: int, rows: int) -> OpenSource:
    revision = generator_version(source)
    rows = min(rows, source.rows) if source.rows else rows
    reader: Reader
    if source.kind == "reasoning_gym":
        options = json.dumps(source.options, sort_keys=True)
        reader = GymReader(source.location, options, seed, rows)
        first = with_retries(lambda: next(reader.examples(0, 1)), source.name)
        if isinstance(first, Example) and not first.answered:
            raise SourceError("its items have no answer, as they are scored by a function: choose another task")
    else:
        if source.location not in (*tasks.TASKS, "science"):
            raise SourceError(f"no tasks for '{source.location}', only for {', '.join(tasks.TASKS)} and science")
        reader = TasksReader(source.location, seed, rows)
    return OpenSource(source, reader, revision, fingerprint(source.location, source.options, revision, seed))


@lru_cache(maxsize=8)
def _arrow(files: tuple[str, ...]) -> datasets.Dataset:
    return datasets.concatenate_datasets([datasets.Dataset.from_file(file) for file in files])


@lru_cache(maxsize=64)
def _gym(task: str, options: str, seed: int, size: int) -> Any:
    import reasoning_gym  # takes two seconds, so only when items are made

    try:
        return reasoning_gym.create_dataset(task, size=size, seed=seed, **json.loads(options))
    except AssertionError as error:  # this is how reasoning-gym refuses an option's value
        raise ValueError(str(error)) from None


@cache
def _makers(domain: str, seed: int) -> list[Maker]:
    """One function for each task."""
    if domain == "science":
        return [_numbered(name, make, seed) for name, make in SCIENCE.items()]
    return [  # for these tasks the size bounds only iteration, which is not used
        _phrased(_gym(name, json.dumps(options, sort_keys=True), seed, 1), phrase)
        for _, name, options, phrase in tasks.TASKS[domain]
    ]


def _numbered(name: str, make: Callable[[random.Random], tuple[str, str]], seed: int) -> Maker:
    return lambda place: make(random.Random(f"{seed}/{name}/{place}"))


def _phrased(items: Any, phrase: tasks.Phrase) -> Maker:
    return lambda place: phrase(items[place])
