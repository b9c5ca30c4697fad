"""Reads JSON lines, JSON arrays, Parquet, Arrow, CSV, TSV and plain text, also compressed with gzip or Zstandard.

Each record comes with its place, `file:line` if the file has lines. A bad record does not stop the reading: an error
that names it comes in its place.
"""

from __future__ import annotations

import codecs
import glob
import io
import json
import logging
import os
import re
import zlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO

import charset_normalizer
import pyarrow as pa
import pyarrow.parquet as pq

from srde_ds.data.conversation import kind
from srde_ds.data.delimited import cells_of
from srde_ds.errors import SRDEError

log = logging.getLogger(__name__)

Item = tuple[str, Any]
"""A record's place, and the record as a dict, or the SRDEError that says what is wrong with it"""

KINDS = {
    ".jsonl": "json",
    ".ndjson": "json",
    ".json": "json",
    ".parquet": "parquet",
    ".arrow": "arrow",
    ".csv": "csv",
    ".tsv": "tsv",
}
"""Kinds of files, by their lower-case ending. `.txt` and others hold JSON, or prompts in a file of prompts."""
COMPRESSIONS = {".gz": "gzip", ".zst": "zstd"}
MARKS = {  # longer ones first, since UTF-32's mark begins with UTF-16's
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF8: "utf-8-sig",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}
"""Byte order marks"""
BEGINNINGS = {
    b"ARROW1": "is an Arrow file: name it so that it ends in .arrow",
    b"PAR1": "is a Parquet file: name it so that it ends in .parquet",
    b"\x1f\x8b": "is compressed with gzip: name it so that it ends in .gz",
    b"\x28\xb5\x2f\xfd": "is compressed with Zstandard: name it so that it ends in .zst",
    b"BZh": "is compressed with bzip2, which is not read: unpack it, or use gzip",
    b"\xfd7zXZ\x00": "is compressed with xz, which is not read: unpack it, or use gzip",
    b"PK\x03\x04": "is a zip archive or a workbook, which is not read: unpack it, or save its table as CSV",
}
"""How files begin that are not text, and what to do with them"""
SPLIT_NAMES = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "tests", "testing", "testset", "eval", "evaluation", "heldout", "holdout"),
}
"""The words by which the Hub tells splits in names of files and folders, and sources in a column `split`"""
JSON_COLUMNS = ("messages", "conversations", "choices", "options", "tools", "functions", "weight")
"""Columns of CSV files whose cells hold JSON"""
_HEAD, _AROUND = 65_536, 2048
LARGEST_CHAOS, LEAST_COHERENCE, CLOSE_CALL = 0.1, 0.3, 0.05
"""Of charset-normalizer's guess: the most noise, and how far letters are those of a language, at least for a code page;
and a difference of the latter that decides nothing. From texts in tests/unit/test_data_files.py."""
_ROWS_A_BATCH = 1000
SEPARATORS = {"\t": "tabs", ";": "semicolons", ",": "commas"}


def find_files(name: str | Path, option: str, *, tell: bool = True) -> list[Path]:
    """The file `name`, the files of records in a folder `name`, or those that match a pattern `name`; sorted.

    Args:
        tell: log what a folder holds beside them.

    Raises:
        SRDEError: there is no file, or it can be read only once, like a pipe.
    """
    path = Path(name)
    if path.is_dir():
        if (path / "dataset_dict.json").is_file():
            raise SRDEError(
                f"{option}={name}: holds a folder for each split, made by save_to_disk. Give one of them, such as "
                f"'{path}/train'."
            )
        saved = (path / "state.json").is_file() and (path / "dataset_info.json").is_file()  # by save_to_disk
        inside = sorted(p for p in path.iterdir() if not p.name.startswith("."))
        found = [p for p in inside if p.is_file() and ending(p)[0] in KINDS]
        if saved:  # the rows alone, without what `map` has left beside them
            found = [p for p in found if p.suffix == ".arrow" and not p.name.startswith("cache-")]
        deeper = ""
        if any(p.is_dir() for p in inside):
            deeper = f" For its folders, give a pattern such as '{path}/**/*.jsonl'."
        if not found:
            raise SRDEError(f"{option}={name}: the folder holds no file of records ({', '.join(KINDS)}).{deeper}")
        if not saved and (others := [f"{p.name}/" if p.is_dir() else p.name for p in inside if p not in found]):
            log.log(logging.INFO if tell else logging.DEBUG, "%s: not read: %s.%s", name, ", ".join(others), deeper)
        return found
    if path.exists():
        if not path.is_file():
            raise SRDEError(f"{option}={name}: is a pipe or a device, which can be read only once. Save it to a file.")
        return [path]
    matched = sorted(p for p in map(Path, glob.glob(str(name), recursive=True)) if p.is_file())
    if not matched:
        raise SRDEError(f"{option}={name}: no such file. Give an existing file, a folder or a quoted pattern.")
    return matched


