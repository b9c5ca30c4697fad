"""Memory of a process, by kind and moment of a step, computed from a configuration."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from srde_ds.distributed.expert_traffic import choose_transport
from srde_ds.distributed.workload import Workload
from srde_ds.model.base_shape import BaseShape
from srde_ds.model.supports.selection import shared_expert_size, support_shape
from srde_ds.optim.groups import group_of_tensor
from srde_ds.planner.activations import (
    checkpointed_input,
    dequantized_weight,
    head_activations,
    kept_attention,
    kept_despite_recompute,
    layer_activations,
    layer_gradients,
    shared_activations,
)
from srde_ds.planner.gathers import GatherSchedule, gather_schedule
from srde_ds.planner.trainables import layer_trainables
from srde_ds.utils.units import FP32, INT32

SUB_GROUP_SIZE = 1_000_000_000  # deepspeed's default; values of a process that one call of the optimizer updates


@dataclass(frozen=True)
class Memory:
    """Bytes by kind.

    Attributes:
        states: what is always held: weights, masters, gradients, optimizer state, buffers.
        moments: what each moment of a step needs in addition.
    """

    states: dict[str, float]
    moments: dict[str, dict[str, float]]

    @property
    def peak_moment(self) -> str:
        """The moment of a step that takes the most memory."""
        return max(self.moments, key=lambda moment: sum(self.moments[moment].values()))

    @property
    def peak(self) -> dict[str, float]:
        """The states plus what the costliest moment adds, by kind."""
        return self.states | self.moments[self.peak_moment]

    @property
    def total(self) -> float:
        """Bytes at the peak."""
        return sum(self.peak.values())


def memory(work: Workload, shape: BaseShape, *, labelled: float = 1.0) -> Memory:
    """Memory of a process with full rows.

    Args:
        labelled: share of positions with a label in any row of a micro-batch; 1 gives an upper bound.
    """
    schedule, width, owned = gather_schedule(work, shape), work.width, _values_by_group(work, shape)
    base, trained = (
        sum(weight.padded / weight.ranks for weight in schedule.weights if weight.kind == kind)
        for kind in ("base", "trainables")
    )
    if work.whole_base:
        held = {"whole base": float(shape.stored_bytes(width))}
    else:
        held = {"base shard": (base + sum(shape.unused) / work.world_size) * width}
    states = held | {
        "persistent weights": sum(weight.gathered for weight in schedule.weights if weight.persistent) * width,
        "trainables": trained * width,
        "fp32 masters": trained * FP32,  # even in fp32, since a comparison in DeepSpeed that always fails makes a copy
        "gradients": trained * FP32,
        "gradient bucket": work.zero["reduce_bucket_size"] * FP32,
        # One fp32 moment for GramMuon, two for AdamW.
        "optimizer state": sum(n * FP32 * (1 if group == "delta_matrices" else 2) for (group, _), n in owned.items()),
        "supports": sum(
            math.prod(support_shape(work.adapter, *block)) + shared_expert_size(work.adapter, block[1])
            for block in shape.blocks
        )
        * INT32,
    }
    moments = _moments(work, shape, schedule, labelled)
    limit = int(work.zero.get("sub_group_size", SUB_GROUP_SIZE))
    # The largest sub-group's gradients in one piece, and two intermediate results of AdamW.
    update = max(min(n, limit) * FP32 * (1 if group == "delta_matrices" else 3) for (group, _), n in owned.items())
    moments["optimizer step"] = {"update": update}
    return Memory(states, moments)


def largest_memory(work: Workload, shape: BaseShape) -> Memory:
    """`memory` at the largest density of the run, with a label at every position."""
    return memory(work.at(work.largest_density), shape)


def _values_by_group(work: Workload, shape: BaseShape) -> Counter[tuple[str, int]]:
    """Number of values that a process owns, by optimizer group and number of processes that divide the tensors."""
    groups = group_of_tensor(work.optimizer, work.adapter.granularity)
    values: Counter[tuple[str, int]] = Counter()
    for layer in shape.layers:
        for t in layer_trainables(work, layer):
            values[groups[t.kind], t.ranks] += math.ceil(t.values / t.ranks)
    return values


def _moments(
    work: Workload, shape: BaseShape, schedule: GatherSchedule, labelled: float
) -> dict[str, dict[str, float]]:
    """The moments of a step: the loss, and the backward of each layer, from the last to the first."""
    width, recomputed = work.width, work.recomputed
    transport = choose_transport(work, shape.blocks)

    def gathered(moment: int | str) -> dict[str, float]:
        live = schedule.live[moment]
        # Weights of several modules arrive in one buffer and are copied out of it.
        found: dict[str, float] = {f"gathered {kind}": count * width for kind, count in live.items()}
        return found | {"gather buffer": min(schedule.prefetched, live.total()) * width}

    moments = {}
    kept: Any = Counter(shared_activations(work, shape.layers[0]))  # of floats
    for number, layer in enumerate(shape.layers):
        first = number == 0 and recomputed != "full"
        whole = layer_activations(work, layer, transport, first=first)
        working = {"gradients at work": layer_gradients(work, layer, whole["experts"])}
        if shape.packing is not None:
            working["dequantised weight"] = dequantized_weight(layer, shape.packing, width)
        again: dict[str, float] = {}
        if recomputed == "none":
            kept.update(whole)
        else:
            kept["checkpoints"] += checkpointed_input(work, layer)
            again = dict(whole)
        if recomputed == "selective":
            kept["attention"] += kept_attention(work, layer)
            again["attention"] = max(0.0, again["attention"] - kept_attention(work, layer))
            if layer.int8:
                kept["inputs of linear maps"] += kept_despite_recompute(work, layer)
        moments[f"backward of layer {number}"] = _sum(kept, again, working, gathered(number))
    head = head_activations(work, shape, labelled)
    moments["loss"] = _sum(kept, head, gathered(len(shape.layers)))
    return dict(reversed(moments.items()))


def _sum(*parts: Mapping[str, float]) -> dict[str, float]:
    total: Any = Counter()  # of floats
    for part in parts:
        total.update(part)
    return dict(total)
