"""Builds the engine for the supports of the moment, and builds another one when they shrink."""

from __future__ import annotations

import dataclasses
import gc

from srde_ds.checkpoint.prune import prune_checkpoint
from srde_ds.config import Config
from srde_ds.distributed.engine import build_engine, build_model
from srde_ds.distributed.processes import Topology
from srde_ds.model.adapter import parameter_table
from srde_ds.model.supports.selection import support_size
from srde_ds.optim.groups import build_groups, rule_table
from srde_ds.training.balancing import delta_size_factor
from srde_ds.training.calibration import calibrate_supports, choose_rows
from srde_ds.training.checkpointing import RunState, SavedRun
from srde_ds.training.schedule import density_at


class Engines:
    """One engine trains between two prunings. Each pruning goes through a checkpoint, as a change of machines does.

    `state.engine` is always the current one.
    """

    def __init__(self, config: Config, topology: Topology, state: RunState) -> None:
        self.config, self.topology, self.state = config, topology, state

    def build_first(self) -> None:
        """The engine of a new run, or of one restored from `resume_from`."""
        saved = self.state.find_saved()
        calibrated = self.config.adapter.support_strategy in ("activation", "gradient")
        if calibrated and not saved:
            choose_rows(self.config, self.state.stream.rows)  # a domain without rows is refused before the base is read
        self._build(saved)
        if saved:
            self.state.restore(saved)
            self._say(f"Resumed at step {self.state.step} after {self.state.tokens:,} tokens.")
        elif calibrated:
            engine = self.state.engine
            calibrate_supports(engine, self.config, self.topology, self.state.stream.rows, engine.model.config)

    def prune_if_due(self) -> None:
        """Replace the engine by one with smaller supports if they are to be pruned before the coming step."""
        density = density_at(self.config, self.state.step)
        if not self._must_shrink(density):
            return
        before = self.state.engine.model.config.density
        self._say(f"Step {self.state.step}: pruning the supports from density {before:g} to {density:g}.")
        self.state.save(final=True)
        folder = prune_checkpoint(
            self.state.folder,
            density,
            ranks=self.topology,
            keep=self.config.training.save_total_limit,
            base=self.config.model.model_name,
        )
        self.state.engine.close()
        del self.state.engine
        gc.collect()  # engines hold cycles
        saved = self.state.saved_at(folder)
        self._build(saved)
        self.state.restore(saved)

    def _build(self, saved: SavedRun | None) -> None:
        density = saved.density if saved else density_at(self.config, 0)
        adapter = dataclasses.replace(self.config.adapter, density=density)
        supports = saved.supports if saved else None
        target = self.config.adapter.density
        learning = adapter.support_strategy == "learned" and density != target
        model = build_model(
            self.config,
            self.topology,
            adapter=adapter,
            supports=supports,
            target_density=target if learning else None,
        )
        self._say(parameter_table(model))
        groups = build_groups(model.trainable_parameters(), self.config.optimizer, adapter.granularity)
        self._say(rule_table(groups))
        self.state.engine = build_engine(model, self.config, self.topology)
        routing = model.routing
        routing.load_balancing_weight = self.config.optimizer.load_balancing_weight
        routing.router_z_weight = self.config.optimizer.router_z_weight
        routing.delta_size_weight = self.config.optimizer.delta_size_weight * delta_size_factor(self.config)
        # OverlapLoss adds its gradient whole in each micro-step.
        micro_steps = self.config.training.gradient_accumulation_steps
        routing.support_overlap_weight = self.config.optimizer.support_overlap_weight / micro_steps

    def _must_shrink(self, density: float) -> bool:
        adapter = dataclasses.replace(self.config.adapter, density=density)
        return any(
            len(layer.support.flatten()) > 0
            and layer.support.shape[-1] > support_size(adapter, layer.hidden, layer.intermediate)
            for layer in self.state.engine.model.layers
        )

    def _say(self, text: str) -> None:
        if self.topology.is_main:
            print(text, flush=True)
