"""`report.html`: the report of a build as a page."""

from __future__ import annotations

from srde_ds.data.build.options import BuildSummary
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
from srde_ds.pages.charts import Bars, bars, steps
from srde_ds.pages.items import Item, pack
from srde_ds.pages.parts import Chart, Folded, Items, Page, Part, Section, Table, Text


def build_page(name: str, build: BuildSummary, manifest: Manifest | None) -> Page:
    """The page of a build.

    Args:
        name: the dataset's name.
        manifest: the manifest of its rows; None: it was not tokenised.
    """
    documents = sum(figures["documents"] for figures in build.domains.values())
    read = sum(source["counts"].get("read", 0) for source in build.sources)
    lead = (
        f"{documents:,} conversations in {len(build.domains)} domains ({', '.join(build.domains)}), chosen from "
        f"{read:,} rows of {len(build.sources)} sources."
    )
    tiles = [("Documents", f"{documents:,}", ""), ("Domains", str(len(build.domains)), "")]
    tiles += [("Sources", str(len(build.sources)), f"{len(build.skipped)} missing" if build.skipped else "")]
    if manifest is not None:
        tokens = sum(figures["tokens"] for figures in build.domains.values())
        tiles.append(("Tokens", f"{tokens:,}", f"rows of {manifest.max_length}"))
    tiles.append(("Time", f"{build.wall_seconds:,.0f} s", f"processes: {build.num_processes}"))
    sections = [
        Section("Domains", [*(Text(text, note=True) for text in problems(build)), _domains(build), _table(build)]),
        Section("What was left out", _removals(build)),
        *([Section("Rows", _rows(build, manifest))] if manifest is not None else []),
        Section("Sources and licences", [Text(_LICENCES), Table(source_rows(build), "Sources", numbers=None)]),
        Section("An example of each domain", _examples(build)),
        Section("Settings and time", [Table(option_rows(build), "Options", numbers=None), *_time(build)]),
    ]
    return Page(name, "Dataset", lead, sections, tiles)


_LICENCES = (
    "The licence of each row is that of its source. Unless the last column says yes, the licence does not allow, or "
    "does not clearly allow, passing the data on."
)


def _domains(build: BuildSummary) -> Chart:
    used = [source["name"] for source in build.sources]
    groups = [
        Bars(name, [figures["by_source"].get(name, 0) for figures in build.domains.values()])
        for name in used
        if any(figures["by_source"].get(name) for figures in build.domains.values())
    ]
    summary = ", ".join(f"{domain} {figures['documents']:,}" for domain, figures in build.domains.items())
    figure = bars(list(build.domains), groups, x="documents", stacked=True, form=",.0f")
    rows = [["domain", "source", "documents"]]
    for domain, figures in build.domains.items():
        rows += [[domain, name, f"{count:,}"] for name, count in figures["by_source"].items() if count]
    return Chart("Documents by domain and source", figure, f"Documents: {summary}.", Table(rows, numbers=2))


def _table(build: BuildSummary) -> Table:
    return Table(domain_rows(build), "Documents and tokens by domain")


def _removals(build: BuildSummary) -> list[Part]:
    order = (
        "Rules apply in this order; each counts only rows that earlier rules kept. Rows that were neither left out nor "
        "chosen were not needed."
    )
    table = Table(removal_rows(build), "Rows of each source, and how many each rule left out", numbers=2)
    rules = [rule for rule in RULES if any(source["counts"].get(rule) for source in build.sources)]
    if not rules:
        return [Text("No rule left anything out."), table]
    sources = [source for source in build.sources if any(source["counts"].get(rule) for rule in rules)]
    shares = {rule: [s["counts"].get(rule, 0) / max(1, s["counts"]["read"]) for s in sources] for rule in rules}
    figure = bars(
        [source["name"] for source in sources],
        [Bars(rule, values) for rule, values in shares.items()],
        x="share of the rows read",
        stacked=True,
        form=".1%",
    )
    most = max(rules, key=lambda rule: sum(source["counts"].get(rule, 0) for source in sources))
    parts: list[Part] = [Text(order), Chart("Rows left out by rule", figure, f"Most were left out by: {most}."), table]
    if lines := reasons(build):
        parts.append(Folded("Broken rows, most frequent reasons", [Text(line) for line in lines]))
    return parts


def _rows(build: BuildSummary, manifest: Manifest) -> list[Part]:
    parts: list[Part] = [Table(split_rows(manifest), "Packed rows by split")]
    parts.append(Table(counts_table(counts_of(manifest)), "Response tokens by split and domain", numbers=2))
    if warning := uneven_responses(manifest.splits["train"]):
        parts.append(Text(f"Note: {warning}", note=True))
    lengths = {domain: figures["lengths"] for domain, figures in build.domains.items()}
    figure = steps(
        {domain: (of["edges"], of["counts"]) for domain, of in lengths.items()},
        x="tokens in a document",
        y="documents",
    )
    ranges = []
    for domain, of in lengths.items():
        filled = [place for place, count in enumerate(of["counts"]) if count]
        if filled:
            ranges.append(f"{domain} {of['edges'][filled[0]]:,.0f} to {of['edges'][filled[-1] + 1]:,.0f} tokens")
    summary = f"Lengths of the documents: {', '.join(ranges)}."
    rows = [["tokens from", *lengths]]
    edges = next(iter(lengths.values()))["edges"]
    for number, edge in enumerate(edges[:-1]):
        rows.append([f"{edge:,.0f}", *(f"{of['counts'][number]:,}" for of in lengths.values())])
    return [*parts, Chart("Lengths of the documents", figure, summary, Table(rows, "Documents by length"))]


def _examples(build: BuildSummary) -> list[Part]:
    domains = list(build.domains)
    items = [
        Item(
            domain,
            figures["example"]["source"],
            [(message["role"], all_text(message)) for message in figures["example"]["messages"]],
            figures["example"].get("answer"),
        )
        for domain, figures in build.domains.items()
    ]
    packed, _ = pack(items, domains)
    return [Items(packed, len(items), domains)]


def _time(build: BuildSummary) -> list[Part]:
    summary = (
        f"{build.wall_seconds:.0f} s in total with {build.num_processes} processes. Artifacts of an earlier build are "
        "not made again."
    )
    return [Text(summary), Table(pass_rows(build), "Time of the passes")]
