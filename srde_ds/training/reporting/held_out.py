"""Held-out loss by domain, computed by all ranks together during training."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor

from srde_ds.data.loader import validation_batches
from srde_ds.distributed.engine import Engine
from srde_ds.distributed.processes import Topology, all_reduce_sum
from srde_ds.model.evaluated import evaluated
from srde_ds.model.policy import RoutingPolicy
from srde_ds.training.signals import until_interrupted

# Rows of each domain in the table of all experts on all domains. Each row is run once for every expert.
TABLE_ROWS = 8

Batch = dict[str, Tensor]


def forced_experts(batch: Batch, expert: int | Literal["domain"]) -> Tensor:
    """`[B, S]` for `RoutingPolicy.forced_experts`: one expert for all tokens, or the expert of each row's domain."""
    chosen = batch["domain"] if expert == "domain" else torch.full_like(batch["domain"], expert)
    return chosen[:, None].expand_as(batch["input_ids"])


class HeldOut:
    """The validation rows of each domain.

    Args:
        dataset: rows as written by `build_dataset`.
        domains: names in the order of the dataset's `domain` column.
        batch_size: number of rows that a process runs at once.
    """

    def __init__(self, dataset: Any, domains: list[str], batch_size: int, topology: Topology) -> None:
        self.topology = topology
        column = dataset.with_format("numpy")["domain"][:]
        self.rows = {name: dataset.select((column == index).nonzero()[0]) for index, name in enumerate(domains)}
        self.rows = {name: rows for name, rows in self.rows.items() if len(rows)}
        self.batch_size = batch_size

    def losses(
        self,
        engine: Engine,
        interrupted: Callable[[], bool],
        *,
        expert: int | Literal["domain"] | None = None,
        allowed: Tensor | None = None,
        max_rows: int | None = None,
    ) -> dict[str, float]:
        """Mean cross entropy (nats) of the response tokens by domain.

        Every rank runs the same number of batches: under ZeRO-3 a forward is a collective.

        Args:
            expert: use this expert for all tokens, or that of each row's domain; default: the router chooses.
            allowed: `[E]` bool, the experts that the router may choose; default: all.
            max_rows: use only so many rows of each domain, the first ones.

        Raises:
            Interrupted: `interrupted` became true.
        """
        with evaluated(engine.deepspeed):
            return self._losses(engine, interrupted, expert, RoutingPolicy(allowed_experts=allowed), max_rows)

    def table(self, engine: Engine, interrupted: Callable[[], bool]) -> list[dict[str, float]]:
        """The `losses` of each expert alone, on TABLE_ROWS rows of every domain; errors as there."""
        norms = engine.delta_norms()
        result: list[dict[str, float]] = []
        for expert, norm in enumerate(norms.tolist()):
            if norm == 0 and 0 in norms[:expert]:  # an expert whose deltas are zero is the base, bit for bit
                result.append(result[norms.tolist().index(0)])
                continue
            result.append(self.losses(engine, interrupted, expert=expert, max_rows=TABLE_ROWS))
        return result

    def _losses(
        self,
        engine: Engine,
        interrupted: Callable[[], bool],
        expert: int | Literal["domain"] | None,
        policy: RoutingPolicy,
        max_rows: int | None,
    ) -> dict[str, float]:
        result = {}
        for name, rows in self.rows.items():
            sums = torch.zeros(2, dtype=torch.float64, device=self.topology.device)
            chosen = rows if max_rows is None else rows.select(range(min(max_rows, len(rows))))
            batches = validation_batches(
                chosen, self.batch_size, rank=self.topology.rank, world_size=self.topology.world_size
            )
            for batch in until_interrupted(batches, interrupted):
                if expert is not None:
                    policy = replace(policy, forced_experts=forced_experts(batch, expert))
                sums += torch.stack([value.double() for value in engine.forward(batch, policy)])
            total, count = all_reduce_sum(sums).tolist()
            result[name] = total / count
        return result