def splits_by_name(paths: Sequence[Path]) -> dict[Path, str]:
    """The split that a file's name says, or else the nearest of its folders below the folder of all.

    There is none unless the names tell training files from others.
    """
    named = _named_splits(paths)
    return named if {"train"} < set(named.values()) else {}


def warn_of_test_files(paths: Sequence[Path]) -> None:
    """Warn of training files whose names say that they are held out, where none is named for training."""
    named = _named_splits(paths)
    if named and "train" not in named.values() and len(named) < len(paths):
        log.warning(
            "%s: trained on, although the name says that it is held out, since no file is named for training. To hold "
            "it out, give it as --eval_file and the others alone; or name the others train.",
            ", ".join(map(str, named)),
        )


def _named_splits(paths: Sequence[Path]) -> dict[Path, str]:
    root = os.path.commonpath([path.parent for path in paths])
    names = {path: [path.name, *reversed(path.parent.relative_to(root).parts)] for path in paths}
    splits = {path: next(filter(None, map(_named_split, names[path])), None) for path in paths}
    return {path: split for path, split in splits.items() if split is not None}


def _named_split(name: str) -> str | None:
    words = set(re.split(r"[-._ \d]+", name.lower()))
    found = [split for split, names in SPLIT_NAMES.items() if words.intersection(names)]
    return found[0] if len(found) == 1 else None


def names_held_out_split(value: str) -> bool:
    """Whether a word of a record's split, such as `test_sft`, is one for validation or test data."""
    words = set(re.split(r"[\W\d_]+", value.lower()))
    return any(words.intersection(names) for split, names in SPLIT_NAMES.items() if split != "train")


