"""The figures of a build as tables, for its report and its page."""

from __future__ import annotations

from typing import Any

from srde_ds.data.build.options import BuildSummary
from srde_ds.data.build.selection import REFUSED
from srde_ds.data.manifest import Manifest
from srde_ds.data.records import SPLITS

RULES = (
    "no answer", "broken", "empty", "exact duplicate", "near duplicate", "in an evaluation set", "held-out question",
    "end marker in a response", REFUSED, "too long",
)  # fmt: skip
"""the rules that leave rows out, in their order"""


def domain_rows(build: BuildSummary) -> list[list[str]]:
    """Documents and tokens of each domain, and how many it lacks."""
    rows = [["domain", "documents", *SPLITS, "tokens", "missing"]]
    for domain, figures in build.domains.items():
        splits = [f"{figures['by_split'][split]:,}" for split in SPLITS]
        tokens = f"{figures['tokens']:,}" if figures["tokens"] else "-"
        rows.append([domain, f"{figures['documents']:,}", *splits, tokens, f"{figures['missing']:,}"])
    return rows


def removal_rows(build: BuildSummary) -> list[list[str]]:
    """How many rows of each source each rule left out."""
    rules = [rule for rule in RULES if any(source["counts"].get(rule) for source in build.sources)]
    rows = [["source", "domain", "read", "normalised", *rules, "chosen"]]
    for source in build.sources:
        counts = source["counts"]
        shown = [f"{counts.get(column, 0):,}" for column in ("read", "normalised", *rules, "chosen")]
        rows.append([source["name"], source["domain"], *shown])
    return rows


def source_rows(build: BuildSummary) -> list[list[str]]:
    """The origin and licence of each source."""
    rows = [["source", "domain", "from", "revision", "rows used", "licence", "redistributable"]]
    for source in build.sources:
        place = ":".join(filter(None, [source["location"], source["config"]]))
        revision = source["revision"] if source["kind"] in ("reasoning_gym", "tasks") else source["revision"][:12]
        used = f"{source['counts'].get('chosen', 0):,}"
        rows.append(
            [source["name"], source["domain"], f"{source['kind']} {place}", revision, used, source["license"]]
            + [source["redistributable"]]
        )
    return rows


def split_rows(manifest: Manifest) -> list[list[str]]:
    """The packed rows of each split."""
    rows = [["split", "rows", "positions used", "tokens", "response tokens", "documents", "truncated"]]
    for name, split in manifest.splits.items():
        counts = list(split.domains.values())
        sums = [sum(getattr(c, key) for c in counts) for key in ("tokens", "response_tokens", "documents", "too_long")]
        rows.append([name, f"{split.rows:,}", f"{split.fill_rate:.1%}", *(f"{value:,}" for value in sums)])
    return rows


def option_rows(build: BuildSummary) -> list[list[str]]:
    """The options of the build that are set."""
    given = {key: value for key, value in build.options.items() if value not in ((), None)}
    return [["option", "value"], *([key, _shown(value)] for key, value in given.items())]


def pass_rows(build: BuildSummary) -> list[list[str]]:
    """The time that each pass took."""
    rows = [["pass", "seconds", "CPU seconds", "artifacts made"]]
    for name, t in build.passes.items():
        cells = [f"{t['wall_seconds']:.1f}", f"{t['cpu_seconds']:.1f}", str(t["artifacts_made"] or "")]
        rows.append([name, *cells])
    return rows


def problems(build: BuildSummary) -> list[str]:
    """Problems with sources and domains, one sentence each."""
    lines = [f"Source {name} is missing: {reason}" for name, reason in build.skipped.items()]
    for domain, figures in build.domains.items():
        if figures["missing"]:
            lines.append(f"Domain {domain} lacks {figures['missing']:,} examples: its sources have no more.")
    if build.forms_of_words:
        lines.append(
            f"{build.forms_of_words} n-grams of the evaluation sets occur under so many different questions that they "
            "count as common phrases, not leaks."
        )
    return lines


def reasons(build: BuildSummary) -> list[str]:
    """The most frequent reasons why rows are broken, one line for each source."""
    return [
        f"{source['name']}: " + ", ".join(f"{reason} ({count:,})" for reason, count in source["reasons"].items())
        for source in build.sources
        if source["reasons"]
    ]


def _shown(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, tuple | list) else str(value)
