"""What a process does in an optimizer step, as far as its memory, traffic and operations depend on it."""

from __future__ import annotations

import math
from dataclasses import dataclass

from srde_ds.config import AdapterConfig, Config, ParallelConfig


def slots(num_experts: int, expert_parallel_size: int) -> int:
    """Number of experts that a process holds, padding included."""
    return math.ceil(num_experts / expert_parallel_size)


@dataclass(frozen=True)
class Workload:
    """The options that the cost of a step follows from, together with the base's shape.

    Attributes:
        world_size: number of processes.
        batch_size, max_length: number of rows per process in a micro-step, and of tokens in a row, padding included.
        micro_steps: number of micro-steps in an optimizer step.
        bf16: train in bfloat16 instead of float32.
        flash_attention: compute attention with flash-attn.
        recomputed: what the backward computes again: none, selective or full.
    """

    adapter: AdapterConfig
    parallel: ParallelConfig
    world_size: int
    batch_size: int
    max_length: int
    micro_steps: int
    bf16: bool
    flash_attention: bool
    recomputed: str

    @classmethod
    def of(cls, config: Config, world_size: int) -> Workload:
        """The workload of a run on `world_size` processes."""
        model, training = config.model, config.training
        rows = training.batch_size, config.data.max_length, training.gradient_accumulation_steps
        how = model.bf16, model.flash_attention, model.recomputed
        return cls(config.adapter, config.parallel, world_size, *rows, *how)

    @property
    def tokens(self) -> int:
        """T, the number of positions in a micro-batch, padding included."""
        return self.batch_size * self.max_length

    @property
    def width(self) -> int:
        """Bytes of a value in the training's dtype."""
        return 2 if self.bf16 else 4

    @property
    def whole_base(self) -> bool:
        """Whether each process holds the whole frozen base."""
        return self.parallel.whole_base(self.world_size)

    @property
    def shards_atoms(self) -> bool:
        """Whether each process mixes only its own shard of the atoms, see `expert_parallel.shard_atoms`."""
        return self.adapter.num_atoms > 0 and self.parallel.owner_computes and self.world_size > 1

    @property
    def slots(self) -> int:
        """Number of experts that a process holds, padding included."""
        return slots(self.adapter.num_experts, self.parallel.expert_parallel_size)
