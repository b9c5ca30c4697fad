"""Bytes that a process moves in an optimizer step, collective by collective; tested against counted bytes."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from srde_ds.config import Config
from srde_ds.distributed.ds_config import derive_ds_config
from srde_ds.model.supports.selection import support_size, value_count
from srde_ds.optim.groups import group_of_tensor
from srde_ds.planner.gathers import gather_schedule
from srde_ds.planner.shapes import BaseShape, LayerShape, exchanges_rows, layer_trainables, slots

FP32, FP64 = 4, 8


@dataclass(frozen=True)
class Traffic:
    """Collectives of one kind in one optimizer step.

    Attributes:
        kind: what they carry.
        operation: "all_gather" and "reduce_scatter" of `size` bytes in all, "all_reduce" of `size` bytes on each
            process, "all_to_all" of `size` bytes from each process, its own part included.
        ranks: processes that take part.
        stride: distance between their numbers: 1 for neighbours.
    """

    kind: str
    operation: Literal["all_gather", "reduce_scatter", "all_reduce", "all_to_all"]
    size: float
    ranks: int
    stride: int = 1

    @property
    def received(self) -> float:
        """Bytes that a process gets from others; the least that the operation can do with."""
        rounds = 2 if self.operation == "all_reduce" else 1
        return rounds * self.size * (self.ranks - 1) / self.ranks

    def between_nodes(self, gpus: int) -> float:
        """Bytes of `received`, a process, that must come from other nodes of `gpus` processes each.

        A gather or sum enters a node once, whatever the number of its processes that take part; a row of an
        all-to-all enters for the one process that wants it.
        """
        local = max(1, min(self.ranks, gpus // self.stride))  # of the group's processes, on one node
        nodes = self.ranks / local
        if self.operation == "all_to_all":
            return self.size * (self.ranks - local) / self.ranks
        rounds = 2 if self.operation == "all_reduce" else 1
        return rounds * self.size * (nodes - 1) / nodes / local


def step_traffic(config: Config, shape: BaseShape, world_size: int) -> list[Traffic]:
    """All that one optimizer step moves, apart from a few numbers for stopping, clipping and counting.

    Held-out losses, checkpoints and the first two micro-steps are left out, see `gathers`.

    Raises:
        SRDEError: a bad `deepspeed_config`.
    """
    zero = derive_ds_config(config, world_size)["zero_optimization"]
    width, micro_steps = (2 if config.model.bf16 else 4), config.training.gradient_accumulation_steps
    schedule = gather_schedule(config, shape, world_size, zero)
    found = []
    for weight, times in schedule.gathers.items():
        size = weight.padded * width * times * micro_steps
        found.append(Traffic(f"{weight.kind} gathered", "all_gather", size, weight.ranks, weight.stride))
    for weight in schedule.weights:
        group = weight.ranks, weight.stride
        if weight.persistent:
            found.append(Traffic("persistent weights", "all_gather", weight.padded * width, *group))
        if weight.kind == "trainables":
            found.append(Traffic("gradients", "reduce_scatter", weight.padded * FP32 * micro_steps, *group))
    found += expert_traffic(config, shape, world_size, choose_transport(config, shape, world_size))
    groups = group_of_tensor(config.optimizer, config.adapter.granularity)
    for layer in shape.layers:
        for trainable in layer_trainables(config, layer, world_size):
            if groups[trainable.kind] == "delta_matrices":
                _, batch, cols = trainable.shape
                # Rows that one process has are summed with all others'.
                group = (world_size, 1) if exchanges_rows(config, world_size) else (trainable.ranks, trainable.stride)
                found.append(Traffic("Gram matrices", "all_reduce", batch * cols**2 * FP32, *group))
    statistics = len(shape.layers) * (3 * config.adapter.num_experts + 3)
    found.append(Traffic("statistics", "all_reduce", statistics * FP64, world_size))
    return merged(found)


def merged(found: Iterable[Traffic]) -> list[Traffic]:
    """Traffic of the same kind, operation and group as one entry."""
    sizes: dict[tuple[str, str, int, int], float] = {}
    for t in found:
        if t.ranks > 1:
            key = (t.kind, t.operation, t.ranks, t.stride)
            sizes[key] = sizes.get(key, 0.0) + t.size
    return [Traffic(kind, operation, size, ranks, stride) for (kind, operation, ranks, stride), size in sizes.items()]  # type: ignore[arg-type]


def expert_traffic(config: Config, shape: BaseShape, world_size: int, transport: str) -> list[Traffic]:
    """What brings tokens and experts' deltas together in an optimizer step (DESIGN §4), ZeRO's gathers left out.

    For tokens each token takes `top_k` experts, spread evenly over the processes; rows are full.
    """
    size, micro_steps = config.parallel.expert_parallel_size, config.training.gradient_accumulation_steps
    width = 2 if config.model.bf16 else 4
    by_rows = exchanges_rows(config, world_size)
    forwards = 2 if config.model.gradient_checkpointing else 1
    tokens = config.training.batch_size * config.data.max_length
    found = []
    for number, layer in enumerate(shape.layers):
        values = value_count(config.adapter, layer.hidden, layer.intermediate) * micro_steps  # of one expert
        if transport == "tokens" and size > 1:
            rows = config.adapter.top_k * tokens * micro_steps
            there, back = _row_values(config, layer)
            # Without checkpointing the first experts' input needs no gradient.
            gradients = back + (there if number > 0 or config.model.gradient_checkpointing else 0)
            bytes_ = rows * (forwards * (there + back) + gradients) * width
            found.append(Traffic("experts' tokens", "all_to_all", bytes_, size))
            if by_rows:  # rows of a slot's deltas to all its ranks; their gradients in the training dtype
                rows_of_slot = _padding(config, layer, world_size) * values * slots(config)
                found.append(Traffic("rows of deltas", "all_to_all", rows_of_slot * (forwards + 1) * width, world_size))
        elif by_rows:
            values = round(values * config.adapter.num_experts * _padding(config, layer, world_size))
            found.append(Traffic("rows of deltas", "all_gather", values * width * forwards, world_size))
            found.append(Traffic("rows of deltas", "reduce_scatter", values * FP32, world_size))
        else:
            # Effective deltas come in the training dtype, their gradients are summed in fp32.
            values *= slots(config) * size
            found.append(Traffic("experts' deltas", "all_gather", values * width * forwards, size))
            found.append(Traffic("experts' deltas", "reduce_scatter", values * FP32, size))
    return merged(found)


def _padding(config: Config, layer: LayerShape, world_size: int) -> float:
    """Rows of a delta with those that make them divisible by the number of processes, over rows without."""
    neurons = config.adapter.granularity == "neuron"
    rows = layer.hidden if neurons else support_size(config.adapter, layer.hidden, layer.intermediate)
    return math.ceil(rows / world_size) * world_size / rows


def _row_values(config: Config, layer: LayerShape) -> tuple[int, int]:
    """There: the token with its gate and up values; back: the change of the hidden values, and the output."""
    neurons = config.adapter.granularity == "neuron"
    touched = support_size(config.adapter, layer.hidden, layer.intermediate) if neurons else layer.intermediate
    return layer.hidden + 2 * touched, touched + layer.hidden


def transport_bytes(config: Config, shape: BaseShape, world_size: int) -> dict[str, float]:
    """Bytes that a process receives in an optimizer step for its experts, by transport."""
    return {
        transport: sum(t.received for t in expert_traffic(config, shape, world_size, transport))
        for transport in ("tokens", "deltas")
    }


def choose_transport(config: Config, shape: BaseShape, world_size: int) -> str:
    """`expert_transport`, or for "auto" the one that moves fewer bytes for full rows."""
    if config.parallel.expert_transport != "auto":
        return config.parallel.expert_transport
    moved = transport_bytes(config, shape, world_size)
    return min(moved, key=lambda transport: moved[transport])
