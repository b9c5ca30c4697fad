"""Bytes that a process moves in an optimizer step, by collective; tests compare them with measured bytes."""

from __future__ import annotations

from srde_ds.distributed.expert_traffic import Traffic, choose_transport, expert_traffic, merged
from srde_ds.distributed.workload import Workload
from srde_ds.model.base_shape import BaseShape
from srde_ds.optim.groups import group_of_tensor
from srde_ds.planner.gathers import gather_schedule
from srde_ds.planner.trainables import layer_trainables
from srde_ds.utils.units import FP32, FP64


def step_traffic(work: Workload, shape: BaseShape) -> list[Traffic]:
    """All traffic of an optimizer step, apart from a few numbers for stopping, clipping and counting.

    Held-out losses, checkpoints and the first two micro-steps are left out, see `gathers`.
    """
    width, micro_steps, world_size = work.width, work.micro_steps, work.world_size
    schedule = gather_schedule(work, shape)
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
    found += expert_traffic(work, shape.blocks, choose_transport(work, shape.blocks))
    groups = group_of_tensor(work.optimizer, work.adapter.granularity)
    for layer in shape.layers:
        for trainable in layer_trainables(work, layer):
            if groups[trainable.kind] == "delta_matrices":
                _, batch, cols = trainable.shape
                # The atoms' shards are on all processes, although each is alone in its group.
                group = (world_size, 1) if work.shards_atoms else (trainable.ranks, trainable.stride)
                found.append(Traffic("Gram matrices", "all_reduce", batch * cols**2 * FP32, *group))
    statistics = len(shape.layers) * (3 * work.adapter.num_experts + 3)
    found.append(Traffic("statistics", "all_reduce", statistics * FP64, world_size))
    return merged(found)
