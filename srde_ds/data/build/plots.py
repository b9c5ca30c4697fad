"""Plots of a build: lengths, domains, what was left out."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from srde_ds.data.build.options import BuildSummary
from srde_ds.pages.figures import new_figure
from srde_ds.utils.escape import plot_label


def plot_lengths(build: BuildSummary, path: Path) -> None:
    """Plot the lengths of the documents, by domain."""
    figure, axes = new_figure()
    for domain, figures in build.domains.items():
        axes.stairs(figures["lengths"]["counts"], figures["lengths"]["edges"], label=plot_label(domain))
    axes.set(xlabel="tokens in a document", ylabel="documents", xscale="log")
    axes.legend(fontsize="small")
    figure.savefig(path)


def plot_domains(build: BuildSummary, path: Path) -> None:
    """Plot the number of documents in each domain, by source."""
    sources = {source["name"]: source["domain"] for source in build.sources}
    counts = {
        name: [figures["by_source"].get(name, 0) for figures in build.domains.values()]
        for name in sources
        if any(figures["by_source"].get(name) for figures in build.domains.values())
    }
    _stacked(list(build.domains), counts, "documents", path)


def plot_removals(build: BuildSummary, rules: Sequence[str], path: Path) -> None:
    """Plot the share of each source's rows that each rule left out."""
    names = [source["name"] for source in build.sources]
    shares = {
        rule: [source["counts"].get(rule, 0) / max(1, source["counts"]["read"]) for source in build.sources]
        for rule in rules
        if any(source["counts"].get(rule) for source in build.sources)
    }
    _stacked(names, shares, "share of the rows read", path)


def _stacked(names: list[str], layers: dict[str, Any], label: str, path: Path) -> None:
    figure, axes = new_figure()
    bottom = [0.0] * len(names)
    for layer, values in layers.items():
        axes.bar([*map(plot_label, names)], values, bottom=bottom, label=plot_label(layer))
        bottom = [low + value for low, value in zip(bottom, values, strict=True)]
    axes.set_ylabel(label)
    axes.tick_params(axis="x", rotation=30 if len(names) <= 8 else 90)
    if layers:
        axes.legend(fontsize="x-small", ncols=2)
    figure.savefig(path)