def ending(path: Path) -> tuple[str, str | None]:
    """The lower-case ending of a file, without that of the compression, and the compression."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    compression = COMPRESSIONS.get(suffixes[-1]) if suffixes else None
    if compression:
        suffixes.pop()
    return suffixes[-1] if suffixes else "", compression


def read_items(path: Path, *, encoding: str | None = None, prompts: bool = False) -> Iterator[Item]:
    """Every record of a file. Blank lines are skipped.

    Args:
        encoding: encoding of the text; None: as the byte order mark says, else UTF-8.
        prompts: whether a file whose ending is not in KINDS holds a prompt on each line.

    Raises:
        SRDEError: the file as a whole cannot be read, or is empty.
    """
    suffix, compression = ending(path)
    holds = KINDS.get(suffix, "text" if prompts else "json")
    if encoding is not None:
        _check_encoding(encoding)
    readers = {"parquet": _parquet, "arrow": _arrow, "csv": _table, "tsv": _table, "text": _text_lines, "json": _json}
    empty = True
    with _errors(path):
        if compression is None and holds not in ("parquet", "arrow"):
            _check_beginning(path)
        for item in readers[holds](path, compression, encoding):
            empty = False
            yield item
    if empty:
        raise SRDEError(f"'{path}' is empty: it must hold at least one record.")


def has_plain_lines(path: Path) -> bool:
    """Whether a file holds plain UTF-8 JSON lines, without a byte order mark and without compression."""
    suffix, compression = ending(path)
    if compression or KINDS.get(suffix, "json") != "json":
        return False
    head = _head(path, compression)
    start = head.decode("utf-8", "ignore").lstrip()
    return not (head.startswith(tuple(MARKS)) or start.startswith("[") or _is_spread(start, suffix))


def _check_beginning(path: Path) -> None:
    with path.open("rb") as file:
        head = file.read(max(map(len, BEGINNINGS)))
    said = next((said for beginning, said in BEGINNINGS.items() if head.startswith(beginning)), None)
    if said is not None:
        raise SRDEError(f"'{path}' {said}.")


def _check_encoding(encoding: str) -> None:
    try:
        codecs.lookup(encoding)
    except LookupError:
        raise SRDEError(f"encoding={encoding}: no such encoding. Give one such as utf-8, gbk or cp1252.") from None


@contextmanager
def _errors(path: Path) -> Iterator[None]:
    try:
        yield
    except UnicodeError as error:
        raise SRDEError(f"'{path}' {_not_text(error)}.") from None
    except OSError as error:
        raise SRDEError(f"'{path}' cannot be read: {error.strerror or ' '.join(str(error).split())}.") from None
    except (EOFError, zlib.error, pa.ArrowException) as error:
        raise SRDEError(f"'{path}' cannot be read: {' '.join(str(error).split())}.") from None


def _open(path: Path, compression: str | None) -> BinaryIO:
    return io.BufferedReader(pa.input_stream(str(path), compression=compression))


def _head(path: Path, compression: str | None) -> bytes:
    with _open(path, compression) as file:
        return file.read(_HEAD)


def _encoding(head: bytes, given: str | None) -> str:
    """The encoding by its one official name."""
    marked = next((name for mark, name in MARKS.items() if head.startswith(mark)), None)
    return codecs.lookup(marked or given or "utf-8").name


# -- JSON ------------------------------------------------------------------------------------------------------------


def _json(path: Path, compression: str | None, given: str | None) -> Iterator[Item]:
    head = _head(path, compression)
    encoding = _encoding(head, given)
    start = head.decode(encoding, "ignore").lstrip()
    if start.startswith("[") or _is_spread(start, ending(path)[0]):
        yield from _whole(path, compression, encoding)
        return
    for number, line in enumerate(_lines(path, compression, encoding), 1):
        place = f"{path}:{number}"
        if isinstance(line, UnicodeError):
            yield place, SRDEError(f"{place}: {_not_text(line, head)}.")
        elif line.strip():
            yield place, _parsed(line, place)


def _is_spread(start: str, suffix: str) -> bool:
    """Whether a .json file holds a single object over many lines."""
    first, _, rest = start.partition("\n")
    return suffix == ".json" and first.strip() == "{" and bool(rest)


def _whole(path: Path, compression: str | None, encoding: str) -> Iterator[Item]:
    """Read an array of records, or one record."""
    with _open(path, compression) as file:
        content = _parsed(file.read().decode(encoding), str(path), array=True)
    if isinstance(content, SRDEError):
        raise content
    for number, record in enumerate(content if isinstance(content, list) else [content], 1):
        place = f"{path}: record {number}"
        yield place, record if isinstance(record, dict) else _no_object(record, place)


def _parsed(text: str, place: str, *, array: bool = False) -> Any:
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        return SRDEError(f"{place}: not valid JSON ({error}).")
    return content if array or isinstance(content, dict) else _no_object(content, place)


def _no_object(value: Any, place: str) -> SRDEError:
    return SRDEError(f"{place}: must be a JSON object, not {kind(value)}.")


def _lines(path: Path, compression: str | None, encoding: str) -> Iterable[str | UnicodeError]:
    """Each line, or the reason why it is not text. Only a line feed ends a line."""
    with _open(path, compression) as file:
        if encoding.startswith(("utf-16", "utf-32")):  # here a line feed's byte may be part of another character
            yield from io.TextIOWrapper(file, encoding, newline="\n")
            return
        for line in file:
            try:
                # Concatenated files may contain further marks.
                yield line.decode("utf-8-sig" if encoding == "utf-8" else encoding)
            except UnicodeError as error:
                yield error


def _not_text(error: UnicodeError, head: bytes = b"") -> str:
    """The fault and its remedy, such as `not UTF-8, looks like GBK: give --encoding gbk and look at the rows`.

    Args:
        head: the file's beginning, which says more than one line, unless all of it is UTF-8.
    """
    if not isinstance(error, UnicodeDecodeError):
        return f"not text: {error}"
    name = error.encoding.upper()
    if error.encoding not in ("utf-8", "utf8"):
        return f"not {name}: give its encoding, such as --encoding cp1252"
    head = head[: head.rfind(b"\n") + 1] or head  # no character is cut in two
    if _decodes(head, "utf-8"):
        head = bytes(error.object[max(0, error.start - _AROUND) : error.start + _AROUND])
    found = _guessed_encoding(head)
    if found is None:
        return f"not {name}: give its encoding, such as --encoding cp1252"
    return f"not {name}, looks like {found.replace('_', '-').upper()}: give --encoding {found} and look at the rows"


@lru_cache(maxsize=4)  # each bad line of a file asks
def _guessed_encoding(data: bytes) -> str | None:
    """The likeliest encoding; None: none is likely, or there is too little text to tell code pages apart.

    Where it is a close call, cp1252: the guess prefers code pages of Central Europe for some words of Western ones.
    """
    matches = list(charset_normalizer.from_bytes(data))
    if not matches or matches[0].encoding in ("ascii", "utf_8"):
        return None
    best = matches[0]
    if best.chaos > LARGEST_CHAOS or (best.multi_byte_usage == 0 and best.coherence < LEAST_COHERENCE):
        return None
    for match in matches:
        close = match.chaos <= best.chaos and match.coherence >= best.coherence - CLOSE_CALL
        if close and "cp1252" in match.could_be_from_charset:
            return "cp1252"
    if best.encoding == "gb18030":  # GBK, the better known name, if that suffices
        return "gbk" if _decodes(data, "gbk") else "gb18030"
    return best.encoding


def _decodes(data: bytes, encoding: str) -> bool:
    try:
        data.decode(encoding)
    except UnicodeError:
        return False
    return True


# -- tables and text -------------------------------------------------------------------------------------------------


def _parquet(path: Path, compression: str | None, _: str | None) -> Iterator[Item]:
    with pq.ParquetFile(_random_access(path, compression)) as table:
        yield from _rows(path, table.iter_batches(_ROWS_A_BATCH))


def _arrow(path: Path, compression: str | None, _: str | None) -> Iterator[Item]:
    """Read either of Arrow's formats; `save_to_disk` writes the one for streams."""
    with _random_access(path, compression) as file:
        if file.read(6) == b"ARROW1":
            table = pa.ipc.open_file(file)
            yield from _rows(path, (table.get_batch(number) for number in range(table.num_record_batches)))
        else:
            file.seek(0)
            yield from _rows(path, pa.ipc.open_stream(file))


