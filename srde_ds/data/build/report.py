"""A build as pages: a report for whoever made it, a dataset card for whoever uses it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from srde_ds.data.build.options import BuildSummary
from srde_ds.data.build.outputs import CARD, JSONL
from srde_ds.data.build.page import build_page
from srde_ds.data.build.plots import plot_domains, plot_lengths, plot_removals
from srde_ds.data.build.report_tables import (
    RULES,
    domain_rows,
    option_rows,
    pass_rows,
    reasons,
    removal_rows,
    source_rows,
    split_rows,
    troubles,
)
from srde_ds.data.conversation import said
from srde_ds.data.manifest import Manifest, counts_of, counts_table, uneven_responses
from srde_ds.pages.render import render
from srde_ds.utils.escape import markdown, markdown_code, terminal
from srde_ds.utils.files import write_text
from srde_ds.utils.tables import markdown_table

_LONGEST_QUOTE = 600


def write_report(work_dir: Path, build: BuildSummary, manifest: Manifest | None) -> Path:
    """`report/report.md` with its plots, `report/report.html`, and the dataset card `README.md`.

    Returns:
        The path of report.md; that of the page differs in its ending.
    """
    folder = work_dir / "report"
    folder.mkdir(exist_ok=True)
    plot_domains(build, folder / "domains.png")
    plot_removals(build, RULES, folder / "removals.png")
    if manifest is not None:
        plot_lengths(build, folder / "lengths.png")
    write_text(folder / "report.md", _report(build, manifest))
    write_text(folder / "report.html", render(build_page(work_dir.resolve().name, build, manifest)))
    write_text(work_dir / CARD, _card(build, manifest))
    return folder / "report.md"


def _report(build: BuildSummary, manifest: Manifest | None) -> str:
    sections = [
        "# Dataset report",
        "## Domains",
        markdown_table(domain_rows(build)),
        _list(troubles(build)),
        "![documents by domain and source](domains.png)",
        "## What was left out",
        "Rules apply in this order; each counts rows that the earlier ones left. What is neither left out nor chosen "
        "was not needed.",
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
        f"{build.wall_seconds:.0f} s in all, processes: {build.num_processes}. Artifacts that an earlier build left "
        "are not made again.",
        markdown_table(pass_rows(build)),
    ]
    if manifest is not None:
        sections[4:4] = [
            "## Rows",
            markdown_table(split_rows(manifest)),
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
        markdown_table(domain_rows(build)),
        "## Sources and licences",
        "The licence of each row is that of its source. Where the last column is not `yes`, the licence does not "
        "allow, or does not say, that the data may be passed on.",
        markdown_table(source_rows(build)),
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
            markdown_table(split_rows(manifest)),
        ]
    return "\n\n".join(sections) + "\n"


def _responses(manifest: Manifest) -> list[str]:
    """Response tokens by domain, and what to do where they are very uneven."""
    told = uneven_responses(manifest.splits["train"])
    return [markdown_table(counts_table(counts_of(manifest))), *([f"Note: {markdown(told)}"] if told else [])]


def _list(lines: list[str]) -> str:
    return "\n".join(f"* {markdown(line)}" for line in lines)


def _example(domain: str, figures: dict[str, Any]) -> str:
    lines = [f"**{markdown(domain)}** ({markdown(figures['example']['source'])})"]
    for message in figures["example"]["messages"]:
        content = said(message)
        quote = content if len(content) <= _LONGEST_QUOTE else content[:_LONGEST_QUOTE] + " …"
        lines.append(
            f"{markdown(message['role'])}:\n\n" + "\n".join(f"    {terminal(line)}" for line in quote.splitlines())
        )
    return "\n\n".join(lines)
