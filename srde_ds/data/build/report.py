"""A build as pages: a report for whoever made it, a dataset card for whoever uses it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from srde_ds.data.build.options import BuildSummary
from srde_ds.data.build.outputs import CARD, JSONL
from srde_ds.data.build.plots import plot_domains, plot_lengths, plot_removals
from srde_ds.data.build.selection import REFUSED
from srde_ds.data.conversation import said
from srde_ds.data.manifest import Manifest, counts_of, counts_table, uneven_responses
from srde_ds.data.records import SPLITS
from srde_ds.utils.escape import markdown, markdown_code, terminal
from srde_ds.utils.files import write_text
from srde_ds.utils.tables import markdown_table

RULES = (
    "no answer", "broken", "empty", "exact duplicate", "near duplicate", "in an evaluation set", "held-out question",
    "end marker in a response", REFUSED, "too long",
)  # fmt: skip
"""what leaves rows out, in the order in which the rules are applied"""
_LONGEST_QUOTE = 600


def write_report(work_dir: Path, build: BuildSummary, manifest: Manifest | None) -> Path:
    """`report/report.md` with its plots, and the dataset card `README.md`; returns the report's path."""
    folder = work_dir / "report"
    folder.mkdir(exist_ok=True)
    plot_domains(build, folder / "domains.png")
    plot_removals(build, RULES, folder / "removals.png")
    if manifest is not None:
        plot_lengths(build, folder / "lengths.png")
    write_text(folder / "report.md", _report(build, manifest))
    write_text(work_dir / CARD, _card(build, manifest))
    return folder / "report.md"


def _report(build: BuildSummary, manifest: Manifest | None) -> str:
    options = {key: value for key, value in build.options.items() if value not in ((), None)}
    sections = [
        "# Dataset report",
        "## Domains",
        markdown_table(_domains(build)),
        _troubles(build),
        "![documents by domain and source](domains.png)",
        "## What was left out",
        "Rules apply in this order; each counts rows that the earlier ones left. What is neither left out nor chosen "
        "was not needed.",
        markdown_table(_removals(build)),
        "![rows left out by rule](removals.png)",
        _reasons(build),
        "## Sources",
        markdown_table(_sources(build)),
        "## An example of each domain",
        *(_example(domain, figures) for domain, figures in build.domains.items()),
        "## Settings",
        markdown_table([["option", "value"], *([key, _shown(value)] for key, value in options.items())]),
        "## Time",
        f"{build.wall_seconds:.0f} s in all, processes: {build.num_processes}. Artifacts that an earlier build left "
        "are not made again.",
        markdown_table(
            [["pass", "seconds", "CPU seconds", "artifacts made"]]
            + [
                [name, f"{t['wall_seconds']:.1f}", f"{t['cpu_seconds']:.1f}", str(t["artifacts_made"] or "")]
                for name, t in build.passes.items()
            ]
        ),
    ]
    if manifest is not None:
        sections[4:4] = [
            "## Rows",
            markdown_table(_rows(manifest)),
            *_responses(manifest),
            "![tokens of a document](lengths.png)",
        ]
    return "\n\n".join(section for section in sections if section) + "\n"


def _card(build: BuildSummary, manifest: Manifest | None) -> str:
    documents = sum(figures["documents"] for figures in build.domains.values())
    header = {
        "license": "other",
        "task_categories": ["text-generation"],
        "tags": ["srde", *build.domains],
        "configs": [{"config_name": "default", "data_files": JSONL}],
    }
    sections = [
        f"---\n{yaml.safe_dump(header, sort_keys=False).strip()}\n---",
        "# Dataset card",
        f"{documents:,} conversations in {len(build.domains)} domains, made by `srde-ds build_dataset`. Each line of "
        f"`{JSONL}` holds `split`, `messages`, `domain`, `source`, `revision` and `row` (where it comes from), and "
        "`answer` where the answer can be checked.",
        markdown_table(_domains(build)),
        "## Sources and licences",
        "The licence of each row is that of its source. Where the last column is not `yes`, the licence does not "
        "allow, or does not say, that the data may be passed on.",
        markdown_table(_sources(build)),
        "## Splits",
        "Rows are split by a hash of their question (of the original question or passage where several rows share "
        "one), so a row keeps its split as the dataset grows. Exact and near duplicates were removed across all "
        "sources, domains and splits.",
    ]
    if manifest is not None:
        tokenizer = manifest.tokenizer
        sections += [
            "## Tokenised rows",
            f"`tokenized/` holds the conversations in rows of {manifest.max_length} tokens, packed within a domain, "
            f"with labels on the responses only. Tokenizer: {markdown_code(str(tokenizer['name']))}, sha256 "
            f"`{str(tokenizer['sha256'])[:16]}`, chat template sha256 "
            f"`{str(tokenizer['chat_template_sha256'])[:16]}`.",
            markdown_table(_rows(manifest)),
        ]
    return "\n\n".join(sections) + "\n"


