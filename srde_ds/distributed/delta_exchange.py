"""Sends shards of effective deltas from the ranks that mix them to the ranks that use them.

See `expert_parallel.shard_atoms`: each rank holds a shard of the atoms and importance and mixes it into a shard of the
effective deltas of all experts.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from srde_ds.distributed.transport import GatherParts


class GatherShards:
    """Gives every rank the whole deltas of all experts: an all-gather; backwards, a reduce-scatter in fp32."""

    def __call__(self, own: Tensor, *, length: int, axis: int, expert_axis: int) -> Tensor:
        """The whole deltas, `length` long along `axis`, from each rank's shard. Shards are padded to equal sizes."""
        return GatherParts.apply(own.movedim(axis, 0), None)[:length].movedim(0, axis)


class SendShards:
    """Gives every rank the whole deltas of the experts in its place of the expert-parallel group: an all-to-all.

    Args:
        size: expert-parallel size; rank r has place r % size.
        slots: number of experts in a place.
    """

    def __init__(self, size: int, slots: int) -> None:
        self.size, self.slots = size, slots

    def __call__(self, own: Tensor, *, length: int, axis: int, expert_axis: int) -> Tensor:
        """The whole deltas, `length` long along `axis`, of this rank's experts along `expert_axis`."""
        experts_first = own.movedim((expert_axis, axis), (0, 1))
        padding = [0, 0] * (own.dim() - 1) + [0, self.size * self.slots - own.shape[expert_axis]]
        by_slot = F.pad(experts_first, padding).unflatten(0, (self.size, self.slots))
        arrived = _ToSlots.apply(by_slot)  # [W, slots, length of a shard, ...]
        return arrived.transpose(0, 1).flatten(1, 2)[:, :length].movedim((0, 1), (expert_axis, axis))


class _ToSlots(torch.autograd.Function):
    """`[P, ...]`, a part for each place, sent to all ranks with that place; backwards, the sum of what they return."""

    @staticmethod
    def forward(ctx: Any, by_slot: Tensor) -> Tensor:
        world, ctx.size = dist.get_world_size(), by_slot.shape[0]
        slot_of_rank = torch.arange(world, device=by_slot.device) % ctx.size
        arrived = by_slot.new_empty(world, *by_slot.shape[1:])
        dist.all_to_all_single(arrived, by_slot[slot_of_rank].contiguous())
        return arrived

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        returned = torch.empty_like(gradient, memory_format=torch.contiguous_format)
        dist.all_to_all_single(returned, gradient.contiguous())
        # Summed in fp32, as DeepSpeed's gradient reduction is here.
        return returned.unflatten(0, (-1, ctx.size)).sum(0, dtype=torch.float32).to(gradient.dtype)
