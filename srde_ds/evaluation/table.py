"""An evaluation as tables: base → srde by domain and by source, and each expert alone."""

from __future__ import annotations

from typing import Any

from srde_ds.utils.tables import aligned_table

HEADER = ["items", "loss", "difference", "perplexity", "accuracy", "difference", "McNemar p"]


def table_rows(result: dict[str, Any]) -> list[list[str]]:
    """A header, a row for each domain, and a row for all. Differences are srde − base with their 95 % intervals."""
    return _rows("domain", {**result["domains"], "overall": result["overall"]})


def source_rows(result: dict[str, Any]) -> list[list[str]]:
    """The same for each source."""
    return _rows("source", result["sources"])


def expert_rows(result: dict[str, Any]) -> list[list[str]]:
    """Held-out loss of every domain with each expert alone, then with routed experts, then of the base."""
    table = result["each_expert"]
    rows = [[f"{name} alone", *values] for name, values in zip(table["experts"], table["loss"], strict=True)]
    for title, model in (("as routed", "srde"), ("base", "base")):
        if model in result["overall"]:
            rows.append([title, *(result["domains"][domain][model]["loss"] for domain in table["domains"])])
    return [
        ["loss", *table["domains"]],
        *([title, *("–" if loss is None else f"{loss:.3f}" for loss in losses)] for title, *losses in rows),
    ]


def format_tables(result: dict[str, Any]) -> str:
    """The tables for the console: by domain, by source if there are several, and for each expert if requested."""
    parts = [_format(table_rows(result), last_apart=True)]
    if len(result["sources"]) > 1:
        parts.append(_format(source_rows(result)))
    if "each_expert" in result:
        parts.append(_format(expert_rows(result)))
    return "\n\n".join(parts)


def _format(rows: list[list[str]], *, last_apart: bool = False) -> str:
    lines = aligned_table(rows).splitlines()
    rule = "-" * max(map(len, lines))
    return "\n".join([lines[0], rule, *lines[1:-1], *([rule] if last_apart else []), lines[-1]])


def _rows(title: str, figures: dict[str, Any]) -> list[list[str]]:
    return [[title, *HEADER], *([name, *_cells(values)] for name, values in figures.items())]


def _cells(figures: dict[str, Any]) -> list[str]:
    srde, base, difference = figures["srde"], figures.get("base"), figures.get("difference")

    def pair(key: str, scale: float, form: str) -> str:
        values = [model[key] for model in (base, srde) if model]
        return " → ".join("–" if value is None else format(value * scale, form) for value in values)

    def change(key: str, scale: float, form: str) -> str:
        """The difference, or without a base the figure's interval."""
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
        f"{difference['mcnemar_p']:.2g}" if difference and srde["scored"] else "–",
    ]
