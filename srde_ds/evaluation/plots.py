"""Plots of a run: loss, speed, expert usage."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from srde_ds.pages.figures import Figure, new_figure
from srde_ds.utils.escape import plot_label

Lines = list[dict[str, Any]]


def plot_loss(metrics: Lines, path: Path) -> None:
    """Plot the training loss by step, and the measured held-out losses of each domain; the base's are at step 0."""
    figure, axes = new_figure()
    axes.plot([line["step"] for line in metrics], [line["loss"] for line in metrics], color="0.6", label="training")
    measured = [(0, line["held_out_at_start"]) for line in metrics if "held_out_at_start" in line]
    measured += [(line["step"], line["held_out"]) for line in metrics if "held_out" in line]
    for domain in dict.fromkeys(name for _, losses in measured for name in losses):
        points = [(step, losses[domain]) for step, losses in measured if domain in losses]
        axes.plot(*zip(*points, strict=True), marker="o", markersize=3, label=f"held out: {plot_label(domain)}")
    axes.set(xlabel="step", ylabel="cross entropy of response tokens (nats)")
    axes.legend(fontsize="small")
    figure.savefig(path)


def plot_speed(metrics: Lines, path: Path) -> None:
    """Plot tokens per second by step."""
    figure, axes = new_figure()
    axes.plot([line["step"] for line in metrics], [line["tokens_per_second"] for line in metrics])
    axes.set(xlabel="step", ylabel="tokens/s")
    axes.set_ylim(bottom=0)
    figure.savefig(path)


def plot_usage(usage: dict[str, Any], path: Path) -> None:
    """Heat map of the share of each expert in each domain's tokens."""
    figure, axes = new_figure()
    share = usage["share"]
    picture = axes.imshow(share, cmap="viridis", vmin=0, aspect="auto")
    axes.set_xticks(range(len(usage["experts"])), [*map(plot_label, usage["experts"])], rotation=30, ha="right")
    axes.set_yticks(range(len(usage["domains"])), [*map(plot_label, usage["domains"])])
    axes.set(xlabel="expert", ylabel="domain of the held-out items")
    highest = max(max(row) for row in share)
    for row, values in enumerate(share):
        for column, value in enumerate(values):
            color = "black" if value > highest / 2 else "white"
            axes.text(column, row, f"{value:.0%}", ha="center", va="center", color=color)
    figure.colorbar(picture, label="share of the domain's tokens × experts chosen")
    figure.savefig(path)


def plot_usage_by_layer(usage: dict[str, Any], path: Path) -> None:
    """A heat map for each domain: the share of each expert (across) in its tokens' choices in each layer (down)."""
    share_LDE = np.array(usage["share_by_layer"])
    layers, domains, _ = share_LDE.shape
    figure = Figure(figsize=(1.5 + 1.6 * domains, 1.8 + 0.12 * layers), dpi=120, layout="constrained")
    panels = figure.subplots(1, domains, sharey=True, squeeze=False)[0]
    for axes, domain, share_LE in zip(panels, usage["domains"], share_LDE.transpose(1, 0, 2), strict=True):
        picture = axes.imshow(share_LE, cmap="viridis", vmin=0, vmax=share_LDE.max(), aspect="auto")
        axes.set_title(plot_label(domain), fontsize="medium")
        axes.set_xticks(range(len(usage["experts"])), [*map(plot_label, usage["experts"])], rotation=90)
    panels[0].set_ylabel("layer")
    figure.supxlabel("expert", fontsize="medium")
    figure.colorbar(picture, ax=list(panels), label="share of the domain's choices")
    figure.savefig(path)
