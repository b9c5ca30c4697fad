"""Takes the lines of CSV and TSV files apart."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Iterator
from pathlib import Path

from srde_ds.errors import SRDEError

LONGEST_CELL = 2**27
"""most bytes in a cell"""


def cells_of(lines: Iterable[str], separator: str, path: Path) -> Iterator[tuple[str, list[str]]]:
    """The place and the cells of each row, the header's first.

    Many programs write TSV without quoting. Then a quote that begins a cell is text, but seems to open a cell that goes
    on over the rows below. Where each of these lines has the header's number of cells by itself, they are rows.

    Raises:
        SRDEError: a quote neither encloses a cell nor can be text; with the line.
    """
    csv.field_size_limit(LONGEST_CELL)
    taken: list[str] = []

    def noted() -> Iterator[str]:
        for line in lines:
            taken.append(line)
            yield line

    rows = csv.reader(noted(), delimiter=separator, strict=True)
    width = 0
    while True:
        start, fault = rows.line_num, ""
        taken.clear()
        try:
            cells = next(rows, None)
        except csv.Error as error:
            cells, fault = [], str(error).replace("\t", "tab")
        if cells is None:
            return
        plain = [line.rstrip("\r\n").split("\t") for line in taken] if separator == "\t" and width else []
        doubtful = fault or len(cells) != width or (len(plain) > 1 and any("\t" in cell for cell in cells))
        if plain and doubtful and all(len(row) == width and all(row) for row in plain):
            yield from ((f"{path}:{number}", row) for number, row in enumerate(plain, start + 1))
        elif fault:
            raise SRDEError(
                f"{path}:{start + 1}: a quote does not enclose its cell ({fault}). Enclose the cell in quotes and "
                'write each quote in it twice (""), or save the records as JSONL.'
            )
        else:
            width = width or len(cells)
            yield f"{path}:{rows.line_num}", cells
