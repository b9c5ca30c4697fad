"""The number of values that a run trains while its supports shrink, for `--dry_run`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

from srde_ds.config import AdapterConfig
from srde_ds.model.base_shape import BaseShape
from srde_ds.planner.trainables import trainable_values
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
    adapter: AdapterConfig, densities: Sequence[tuple[int, float]], shape: BaseShape
) -> list[TrainedValues]:
    """One entry for each density, in order.

    Args:
        adapter: the adapter's options, with the final density.
        densities: (step, density from this step on), from `Schedule.densities`.
    """
    return [TrainedValues(first, density, _values(adapter, density, shape)) for first, density in densities]


def describe_trained_values(spans: Sequence[TrainedValues], max_steps: int) -> str:
    """A table for `--dry_run`."""
    last_steps = [span.first_step for span in spans[1:]] + [max_steps]
    rows = [["steps", "density", "trained values"]]
    for span, last in zip(spans, last_steps, strict=True):
        rows.append([f"{span.first_step + 1}-{last}", f"{span.density:.4g}", f"{span.values:,}"])
    return aligned_table(rows, right=1)


def _values(final: AdapterConfig, density: float, shape: BaseShape) -> int:
    learning = final.support_strategy == "learned" and density != final.density
    target = final.density if learning else None
    return sum(trainable_values(replace(final, density=density), shape, target_density=target).values())
