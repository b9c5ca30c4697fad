"""Builds the engine for the current supports, and another one when they shrink."""

from __future__ import annotations

import dataclasses
import gc
from pathlib import Path

from srde_ds.checkpoint.prune import prune_checkpoint
from srde_ds.config import Config
from srde_ds.config.strategy import CALIBRATED
from srde_ds.distributed.engine import build_engine, build_model
from srde_ds.distributed.processes import Topology
from srde_ds.model.parameter_table import parameter_table
from srde_ds.model.supports.selection import support_size
from srde_ds.optim.groups import build_groups, rule_table
from srde_ds.training.calibration import calibrate_supports, choose_rows
from srde_ds.training.changed_options import changes
from srde_ds.training.checkpointing import RunState, SavedRun
from srde_ds.training.run_inputs import open_start
from srde_ds.training.schedule import Schedule
from srde_ds.training.start_from import route_to_new_experts, start_from
from srde_ds.utils.tables import aligned_table


class Engines:
    """Each engine trains between two prunings. A pruning goes through a checkpoint, like a change of machines.

    `state.engine` is always the current engine.
    """

    def __init__(self, config: Config, topology: Topology, state: RunState) -> None:
        self.config, self.topology, self.state = config, topology, state

    def build_first(self, found: Path | None) -> None:
        """Build the engine of a new run, or of one that `resume_from` continues; for `found` see `trainer.run`."""
        saved = self.state.find_saved(found)
        calibrated = self.config.adapter.support_strategy in CALIBRATED
        if calibrated and not saved:
            # A domain without rows is refused before the base is read.
            choose_rows(self.config, self.state.stream.rows)
        place = None if saved else self.config.training.start_from
        adapter = open_start(place, self.topology) if place else None
        self._build_engine(saved)
        if saved:
            self.state.restore(saved)
            self._say(f"Resumed at step {self.state.step} after {self.state.tokens:,} tokens.")
            if rows := changes(saved.values["config"], self.config):
                self._say(aligned_table(rows))
        elif adapter:
            start_from(self.state.engine, adapter, self.config.training.seed)
            self._say(f"Started from {adapter.place}: {', '.join(adapter.metadata.expert_names)}.")
            rows = self.state.stream.rows
            if line := route_to_new_experts(self.state.engine, adapter, self.config, self.topology, rows):
                self._say(line)
        elif calibrated:
            calibrate_supports(self.state.engine, self.config, self.topology, self.state.stream.rows)

    def prune_if_due(self) -> None:
        """If the supports are to be pruned before the coming step, replace the engine by one with smaller supports."""
        density = Schedule.of(self.config).density_at(self.state.step)
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
            base=self.config.model,
        )
        self.state.engine.close()
        del self.state.engine
        gc.collect()  # engines hold cycles
        saved = self.state.saved_at(folder)
        self._build_engine(saved)
        self.state.restore(saved)

    def _build_engine(self, saved: SavedRun | None) -> None:
        density = saved.density if saved else Schedule.of(self.config).density_at(0)
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
