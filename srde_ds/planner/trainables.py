"""Sizes of the trainables, from a configuration alone."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import astuple, dataclass
from functools import cache
from typing import Any

from srde_ds.config import AdapterConfig
from srde_ds.distributed.workload import Workload
from srde_ds.model.base_shape import BaseShape, LayerShape
from srde_ds.model.deltas import AtomDeltas, empty_deltas
from srde_ds.model.supports.selection import kept_size, shared_expert_size, support_size


@dataclass(frozen=True)
class TrainableShape:
    """A trainable of one layer as a process sees it after a gather, padding included.

    Attributes:
        kind: the end of its name ("deltas.free", ..., "router.weight").
        shape: shape of what ZeRO partitions: the whole tensor, the process's experts, or its shard of the atoms.
        ranks: number of processes over which ZeRO partitions it; 1: no other process has a part.
        stride: distance between their ranks.
    """

    kind: str
    shape: tuple[int, ...]
    ranks: int
    stride: int = 1

    @property
    def values(self) -> int:
        """Number of values."""
        return math.prod(self.shape)


def layer_trainables(work: Workload, layer: LayerShape) -> list[TrainableShape]:
    """The trainables of one layer, without the few scores of a support that is being learned."""
    world_size, size, sharded = work.world_size, work.expert_parallel_size, work.shards_atoms
    result = []
    for name, whole, expert_axis, shard_axis in _whole_shapes(astuple(work.adapter), layer, world_size):
        shape, ranks, stride = list(whole), world_size, 1
        if sharded and shard_axis is not None:
            shape[shard_axis] = math.ceil(shape[shard_axis] / world_size)
            ranks = 1
        elif expert_axis is not None and not sharded and size > 1:
            shape[expert_axis] = shape[expert_axis] // work.adapter.num_experts * work.slots
            ranks, stride = world_size // size, size
        result.append(TrainableShape(name, tuple(shape), ranks, stride))
    return result


@cache
def _whole_shapes(
    adapter: tuple[Any, ...], layer: LayerShape, world_size: int, target_density: float | None = None
) -> list[tuple[str, tuple[int, ...], int | None, int | None]]:
    """For each trainable of a layer: name, shape, the experts' axis, and the axis of the atoms' shards."""
    config = AdapterConfig(*adapter)
    size = support_size(config, layer.hidden, layer.intermediate)
    keep = kept_size(config, target_density, layer.hidden, layer.intermediate)
    bank = empty_deltas(config, hidden=layer.hidden, size=size, pad_to=world_size, keep=keep)
    shard_axis = bank.long_axis if isinstance(bank, AtomDeltas) else {}
    named: list[tuple[str, Any]] = list(bank.named_parameters())
    found = [(f"deltas.{name}", tuple(p.shape), p.srde_expert_axis, shard_axis.get(p.srde_kind)) for name, p in named]
    if shared := shared_expert_size(config, layer.intermediate):
        rows = math.ceil(layer.hidden / world_size) * world_size
        found.append(("shared_expert.delta", (rows, 3, shared), None, None))
    return [*found, ("router.weight", (config.num_experts, layer.hidden), None, None)]


def trainable_values(
    adapter: AdapterConfig, shape: BaseShape, *, target_density: float | None = None
) -> dict[str, int]:
    """Number of values of each trainable over all layers, by the end of its name, without padding.

    Args:
        target_density: final density of a support that is being learned, which has scores; None: it is fixed.
    """
    values: Counter[str] = Counter()
    for layer, count in Counter(shape.layers).items():
        for name, whole, *_ in _whole_shapes(astuple(adapter), layer, 1, target_density):
            values[name] += math.prod(whole) * count
    return dict(values)
