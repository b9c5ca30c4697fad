"""Writes a report for those who build a dataset, and a dataset card for those who use it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from huggingface_hub import DatasetCardData

from srde_ds.data.build.options import BuildSummary
from srde_ds.data.build.outputs import CARD, JSONL
from srde_ds.data.build.page import build_page
from srde_ds.data.build.plots import plot_domains, plot_lengths, plot_removals
from srde_ds.data.build.report_tables import (
    RULES,
    domain_rows,
    option_rows,
    pass_rows,
    problems,
    reasons,
    removal_rows,
    source_rows,
    split_rows,
)
from srde_ds.data.conversation import all_text
from srde_ds.data.manifest import Manifest, counts_of, counts_table, uneven_responses
from srde_ds.pages.render import render
from srde_ds.utils.escape import markdown, markdown_code, terminal
from srde_ds.utils.files import new_files, write_text
from srde_ds.utils.tables import markdown_table

_LONGEST_QUOTE = 600
_HUB_SPLIT = "all_splits"
"""the Hub's name for the rows of all splits, which one file holds; as `train`, held-out rows would be trained on"""


def write_report(work_dir: Path, build: BuildSummary, manifest: Manifest | None) -> Path:
    """`report/report.md` with its plots, `report/report.html`, and the dataset card `README.md`.

    Returns:
        The path of report.md; the page is report.html beside it.
    """
    folder = work_dir / "report"
    folder.mkdir(exist_ok=True)
    with new_files(folder) as partial:
        plot_domains(build, partial / "domains.png")
        plot_removals(build, RULES, partial / "removals.png")
        if manifest is not None:
            plot_lengths(build, partial / "lengths.png")
        (partial / "report.md").write_text(_report(build, manifest), encoding="utf-8")
        page = render(build_page(work_dir.resolve().name, build, manifest))
        (partial / "report.html").write_text(page, encoding="utf-8")
    write_text(work_dir / CARD, _card(build, manifest))
    return folder / "report.md"


def _report(build: BuildSummary, manifest: Manifest | None) -> str:
    sections = [
        "# Dataset report",
        "## Domains",
        markdown_table(domain_rows(build)),
        _list(problems(build)),
        "![documents by domain and source](domains.png)",
        "## What was left out",
        "Rules apply in this order; each counts only rows that earlier rules kept. Rows that were neither left out nor "
        "chosen were not needed.",
        markdown_table(removal_rows(build)),
        "![rows left out by rule](removals.png)",
        "Broken rows, most frequent reasons:\n\n" + _list(reasons(build)) if reasons(build) else "",
        "## Sources",
        markdown_table(source_rows(build)),
        "## An example of each domain",
        *(_example(domain, figures) for domain, figures in build.domains.items()),
        "## Settings",
        markdown_table(option_rows(build)),
        "## Time",
        f"{build.wall_seconds:.0f} s in total with {build.num_processes} processes. Artifacts of an earlier build are "
        "not made again.",
        markdown_table(pass_rows(build)),
    ]
    if manifest is not None:
        sections[4:4] = [
            "## Rows",
            markdown_table(split_rows(manifest)),
            *_responses(manifest),
            "![tokens in a document](lengths.png)",
        ]
    return "\n\n".join(section for section in sections if section) + "\n"


def _card(build: BuildSummary, manifest: Manifest | None) -> str:
    documents = sum(figures["documents"] for figures in build.domains.values())
    header = DatasetCardData(
        license="other",
        task_categories=["text-generation"],
        tags=["srde", *build.domains],
        configs=[{"config_name": "default", "data_files": [{"split": _HUB_SPLIT, "path": JSONL}]}],
    )
    sections = [
        f"---\n{header.to_yaml()}\n---",
        "# Dataset card",
        f"{documents:,} conversations in {len(build.domains)} domains, made by `srde-ds build_dataset`. Each line of "
        f"`{JSONL}` holds `split`, `messages`, `domain`, `source`, `revision` and `row` (its origin), and "
        "`answer` where the answer can be checked. The rows of all splits are in this file; train on those of the "
        "split `train`:",
        f'    load_dataset("USER/NAME", split="{_HUB_SPLIT}").filter(lambda row: row["split"] == "train")',
        markdown_table(domain_rows(build)),
        "## Sources and licences",
        "The licence of each row is that of its source. Unless the last column says `yes`, the licence does not allow, "
        "or does not clearly allow, passing the data on.",
        markdown_table(source_rows(build)),
        "## Splits",
        "Rows are split by a hash of their question (or of the original question or passage that several rows share), "
        "so a row keeps its split as the dataset grows. Exact and near duplicates were removed across all sources, "
        "domains and splits.",
    ]
    if manifest is not None:
        tokenizer = manifest.tokenizer
        sections += [
            "## Tokenised rows",
            f"`tokenized/` holds the conversations in rows of {manifest.max_length} tokens, packed within a domain, "
            f"with labels on the responses only. Tokenizer: {markdown_code(str(tokenizer['name']))}, sha256 "
            f"`{str(tokenizer['sha256'])[:16]}`, chat template sha256 "
            f"`{str(tokenizer['chat_template_sha256'])[:16]}`.",
            markdown_table(split_rows(manifest)),
        ]
    return "\n\n".join(sections) + "\n"


def _responses(manifest: Manifest) -> list[str]:
    """Response tokens by domain, with advice if they are very uneven."""
    warning = uneven_responses(manifest.splits["train"])
    return [markdown_table(counts_table(counts_of(manifest))), *([f"Note: {markdown(warning)}"] if warning else [])]


def _list(lines: list[str]) -> str:
    return "\n".join(f"* {markdown(line)}" for line in lines)


def _example(domain: str, figures: dict[str, Any]) -> str:
    lines = [f"**{markdown(domain)}** ({markdown(figures['example']['source'])})"]
    for message in figures["example"]["messages"]:
        content = all_text(message)
        quote = content if len(content) <= _LONGEST_QUOTE else content[:_LONGEST_QUOTE] + " …"
        lines.append(
            f"{markdown(message['role'])}:\n\n" + "\n".join(f"    {terminal(line)}" for line in quote.splitlines())
        )
    return "\n\n".join(lines)
