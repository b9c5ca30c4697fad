"""Formats tables of texts: aligned for the console, or in Markdown. The first row is the header."""

from __future__ import annotations

from collections.abc import Sequence

from srde_ds.utils.escape import markdown, one_line

Rows = Sequence[Sequence[str]]


def aligned_table(rows: Rows, *, right: int | None = None) -> str:
    """Format a table with two spaces between columns.

    Args:
        right: number of the first right-aligned column; None: all are left-aligned.
    """
    from tabulate import tabulate  # late: many modules import this, but few runs print a table

    columns = len(rows[0])
    left = columns if right is None else right
    sides = ["left"] * left + ["right"] * (columns - left)
    rows = [[one_line(cell) for cell in row] for row in rows]
    return tabulate(rows, tablefmt="plain", disable_numparse=True, colalign=sides)


def markdown_table(rows: Rows) -> str:
    """Format a table in Markdown; markup in cells is escaped."""
    lines = ["| " + " | ".join(map(markdown, row)) + " |" for row in rows]
    return "\n".join([lines[0], "|" + "---|" * len(rows[0]), *lines[1:]])
