"""What a process does in an optimizer step, as far as its memory, traffic and operations depend on it."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

from srde_ds.config import AdapterConfig, Config, OptimizerConfig
from srde_ds.distributed.ds_config import derive_ds_config


def slots(num_experts: int, expert_parallel_size: int) -> int:
    """Number of experts that a process holds, padding included."""
    return math.ceil(num_experts / expert_parallel_size)


@dataclass(frozen=True)
class Workload:
    """The options that the cost of a step follows from, together with the base's shape.

    Attributes:
        optimizer: says which tensors Muon updates.
        largest_density: density of the supports before any pruning.
        world_size: number of processes.
        whole_base: whether each process holds the whole frozen base.
        shards_atoms: whether each process mixes only its own shard of the atoms, see `expert_parallel.shard_atoms`.
        batch_size, max_length: number of rows per process in a micro-step, and of tokens in a row, padding included.
        micro_steps: number of micro-steps in an optimizer step.
        recomputed: what the backward computes again: none, selective or full.
        zero: the block `zero_optimization` of the DeepSpeed configuration.
    """

    adapter: AdapterConfig
    optimizer: OptimizerConfig
    largest_density: float
    world_size: int
    whole_base: bool
    shards_atoms: bool
    expert_parallel_size: int
    expert_transport: str
    batch_size: int
    max_length: int
    micro_steps: int
    bf16: bool
    flash_attention: bool
    recomputed: str
    zero: dict[str, Any]

    @classmethod
    def of(cls, config: Config, world_size: int) -> Workload:
        """The workload of a run on `world_size` processes.

        Raises:
            SRDEError: a bad `deepspeed_config`.
        """
        adapter, model, parallel = config.adapter, config.model, config.parallel
        return cls(
            adapter=adapter,
            optimizer=config.optimizer,
            largest_density=config.curriculum.initial_density or adapter.density,
            world_size=world_size,
            whole_base=parallel.whole_base(world_size),
            shards_atoms=adapter.num_atoms > 0 and parallel.owner_computes and world_size > 1,
            expert_parallel_size=parallel.expert_parallel_size,
            expert_transport=parallel.expert_transport,
            batch_size=config.training.batch_size,
            max_length=config.data.max_length,
            micro_steps=config.training.gradient_accumulation_steps,
            bf16=model.bf16,
            flash_attention=model.flash_attention,
            recomputed=model.recomputed,
            zero=derive_ds_config(config, world_size)["zero_optimization"],
        )

    def at(self, density: float) -> Workload:
        """The same with supports of another density."""
        return replace(self, adapter=replace(self.adapter, density=density))

    @property
    def tokens(self) -> int:
        """T, the number of positions in a micro-batch, padding included."""
        return self.batch_size * self.max_length

    @property
    def width(self) -> int:
        """Bytes of a value in the training's dtype."""
        return 2 if self.bf16 else 4

    @property
    def slots(self) -> int:
        """Number of experts that a process holds, padding included."""
        return slots(self.adapter.num_experts, self.expert_parallel_size)
