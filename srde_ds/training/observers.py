"""The observers of the training loop: reporting, held-out losses and checkpoints."""

from __future__ import annotations

import logging
from typing import Literal

from torch import Tensor

from srde_ds.data.manifest import counts_of
from srde_ds.liveness.heartbeat import Heartbeat
from srde_ds.liveness.status import doing
from srde_ds.training.domain_statistics import measure_domains, set_routers
from srde_ds.training.reporting.metrics import MetricsWriter, ProgressLine
from srde_ds.training.reporting.step_metrics import ExpertWatch
from srde_ds.training.run import Observer, Run
from srde_ds.training.signals import Interrupted
from srde_ds.weights.origins import ROUTERS_KEPT, ROUTERS_SET

logger = logging.getLogger(__name__)


def observers(heartbeat: Heartbeat) -> list[Observer]:
    """All observers of a run, in the order in which they see a step."""
    return [
        SilentExperts(),
        DataCounts(),
        Statistics(),
        LastStep(),
        HeldOutLosses(),
        Domains(),
        MetricsLines(),
        Console(),
        HeartbeatUpdates(heartbeat),
        Checkpoints(),
    ]


class SilentExperts(Observer):
    """Ends a run in which an expert gets tokens but no gradient."""

    def on_start(self, run: Run) -> None:
        """Start watching."""
        self._watch = ExpertWatch(run.engine.model.expert_names)

    def after_step(self, run: Run) -> None:
        """Look at the step's tokens and gradients."""
        layers = len(run.engine.model.layers)
        assignments = [tokens * layers for tokens in run.line["tokens_per_expert"]]
        self._watch.check(run.step, assignments, run.line["expert_gradient_norm"])


class DataCounts(Observer):
    """Puts into the first line of metrics what the run is trained on: documents, those left out, response tokens."""

    def before_step(self, run: Run) -> None:
        """Count before the first step."""
        if run.step == 0:
            run.line["data"] = counts_of(run.state.manifest)


class Statistics(Observer):
    """Numbers that take too long to compute more often than every `log_steps` steps."""

    def after_step(self, run: Run) -> None:
        """Add the sizes of the deltas and the epochs of the data."""
        doing("statistics of the step")
        if run.is_last_step or run.is_due(run.config.training.log_steps):
            run.line["delta_norm"] = run.engine.delta_norms().tolist()
            if run.scheduled.only_domain is None:
                run.line["epochs"] = run.state.stream.epochs(run.step)


class LastStep(Observer):
    """Saves the last step before what is measured after it, which takes long and may fail."""

    def after_step(self, run: Run) -> None:
        """Save, if this was the last step; `Checkpoints` saves it again with what was measured."""
        if run.is_last_step and (run.held_out is not None or run.config.training.domain_statistics_rows):
            doing(f"saving checkpoint-{run.step}")
            run.state.save()


class HeldOutLosses(Observer):
    """Losses on held-out rows: before the first step, then every `eval_steps` steps, and at the end."""

    def before_step(self, run: Run) -> None:
        """Measure before the first step: the base, or the weights of `start_from`."""
        if run.step == 0 and run.config.training.eval_steps and "held_out_at_start" not in run.line:
            self._measure(run, "held_out_at_start")

    def after_step(self, run: Run) -> None:
        """Measure when it is due."""
        if run.is_last_step or run.is_due(run.config.training.eval_steps):
            self._measure(run, "held_out", "domain" if run.scheduled.forced else None, run.allowed_experts)

    def _measure(
        self, run: Run, key: str, expert: Literal["domain"] | None = None, allowed: Tensor | None = None
    ) -> None:
        if run.held_out is None:
            return
        doing("held-out loss")
        try:
            run.line[key] = run.held_out.losses(run.engine, run.interrupted, expert=expert, allowed=allowed)
        except Interrupted:
            run.measured = False


class Domains(Observer):
    """Statistics of each domain's inputs to the blocks, measured after the last step, and routers made of them."""

    def after_step(self, run: Run) -> None:
        """Measure, if this was the last step, and set the routers if none was trained."""
        if run.is_last_step and run.config.training.domain_statistics_rows:
            doing("statistics of the domains")
            logger.info(
                "The domains' inputs are measured for srde-ds combine, on up to %d rows each (domain_statistics_rows).",
                run.config.training.domain_statistics_rows,
            )
            try:
                measure_domains(run.engine, run.config, run.topology, run.state.stream.rows, run.interrupted)
            except Interrupted:
                run.measured = False
                return
            if run.curriculum.schedule.trains_by_domain:
                doing("setting the routers")
                problem = set_routers(run.engine, run.topology, seed=run.config.training.seed)
                run.state.routing = ROUTERS_KEPT if problem else ROUTERS_SET
                if problem and run.topology.is_main:
                    logger.warning("The routers stay as they were before training: %s.", problem)
                elif run.topology.is_main:
                    print("Each text was trained with one expert: use the weights with --route_by prompt.", flush=True)


class MetricsLines(Observer):
    """A line of metrics a step: `metrics.jsonl` and the trackers."""

    def on_start(self, run: Run) -> None:
        """Open the file and the trackers."""
        self._writer = MetricsWriter(
            run.config.training.output_dir,
            run.config.tracking,
            enabled=run.topology.is_main,
            resume_step=run.step,
            last_line_comes=run.state.awaits_measurement,
            run_config=run.config.to_dict(),
        )

    def after_step(self, run: Run) -> None:
        """Write the step's line. One that lacks something is kept in the checkpoint, for the run that continues."""
        if run.measured:
            self._writer.write(run.line)
            run.state.line = {}

    def on_end(self, run: Run, error: BaseException | None) -> None:
        """Close the file and the trackers."""
        self._writer.close(complete=error is None)


class Console(Observer):
    """A progress bar, or a line every `log_steps` steps."""

    def on_start(self, run: Run) -> None:
        """Show the bar."""
        training = run.config.training
        self._progress = ProgressLine(
            training.max_steps, training.log_steps, start_step=run.step, enabled=run.topology.is_main
        )

    def after_step(self, run: Run) -> None:
        """Show the step."""
        self._progress.update(run.line)

    def on_end(self, run: Run, error: BaseException | None) -> None:
        """Close the bar."""
        self._progress.close()


class HeartbeatUpdates(Observer):
    """Writes `heartbeat.json` after each step. How the run ended is written in `trainer.train`."""

    def __init__(self, heartbeat: Heartbeat) -> None:
        self._heartbeat = heartbeat

    def after_step(self, run: Run) -> None:
        """Write the step."""
        self._heartbeat.update(run.line)


class Checkpoints(Observer):
    """A checkpoint every `save_steps` steps, and one at a regular end of the run."""

    def after_step(self, run: Run) -> None:
        """Save when it is due; the last step is saved at the end."""
        run.state.look_after_save()
        if not run.is_last_step and run.is_due(run.config.training.save_steps):
            doing(f"saving checkpoint-{run.step}")
            run.state.save()

    def on_end(self, run: Run, error: BaseException | None) -> None:
        """Save the last step, or, if the run failed, wait for a save in progress."""
        if error is not None:
            run.state.saver.close(error)
            return
        with run.state.saver:
            doing(f"saving checkpoint-{run.step}, the last one")
            run.state.save(final=True)
