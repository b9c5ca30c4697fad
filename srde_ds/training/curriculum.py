"""Applies the schedule to an engine: which experts a step trains, on which rows, and what happens between steps."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, replace
from typing import Any

import torch
from torch import Tensor

from srde_ds.config import Config
from srde_ds.data.loader import RowStream
from srde_ds.distributed.engine import Engine
from srde_ds.distributed.processes import Topology
from srde_ds.model.policy import RoutingPolicy
from srde_ds.training.balancing import auxiliary_weights, domain_target, update_biases
from srde_ds.training.checkpointing import RunState
from srde_ds.training.reporting.held_out import Batch, HeldOut, forced_experts
from srde_ds.training.schedule import Schedule, ScheduledStep
from srde_ds.training.signals import Interrupted
from srde_ds.training.warm_start.routers import warm_start_routers


class Curriculum:
    """Applies each step's part of the schedule.

    Args:
        stream: all training rows.

    Attributes:
        policy: the routing policy for the forwards of the step that was begun last.
    """

    def __init__(self, config: Config, topology: Topology, stream: RowStream, state: RunState) -> None:
        self.config, self.topology, self.stream, self.state = config, topology, stream, state
        self.schedule = Schedule.of(config)
        self.policy = RoutingPolicy()
        self._balancing = config.losses
        self._auxiliary_weights = auxiliary_weights(config.losses, config.training.gradient_accumulation_steps)
        self._streams: dict[int, RowStream] = {}
        names, trained = config.expert_names, config.training.train_experts
        self._kept = frozenset(number for number, name in enumerate(names) if trained and name not in trained)

    @property
    def scheduled(self) -> ScheduledStep:
        """The coming step."""
        return self.schedule.step(self.state.step)

    def unlocked_experts(self, step: ScheduledStep) -> list[int]:
        """Experts that a step may use and change, in the order of their unlocking."""
        return self.state.unlock_order[: step.unlocked] if step.only_domain is None else [step.only_domain]

    def allowed_experts(self, step: ScheduledStep) -> Tensor | None:
        """The same for `RoutingPolicy`: `[E]` bool, or None for all."""
        allowed = torch.zeros(self.schedule.adapter.num_experts, dtype=torch.bool)
        allowed[self.unlocked_experts(step)] = True
        return None if bool(allowed.all()) else allowed

    def begin_step(self, engine: Engine) -> RowStream:
        """Freeze and lock what the coming step does not train, set its `policy`, and return the stream of its rows."""
        step = self.scheduled
        allowed = self.allowed_experts(step)
        locked = frozenset() if allowed is None else frozenset((~allowed).nonzero().flatten().tolist())
        trained = step.trained - {"shared"} if self._kept else step.trained  # the experts that are kept rely on it
        engine.restrict(trained, locked | self._kept)
        if self._balancing.load_balancing_target == "uniform":
            self.state.target_share = None  # left over in a checkpoint if the option has changed since
        self.policy = RoutingPolicy(
            allowed_experts=allowed,
            auxiliary_weights=self._auxiliary_weights,
            expert_share=self.state.expert_share,
            target_share=self.state.target_share,
            support_temperature=step.temperature,
            noise_step=self.state.step,
        )
        return self.stream if step.only_domain is None else self._stream_of(step.only_domain)

    def policy_of(self, batch: Batch) -> RoutingPolicy:
        """The step's policy for one of its micro-batches."""
        if not self.scheduled.forced:
            return self.policy
        return replace(self.policy, forced_experts=forced_experts(batch, "domain"))

    def end_step(self, engine: Engine, sums: dict[str, Tensor]) -> None:
        """After the update, keep what the next step's balancing needs of the step's sums over all ranks.

        Shares are compared with a target of the same step, since the mix of domains varies.
        """
        if self.scheduled.forced:
            return
        assignments, options, allowed = sums["assignments"], self._balancing, self.policy.allowed_experts
        share = assignments / assignments.sum(dim=1, keepdim=True).clamp(min=1)
        self.state.expert_share = share.float().to(self.topology.device)
        if options.load_balancing_target == "domains":
            adapter = self.schedule.adapter
            target = domain_target(sums["domain_tokens"], adapter.num_experts, adapter.top_k, allowed)
            self.state.target_share = target.to(self.topology.device)
        rate = options.balancing_bias_rate
        if rate and "router" in self.scheduled.trained:
            update_biases(engine.model, assignments, rate, allowed=allowed, target=self.state.target_share)

    def between_steps(
        self, engine: Engine, held_out: HeldOut | None, interrupted: Callable[[], bool]
    ) -> dict[str, Any]:
        """Do what is due before the coming step: the table of experts before and after pretraining, the warm start.

        Returns:
            Entries for the coming step's line of metrics, without what a signal has interrupted. Those that are in it
            already, from before a stop within the step, are not measured again.
        """
        found: dict[str, Any] = {}
        with suppress(Interrupted):
            self._measure(found, engine, held_out, interrupted)
        return found

    def _measure(
        self, found: dict[str, Any], engine: Engine, held_out: HeldOut | None, interrupted: Callable[[], bool]
    ) -> None:
        step, pretraining, known = self.state.step, self.schedule.pretraining_steps, self.state.line
        if held_out and pretraining and step in (0, pretraining) and "expert_table" not in known:
            found["expert_table"] = held_out.table(engine, interrupted)
        if step == self.schedule.warm_start_step and "warm_start" not in known:
            report = warm_start_routers(engine, self.config, self.topology, self.stream.rows, interrupted)
            self.state.warm_started = True
            found["warm_start"] = asdict(report)
            if self.schedule.curriculum.unlock_order == "cluster_size":
                sizes = torch.tensor(report.cluster_sizes, dtype=torch.float64).sum(0)
                self.state.unlock_order = sizes.argsort(descending=True, stable=True).tolist()

    def _stream_of(self, domain: int) -> RowStream:
        if domain not in self._streams:
            rows = self.stream.rows
            own = rows.select((rows["domain"][:] == domain).nonzero()[0])
            self._streams[domain] = RowStream(
                own,
                seed=self.stream.seed,
                global_batch_rows=self.stream.global_batch_rows,
                loss_weights=self.stream.loss_weights,
            )
        return self._streams[domain]
