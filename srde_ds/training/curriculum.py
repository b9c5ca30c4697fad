"""The schedule of `phases.py` applied to an engine: what is routed where, what is frozen, and what happens between."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from srde_ds.config import Config
from srde_ds.data.loader import RowStream
from srde_ds.distributed.engine import Engine
from srde_ds.distributed.processes import Topology
from srde_ds.training.balancing import domain_target, update_biases
from srde_ds.training.checkpointing import RunState
from srde_ds.training.reporting.held_out import Batch, HeldOut, forced_experts
from srde_ds.training.schedule import StepPlan, plan_of_step, pretrain_steps, warm_start_step
from srde_ds.training.warm_start.routers import warm_start_routers


class Curriculum:
    """Applies the plan of each step.

    Args:
        stream: all training rows.
    """

    def __init__(self, config: Config, topology: Topology, stream: RowStream, state: RunState) -> None:
        self.config, self.topology, self.stream, self.state = config, topology, stream, state
        self._streams: dict[int, RowStream] = {}

    @property
    def plan(self) -> StepPlan:
        return plan_of_step(self.config, self.state.step)

    def unlocked_experts(self) -> list[int]:
        plan = self.plan
        return self.state.unlock_order[: plan.unlocked] if plan.only_domain is None else [plan.only_domain]

    def begin_step(self, engine: Engine) -> RowStream:
        """Freeze, lock and route as the coming step's plan says; the stream that its rows come from."""
        plan, experts = self.plan, self.config.adapter.num_experts
        unlocked = self.unlocked_experts()
        locked = frozenset(range(experts)) - frozenset(unlocked)
        engine.restrict(plan.trained, locked)
        routing = engine.model.routing
        allowed = torch.zeros(experts, dtype=torch.bool, device=self.topology.device)
        allowed[unlocked] = True
        routing.allowed_experts = allowed if locked else None
        routing.support_temperature, routing.support_noise = plan.temperature, self.state.step
        return self.stream if plan.only_domain is None else self._stream_of(plan.only_domain)

    def end_step(self, engine: Engine, sums: dict[str, Tensor]) -> None:
        """After the update: what the next step's balancing needs, from the step's sums over all ranks.

        Shares and the target they are held against are of the same step: the mix of domains varies.
        """
        routing, assignments, losses = engine.model.routing, sums["assignments"], self.config.losses
        if self.plan.forced:
            return
        share = assignments / assignments.sum(dim=1, keepdim=True).clamp(min=1)
        routing.expert_share = share.float().to(self.topology.device)
        if losses.load_balancing_target == "domains":
            adapter, tokens = self.config.adapter, sums["domain_tokens"]
            target = domain_target(tokens, adapter.num_experts, adapter.top_k, routing.allowed_experts)
            routing.target_share = target.to(self.topology.device)
        rate = losses.balancing_bias_rate
        if rate and "router" in self.plan.trained:
            update_biases(engine.model, assignments, rate, allowed=routing.allowed_experts, target=routing.target_share)

    def route_batch(self, engine: Engine, batch: Batch) -> None:
        """Before each forward of a step."""
        engine.model.routing.forced_experts = forced_experts(batch, "domain") if self.plan.forced else None

    def between_steps(
        self, engine: Engine, held_out: HeldOut | None, interrupted: Callable[[], bool]
    ) -> dict[str, Any]:
        """What is due before the coming step: the table of experts around pretraining, the routers' warm start.

        Returns:
            Entries for the coming step's line of metrics.
        """
        found: dict[str, Any] = {}
        step, pretraining = self.state.step, pretrain_steps(self.config)
        if held_out and pretraining and step in (0, pretraining):
            table = held_out.table(engine, interrupted)
            if table is not None:
                found["expert_table"] = table
        # Done anew after a stop before the step's end: what enters the routers does not depend on their weights, so it
        # gives the same, and its report gets into the metrics.
        if step == warm_start_step(self.config) and not interrupted():
            report = warm_start_routers(engine, self.config, self.topology, self.stream.rows)
            self.state.warm_started = True
            found["warm_start"] = asdict(report)
            if self.config.curriculum.unlock_order == "cluster_size":
                sizes = torch.tensor(report.cluster_sizes, dtype=torch.float64).sum(0)
                self.state.unlock_order = sizes.argsort(descending=True, stable=True).tolist()
        return found

    def _stream_of(self, domain: int) -> RowStream:
        if domain not in self._streams:
            rows = self.stream.rows
            own = rows.select((rows["domain"][:] == domain).nonzero()[0])
            self._streams[domain] = RowStream(
                own, seed=self.stream.seed, global_batch_rows=self.stream.global_batch_rows
            )
        return self._streams[domain]
