"""An evaluation as a table: base → srde by domain."""

from __future__ import annotations

from typing import Any

HEADER = ["domain", "items", "loss", "difference", "perplexity", "accuracy", "difference"]


def table_rows(result: dict[str, Any]) -> list[list[str]]:
    """HEADER, a row for each domain, a row for all of them. Differences are srde − base with their 95 % intervals."""
    figures = {**result["domains"], "overall": result["overall"]}
    return [HEADER, *([name, *_cells(values)] for name, values in figures.items())]


def format_table(result: dict[str, Any]) -> str:
    """The table for the console."""
    rows = table_rows(result)
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    rule = "-" * (sum(widths) + 2 * (len(widths) - 1))
    return "\n".join([lines[0], rule, *lines[1:-1], rule, lines[-1]])


def _cells(figures: dict[str, Any]) -> list[str]:
    srde, base, difference = figures["srde"], figures.get("base"), figures.get("difference")

    def pair(key: str, scale: float, form: str) -> str:
        values = [model[key] for model in (base, srde) if model]
        return " → ".join("–" if value is None else format(value * scale, form) for value in values)

    def change(key: str, scale: float, form: str) -> str:
        """The difference; without a base the figure's own interval."""
        source = difference or srde
        if source[key] is None:
            return "–"
        low, high = (format(bound * scale, form) for bound in source[f"{key}_interval"])
        return f"{format(source[key] * scale, form)} [{low}, {high}]" if difference else f"[{low}, {high}]"

    sign = "+" if difference else ""
    return [
        str(srde["items"]),
        pair("loss", 1, ".3f"),
        change("loss", 1, f"{sign}.3f"),
        pair("perplexity", 1, ".2f"),
        pair("accuracy", 100, ".0f") + " %",
        change("accuracy", 100, f"{sign}.0f"),
    ]
