"""Takes the lines of CSV and TSV files apart."""

from __future__ import annotations

import csv
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from srde_ds.errors import SRDEError

LONGEST_CELL = 2**27
"""most bytes in a cell"""
_CELL = r'(?:"(?:[^"]++|"")*+"|[^"\t\r\n]*+)'
_QUOTED_ROW = re.compile(rf"{_CELL}(?:\t{_CELL})*+[\r\n]*")


class _Row(NamedTuple):
    """A row as quoting would have it."""

    start: int
    """number of lines before it"""
    lines: list[str]
    cells: list[str]
    fault: str
    """why quoting cannot be"""


def cells_of(
    lines: Callable[[], Iterable[str]], separator: str, path: Path
) -> Iterator[tuple[str, list[str] | SRDEError]]:
    """The place and the cells of each row, the header's first, or why it cannot be read.

    Many programs write TSV without quoting. Then a quote that begins a cell is text, but seems to open a cell that goes
    on over the rows below. So all rows of a TSV file are looked at first: those that only one reading fits decide for
    those that both fit. If they disagree, or there are none, each row of several lines is refused.

    Args:
        lines: begins the file anew at each call.

    Raises:
        SRDEError: a quote neither encloses a cell nor can be text; with the line.
    """
    csv.field_size_limit(LONGEST_CELL)
    found = {"quoted"}
    if separator == "\t":
        found = {only for _, only in _rows(lines(), separator)} - {""}
    width = 0
    for row, only in _rows(lines(), separator):
        width = width or len(row.cells)
        first, last = row.start + 1, row.start + len(row.lines)
        if found == {"plain"} or only == "plain":
            yield from ((f"{path}:{number}", cells) for number, cells in enumerate(_unquoted(row.lines), first))
        elif row.fault:
            lengths = {number: len(cells) for number, cells in enumerate(_unquoted(row.lines), first) if cells}
            wrong = [number for number, length in lengths.items() if separator == "\t" and width not in (0, length)]
            as_text = f", and as text it would leave line {wrong[0]} with {lengths[wrong[0]]} cells" if wrong else ""
            raise SRDEError(
                f"{path}:{first}: a quote does not enclose its cell ({row.fault}){as_text}. Enclose the cell in quotes "
                'and write each quote in it twice (""), or save the records as JSONL.'
            )
        elif first < last and len(row.cells) == width and found != {"quoted"}:
            fault = (
                f"{path}:{first}: lines {first} to {last} are one row if a quote encloses its cell, and several if it "
                "is text; no other row decides it. Save the records as CSV or JSONL."
            )
            yield f"{path}:{first}", SRDEError(fault)
        else:
            yield f"{path}:{last}", row.cells


def _rows(lines: Iterable[str], separator: str) -> Iterator[tuple[_Row, str]]:
    """Each row, with the reading that it alone allows: `quoted`, `plain`, or nothing."""
    taken: list[str] = []

    def noted() -> Iterator[str]:
        for line in lines:
            taken.append(line)
            yield line

    rows = csv.reader(noted(), delimiter=separator, strict=True)
    header = None
    while True:
        start, fault = rows.line_num, ""
        taken.clear()
        try:
            cells = next(rows, None)
        except csv.Error as error:
            cells, fault = [], str(error).replace("\t", "tab")
        if cells is None:
            return
        row = _Row(start, taken.copy(), cells, fault)
        header = header or row
        yield row, _only(row, header) if separator == "\t" else ""


def _only(row: _Row, header: _Row) -> str:
    text, width = "".join(row.lines), len(header.cells)
    if '"' not in text:
        return ""
    quoted = not row.fault and len(row.cells) == width and _QUOTED_ROW.fullmatch(text) is not None
    end = header.lines[0].removeprefix(header.lines[0].rstrip("\r\n"))
    ends = all(line.endswith(end) for line in row.lines[:-1])  # CRLF, for many programs, but LF in a cell
    plain = ends and all(len(cells) == width for cells in _unquoted(row.lines) if cells)
    if quoted and (not plain or row is header):
        return "quoted"  # no program writes quotes around a header as text
    return "plain" if plain and not quoted else ""


def _unquoted(lines: list[str]) -> list[list[str]]:
    """The cells of lines without quoting; a blank line has none."""
    return [line.rstrip("\r\n").split("\t") if line.strip("\r\n") else [] for line in lines]
