"""Counts the bytes that bring tokens and experts together, and chooses the cheaper transport. Needs no deepspeed.

Tests compare it with measured traffic. The equations are in docs/design.md, "Placement".
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from srde_ds.distributed.workload import Workload
from srde_ds.model.supports.selection import support_size, touched_neurons, value_count

FP32 = 4
Blocks = Sequence[tuple[int, int]]
"""(D, F) of each layer's feed-forward block"""


@dataclass(frozen=True)
class Traffic:
    """Collectives of one kind in one optimizer step.

    Attributes:
        kind: what they carry.
        operation: "all_gather" and "reduce_scatter" of `size` bytes in total, "all_reduce" of `size` bytes on each
            process, "all_to_all" of `size` bytes from each process, including what it sends to itself.
        ranks: number of processes that take part.
        stride: distance between their ranks; 1 for neighbours.
    """

    kind: str
    operation: Literal["all_gather", "reduce_scatter", "all_reduce", "all_to_all"]
    size: float
    ranks: int
    stride: int = 1

    @property
    def received(self) -> float:
        """The fewest bytes that a process must get from others."""
        rounds = 2 if self.operation == "all_reduce" else 1
        return rounds * self.size * (self.ranks - 1) / self.ranks

    def between_nodes(self, gpus: int) -> float:
        """How many of a process's `received` bytes must come from other nodes, with `gpus` processes on each node.

        A gather or sum enters a node once, however many of its processes take part. What an all-to-all sends enters for
        a single process.
        """
        local = max(1, min(self.ranks, gpus // self.stride))  # how many of the group's processes are on one node
        nodes = self.ranks / local
        if self.operation == "all_to_all":
            return self.size * (self.ranks - local) / self.ranks
        rounds = 2 if self.operation == "all_reduce" else 1
        return rounds * self.size * (nodes - 1) / nodes / local


def merged(found: Iterable[Traffic]) -> list[Traffic]:
    """Add up traffic of the same kind, operation and group."""
    sizes: dict[tuple[str, str, int, int], float] = {}
    for t in found:
        if t.ranks > 1:
            key = (t.kind, t.operation, t.ranks, t.stride)
            sizes[key] = sizes.get(key, 0.0) + t.size
    return [Traffic(kind, operation, size, ranks, stride) for (kind, operation, ranks, stride), size in sizes.items()]  # type: ignore[arg-type]


def expert_traffic(work: Workload, blocks: Blocks, transport: str) -> list[Traffic]:
    """The traffic that brings tokens and deltas together in an optimizer step, without ZeRO's gathers.

    With "tokens" the estimate assumes full rows, and tokens that are spread evenly over the experts.
    """
    adapter, width, world_size, micro_steps = work.adapter, work.width, work.world_size, work.micro_steps
    size, granularity = work.expert_parallel_size, adapter.granularity
    forwards = 1 if work.recomputed == "none" else 2
    assignments = adapter.top_k * work.tokens * micro_steps
    found = []
    for number, (hidden, intermediate) in enumerate(blocks):
        part = hidden // adapter.neuron_parts
        long_side = part  # of a delta, padded so that each process has an equal shard
        if granularity != "neuron":
            long_side = value_count(adapter, hidden, intermediate)
        padding = math.ceil(long_side / world_size) * world_size / long_side
        values = value_count(adapter, hidden, intermediate) * micro_steps  # for one expert
        if transport == "tokens" and size > 1:
            changed = intermediate
            if granularity != "element":
                neurons = support_size if granularity == "neuron" else touched_neurons
                changed = neurons(adapter, hidden, intermediate)
            there = part + 2 * changed  # the token, and its gate and up values
            back = changed + part  # the change of the hidden values, and the output
            # Without full recomputation, the input of the first layer's experts needs no gradient.
            gradients = back + (there if number > 0 or work.recomputed == "full" else 0)
            sent = assignments * (forwards * (there + back) + gradients) * width
            found.append(Traffic("experts' tokens", "all_to_all", sent, size))
            if work.shards_atoms:  # a rank's deltas go to all ranks with these experts; gradients in the training dtype
                of_slot = padding * values * work.slots
                found.append(Traffic("delta shards", "all_to_all", of_slot * (forwards + 1) * width, world_size))
        elif work.shards_atoms:
            padded = round(values * adapter.num_experts * padding)
            found.append(Traffic("delta shards", "all_gather", padded * width * forwards, world_size))
            found.append(Traffic("delta shards", "reduce_scatter", padded * FP32, world_size))
        else:
            # Effective deltas arrive in the training dtype; their gradients are summed in fp32.
            values *= work.slots * size
            found.append(Traffic("experts' deltas", "all_gather", values * width * forwards, size))
            found.append(Traffic("experts' deltas", "reduce_scatter", values * FP32, size))
    return merged(found)


def transport_bytes(work: Workload, blocks: Blocks) -> dict[str, float]:
    """Bytes that a process receives in an optimizer step for its experts, by transport."""
    return {
        transport: sum(t.received for t in expert_traffic(work, blocks, transport))
        for transport in ("tokens", "deltas")
    }


def choose_transport(work: Workload, blocks: Blocks) -> str:
    """`expert_transport`, or for "auto" the one that moves fewer bytes for full rows."""
    if work.expert_transport != "auto":
        return work.expert_transport
    moved = transport_bytes(work, blocks)
    return min(moved, key=lambda transport: moved[transport])
