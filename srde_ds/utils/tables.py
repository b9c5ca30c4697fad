"""Tables of texts: aligned for the console, in Markdown for pages. The first row is the header."""

from __future__ import annotations

from collections.abc import Sequence

from srde_ds.utils.escape import markdown, one_line

Rows = Sequence[Sequence[str]]


def aligned_table(rows: Rows, *, right: int | None = None) -> str:
    """Columns two spaces apart.

    Args:
        right: number of the first column whose cells end, rather than begin, under each other; None: no column's do.
    """
    from tabulate import tabulate  # late: many modules draw a table, few runs do

    columns = len(rows[0])
    left = columns if right is None else right
    sides = ["left"] * left + ["right"] * (columns - left)
    rows = [[one_line(cell) for cell in row] for row in rows]
    return tabulate(rows, tablefmt="plain", disable_numparse=True, colalign=sides)


def markdown_table(rows: Rows) -> str:
    """In Markdown; cells are text, whose marks mean nothing."""
    lines = ["| " + " | ".join(map(markdown, row)) + " |" for row in rows]
    return "\n".join([lines[0], "|" + "---|" * len(rows[0]), *lines[1:]])
