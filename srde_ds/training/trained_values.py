"""How many values are trained between two prunings, for the plan."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import torch

from srde_ds.config import Config
from srde_ds.model.deltas import build_deltas
from srde_ds.model.supports.selection import support_size
from srde_ds.training.schedule import density_at, prunings
from srde_ds.utils.tables import aligned_table


class StageSize(NamedTuple):
    """From step `first_step` (from 0) to the next stage.

    Attributes:
        values: trainable ones of all layers: deltas with their atoms, importance and mixing, scores, routers.
    """

    first_step: int
    density: float
    values: int


def stage_sizes(config: Config, blocks: Sequence[tuple[int, int]]) -> list[StageSize]:
    """The stages of a run, in order; one without `initial_density`.

    Args:
        blocks: (D, F) of each layer's feed-forward block.
    """
    starts = [(0, density_at(config, 0)), *prunings(config)]
    return [StageSize(first, density, _values(config, density, blocks)) for first, density in starts]


def describe_stages(config: Config, blocks: Sequence[tuple[int, int]]) -> str:
    """The stages as a table for `--dry_run`."""
    stages = stage_sizes(config, blocks)
    last_steps = [stage.first_step for stage in stages[1:]] + [config.training.max_steps]
    rows = [["steps", "density", "trained values"]]
    for stage, last in zip(stages, last_steps, strict=True):
        rows.append([f"{stage.first_step + 1}-{last}", f"{stage.density:.4g}", f"{stage.values:,}"])
    return aligned_table(rows, right=1)


def _values(config: Config, density: float, blocks: Sequence[tuple[int, int]]) -> int:
    adapter, target = dataclasses.replace(config.adapter, density=density), config.adapter.density
    learning = adapter.support_strategy == "learned" and density != target
    total = 0
    for hidden, intermediate in blocks:
        bank = build_deltas(
            adapter,
            hidden=hidden,
            size=support_size(adapter, hidden, intermediate),
            seed=0,
            layer=0,
            dtype=torch.float32,
            device=torch.device("meta"),
            keep=support_size(config.adapter, hidden, intermediate) if learning else None,
        )
        total += sum(parameter.numel() for parameter in bank.parameters()) + adapter.num_experts * hidden
    return total
