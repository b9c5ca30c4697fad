"""The number of values that a run trains while its supports shrink, for `--dry_run`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

from srde_ds.config import AdapterConfig
from srde_ds.model.deltas import empty_deltas
from srde_ds.model.supports.selection import shared_expert_size, support_size
from srde_ds.utils.tables import aligned_table


class TrainedValues(NamedTuple):
    """The trained values from step `first_step` (counted from 0) until the next pruning.

    Attributes:
        values: number over all layers: deltas with their atoms, importance and mixing, scores, shared experts and
            routers.
    """

    first_step: int
    density: float
    values: int


def trained_values(
    adapter: AdapterConfig, densities: Sequence[tuple[int, float]], blocks: Sequence[tuple[int, int]]
) -> list[TrainedValues]:
    """One entry for each density, in order.

    Args:
        adapter: the adapter's options, with the final density.
        densities: (step, density from this step on), from `Schedule.densities`.
        blocks: (D, F) of each layer's feed-forward block.
    """
    return [TrainedValues(first, density, _values(adapter, density, blocks)) for first, density in densities]


def describe_trained_values(spans: Sequence[TrainedValues], max_steps: int) -> str:
    """A table for `--dry_run`."""
    last_steps = [span.first_step for span in spans[1:]] + [max_steps]
    rows = [["steps", "density", "trained values"]]
    for span, last in zip(spans, last_steps, strict=True):
        rows.append([f"{span.first_step + 1}-{last}", f"{span.density:.4g}", f"{span.values:,}"])
    return aligned_table(rows, right=1)


def _values(final: AdapterConfig, density: float, blocks: Sequence[tuple[int, int]]) -> int:
    adapter = replace(final, density=density)
    learning = adapter.support_strategy == "learned" and density != final.density
    total = 0
    for hidden, intermediate in blocks:
        size = support_size(adapter, hidden, intermediate)
        keep = support_size(final, hidden, intermediate) if learning else None
        bank = empty_deltas(adapter, hidden=hidden, size=size, keep=keep)
        total += sum(parameter.numel() for parameter in bank.parameters()) + adapter.num_experts * hidden
        total += 3 * hidden * shared_expert_size(adapter, intermediate)
    return total