def _domains(build: BuildSummary) -> list[list[str]]:
    rows = [["domain", "documents", *SPLITS, "tokens", "missing"]]
    for domain, figures in build.domains.items():
        splits = [f"{figures['by_split'][split]:,}" for split in SPLITS]
        tokens = f"{figures['tokens']:,}" if figures["tokens"] else "-"
        rows.append([domain, f"{figures['documents']:,}", *splits, tokens, f"{figures['missing']:,}"])
    return rows


def _removals(build: BuildSummary) -> list[list[str]]:
    rules = [rule for rule in RULES if any(source["counts"].get(rule) for source in build.sources)]
    rows = [["source", "domain", "read", "normalised", *rules, "chosen"]]
    for source in build.sources:
        counts = source["counts"]
        shown = [f"{counts.get(column, 0):,}" for column in ("read", "normalised", *rules, "chosen")]
        rows.append([source["name"], source["domain"], *shown])
    return rows


def _sources(build: BuildSummary) -> list[list[str]]:
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


def _rows(manifest: Manifest) -> list[list[str]]:
    rows = [["split", "rows", "positions used", "tokens", "response tokens", "documents", "truncated"]]
    for name, split in manifest.splits.items():
        counts = list(split.domains.values())
        sums = [sum(getattr(c, key) for c in counts) for key in ("tokens", "response_tokens", "documents", "too_long")]
        rows.append([name, f"{split.rows:,}", f"{split.fill_rate:.1%}", *(f"{value:,}" for value in sums)])
    return rows


def _responses(manifest: Manifest) -> list[str]:
    """Response tokens by domain, and what to do where they are very uneven."""
    told = uneven_responses(manifest.splits["train"])
    return [markdown_table(counts_table(counts_of(manifest))), *([f"Note: {markdown(told)}"] if told else [])]


def _troubles(build: BuildSummary) -> str:
    lines = [f"* Source {markdown(name)} is missing: {markdown(reason)}" for name, reason in build.skipped.items()]
    for domain, figures in build.domains.items():
        if figures["missing"]:
            lines.append(
                f"* Domain {markdown(domain)} lacks {figures['missing']:,} examples: its sources have no more."
            )
    if build.forms_of_words:
        lines.append(
            f"* {build.forms_of_words} n-grams of the evaluation sets stand in so many documents that they were taken "
            "for forms of words, not leaks."
        )
    return "\n".join(lines)


def _reasons(build: BuildSummary) -> str:
    lines = [
        f"* {markdown(source['name'])}: "
        + ", ".join(f"{markdown(reason)} ({count:,})" for reason, count in source["reasons"].items())
        for source in build.sources
        if source["reasons"]
    ]
    return "Broken rows, most frequent reasons:\n\n" + "\n".join(lines) if lines else ""


def _example(domain: str, figures: dict[str, Any]) -> str:
    lines = [f"**{markdown(domain)}** ({markdown(figures['example']['source'])})"]
    for message in figures["example"]["messages"]:
        content = said(message)
        quote = content if len(content) <= _LONGEST_QUOTE else content[:_LONGEST_QUOTE] + " …"
        lines.append(
            f"{markdown(message['role'])}:\n\n" + "\n".join(f"    {terminal(line)}" for line in quote.splitlines())
        )
    return "\n\n".join(lines)


def _shown(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, tuple | list) else str(value)
