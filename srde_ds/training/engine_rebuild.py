"""Which engine a step needs: built for the supports of the moment, and built anew when they shrink."""

from __future__ import annotations

import dataclasses
import gc

from srde_ds.checkpoint.prune import prune_checkpoint
from srde_ds.config import Config
from srde_ds.distributed.engine import Engine, build_engine, build_model
from srde_ds.distributed.processes import Topology
from srde_ds.model.adapter import parameter_table
from srde_ds.model.supports.selection import support_size
from srde_ds.optim.groups import build_groups, rule_table
from srde_ds.planner.shapes import base_shape
from srde_ds.training.balancing import delta_size_factor
from srde_ds.training.calibration import calibrate_supports, choose_rows
from srde_ds.training.checkpointing import RunState, SavedRun
from srde_ds.training.schedule import density_at


class Stages:
    """Between two prunings one engine trains; a pruning goes through a checkpoint, like a change of machines."""

    def __init__(self, config: Config, topology: Topology, state: RunState) -> None:
        self.config, self.topology, self.state = config, topology, state
        self._blocks = base_shape(config).blocks

    def first_engine(self) -> Engine:
        """For a new run, or restored from `resume_from`."""
        saved = self.state.find_saved()
        calibrated = self.config.adapter.support_strategy in ("activation", "gradient")
        if calibrated and not saved:
            choose_rows(self.config, self.state.stream.rows)  # a domain without rows is refused before the base is read
        engine = self._build(saved)
        if saved:
            self.state.restore(saved)
            self._say(f"Resumed at step {self.state.step} after {self.state.tokens:,} tokens.")
        elif calibrated:
            calibrate_supports(engine, self.config, self.topology, self.state.stream.rows, engine.model.config)
        return engine

    def engine_of_step(self, engine: Engine) -> Engine:
        """`engine`, or one with smaller supports if they are to be pruned before the coming step."""
        density = density_at(self.config, self.state.step)
        if not self._must_shrink(engine, density):
            return engine
        self._say(
            f"Step {self.state.step}: pruning the supports from density {engine.model.config.density:g} to {density:g}."
        )
        self.state.save(final=True)
        folder = prune_checkpoint(
            self.state.folder,
            density,
            collectives=self.state.collectives,
            keep=self.config.training.save_total_limit,
            base=self.config.model.model_name,
        )
        engine.close()
        del engine, self.state.engine
        gc.collect()  # engines hold cycles
        saved = self.state.saved_at(folder)
        engine = self._build(saved)
        self.state.restore(saved)
        return engine

    def _build(self, saved: SavedRun | None) -> Engine:
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
        routing.load_balancing_weight = self.config.losses.load_balancing_weight
        routing.router_z_weight = self.config.losses.router_z_weight
        routing.delta_size_weight = self.config.losses.delta_size_weight * delta_size_factor(self.config)
        # OverlapLoss adds its gradient whole in each micro-step.
        micro_steps = self.config.training.gradient_accumulation_steps
        routing.support_overlap_weight = self.config.losses.support_overlap_weight / micro_steps
        return self.state.engine

    def _must_shrink(self, engine: Engine, density: float) -> bool:
        adapter = dataclasses.replace(self.config.adapter, density=density)
        sizes = [support_size(adapter, hidden, intermediate) for hidden, intermediate in self._blocks]
        return any(
            len(layer.support.flatten()) > 0 and layer.support.shape[-1] > size
            for layer, size in zip(engine.model.layers, sizes, strict=True)
        )

    def _say(self, text: str) -> None:
        if self.topology.is_main:
            print(text, flush=True)