def _random_access(path: Path, compression: str | None) -> Any:
    if compression is None:
        return pa.memory_map(str(path))
    with _open(path, compression) as file:
        return pa.BufferReader(file.read())


def _rows(path: Path, batches: Iterable[pa.RecordBatch]) -> Iterator[Item]:
    number = 0
    for batch in batches:
        for record in batch.to_pylist():
            number += 1
            yield f"{path}: row {number}", {key: without_nulls(value) for key, value in record.items()}


def without_nulls(value: Any) -> Any:
    """A value of a Parquet or Arrow column without the keys whose value is null.

    All rows of such a column have the same keys, so that a tool's call would get the arguments of all others as null.
    """
    if isinstance(value, dict):
        return {key: without_nulls(one) for key, one in value.items() if one is not None}
    return [without_nulls(one) for one in value] if isinstance(value, list) else value


def _table(path: Path, compression: str | None, given: str | None) -> Iterator[Item]:
    """Read a CSV or TSV file with a header. An empty cell counts as absent.

    Where the comma is the decimal sign, Excel separates cells by semicolons.
    """
    encoding = _encoding(_head(path, compression), given)

    def lines() -> Iterator[str]:
        with io.TextIOWrapper(_open(path, compression), encoding, newline="") as text:
            yield from text

    first = next(lines(), "")
    separator = "\t" if ending(path)[0] == ".tsv" else ";" if ";" in first and "," not in first else ","
    rows = cells_of(lines, separator, path)
    names = next(rows, ("", []))[1]
    if isinstance(names, SRDEError):
        raise names
    header = [name.strip() for name in names]
    if header and (not all(header) or len(set(header)) < len(header)):
        raise SRDEError(f"'{path}': its first line must name each column once: {', '.join(header)}.")
    for place, cells in rows:
        if isinstance(cells, SRDEError):
            yield place, cells
        elif len(cells) > len(header) or (cells and len(cells) < len(header)):
            count = f"has {len(cells)} cells, but the first line names {len(header)}"
            yield place, SRDEError(f"{place}: {count}. In a file like this {SEPARATORS[separator]} separate cells.")
        elif cells:
            yield place, _row({name: cell for name, cell in zip(header, cells, strict=True) if cell}, place)


def _row(cells: dict[str, Any], place: str) -> Any:
    for name in JSON_COLUMNS:
        if name in cells:
            try:
                cells[name] = json.loads(cells[name])
            except (ValueError, RecursionError) as error:
                return SRDEError(f"{place}: field '{name}' must hold JSON ({error}).")
    return cells


def _text_lines(path: Path, compression: str | None, given: str | None) -> Iterator[Item]:
    head = _head(path, compression)
    encoding = _encoding(head, given)
    for number, line in enumerate(_lines(path, compression, encoding), 1):
        place = f"{path}:{number}"
        if isinstance(line, UnicodeError):
            yield place, SRDEError(f"{place}: {_not_text(line, head)}.")
        elif line.strip():
            yield place, {"prompt": line.strip()}
