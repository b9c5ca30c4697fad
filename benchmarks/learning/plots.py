"""Pictures of the results."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

from matplotlib.figure import Figure

from benchmarks.learning.summary import Result
from srde_ds.config import DOMAINS

PANELS = 4  # beside each other


def plot_losses(results: Sequence[Result], path: Path) -> None:
    """A line a row: the test loss of each seed and their mean."""
    figure = Figure(figsize=(7, 0.6 + 0.32 * len(results)), dpi=120, layout="constrained")
    axes = figure.add_subplot()
    for place, result in enumerate(results):
        losses = list(result.losses().values())
        axes.plot(losses, [place] * len(losses), "o", color="0.6", markersize=4)
        axes.plot(mean(losses), place, "|", color="tab:blue", markersize=14, markeredgewidth=2)
    axes.set_yticks(range(len(results)), [result.row.name for result in results])
    axes.invert_yaxis()
    axes.set(xlabel="loss of test items")
    axes.grid(axis="x", alpha=0.3)
    _save(figure, path)


def plot_rates(sweeps: Mapping[str, Sequence[tuple[float, float]]], path: Path) -> None:
    """Loss of the second half of training by learning rate, a line a row."""
    figure = Figure(figsize=(7, 4.2), dpi=120, layout="constrained")
    axes = figure.add_subplot()
    for number, (name, points) in enumerate(sweeps.items()):
        style = ("o-", "s--", "^:")[number // 10]
        axes.plot(*zip(*points, strict=True), style, markersize=4, label=name)
    axes.set(xscale="log", xlabel="learning rate", ylabel="loss of new items, second half of the steps")
    axes.legend(fontsize="x-small")
    _save(figure, path)


def plot_curves(results: Sequence[Result], path: Path) -> None:
    """Validation loss by step, mean over seeds, of the rows that measure it."""
    figure = Figure(figsize=(7, 4.2), dpi=120, layout="constrained")
    axes = figure.add_subplot()
    for number, result in enumerate(results):
        curves = [record["curve"] for record in result.runs.values()]
        steps = [step for step, _ in curves[0]]
        losses = [mean(loss for _, loss in points) for points in zip(*curves, strict=True)]
        axes.plot(steps, losses, ("o-", "s--")[number % 2], markersize=3, label=result.row.name)
    axes.set(xlabel="step", ylabel="loss of validation items")
    axes.legend(fontsize="x-small")
    _save(figure, path)


def plot_differences(differences: Mapping[str, tuple[float, Sequence[float]]], path: Path, *, label: str) -> None:
    """A line a row, the first on top: a difference and its interval (low, high); zero is marked."""
    figure = Figure(figsize=(8, 0.7 + 0.32 * len(differences)), dpi=120, layout="constrained")
    axes = figure.add_subplot()
    for place, (middle, limits) in enumerate(differences.values()):
        axes.plot(limits, [place, place], "-", color="tab:blue", linewidth=2)
        axes.plot(middle, place, "o", color="tab:blue", markersize=5)
    axes.axvline(0, color="0.4", linewidth=1)
    axes.set_yticks(range(len(differences)), list(differences))
    axes.invert_yaxis()
    figure.supxlabel(label, fontsize="medium")
    axes.grid(axis="x", alpha=0.3)
    _save(figure, path)


def plot_forgetting(methods: Mapping[str, Mapping[str, tuple[float, float]]], path: Path) -> None:
    """Of each method and domain the loss when the domain had just been learnt (dot) and that at the end (bar)."""
    figure = Figure(figsize=(8, 3.4), dpi=120, layout="constrained")
    axes = figure.add_subplot()
    for number, (name, losses) in enumerate(methods.items()):
        colour, aside = ("tab:blue", "tab:orange")[number], 0.12 * (2 * number - 1)
        for place, (learnt, end) in enumerate(losses.values()):
            axes.plot(place + aside, learnt, "o", color=colour, markersize=5, label=name if place == 0 else None)
            axes.plot([place + aside] * 2, [learnt, end], "-", color=colour, linewidth=2)
            axes.plot(place + aside, end, "_", color=colour, markersize=14, markeredgewidth=2)
    axes.set_xticks(range(len(losses)), list(losses))
    axes.set(ylabel="test loss: dot when learnt, bar at the end")
    axes.set_ylim(bottom=0)
    axes.grid(axis="y", alpha=0.3)
    figure.legend(loc="outside upper center", ncols=2, fontsize="small")
    _save(figure, path)


def plot_usage(usages: Mapping[str, list[list[float]]], path: Path) -> None:
    """Share of each expert in the choices of each domain's tokens, a panel a row of the table."""
    lines = math.ceil(len(usages) / PANELS)
    figure = Figure(figsize=(11, 0.4 + 2.6 * lines), dpi=120, layout="constrained")
    panels: Any = figure.subplots(lines, PANELS, squeeze=False).flatten()
    highest = max(share for usage in usages.values() for shares in usage for share in shares)
    for place, (name, usage) in enumerate(usages.items()):
        picture = panels[place].imshow(usage, vmin=0, vmax=highest, cmap="viridis")
        panels[place].set_title(name, fontsize="small")
        panels[place].set_xticks(range(len(usage[0])))
        panels[place].set_yticks(range(len(DOMAINS)), DOMAINS if place % PANELS == 0 else [])
        panels[place].set(xlabel="expert")
    for axes in panels[len(usages) :]:
        axes.set_axis_off()
    figure.colorbar(picture, ax=panels.tolist(), label="share of choices")
    _save(figure, path)


def _save(figure: Figure, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
