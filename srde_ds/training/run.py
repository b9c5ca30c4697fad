"""A run in progress, and the interface through which everything besides training itself observes its loop."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from torch import Tensor

from srde_ds.config import Config
from srde_ds.distributed import deepspeed_internals as internals
from srde_ds.distributed.engine import Engine
from srde_ds.distributed.processes import DelayedMax, Topology
from srde_ds.errors import SRDEError
from srde_ds.training.checkpointing import RunState
from srde_ds.training.curriculum import Curriculum
from srde_ds.training.reporting.held_out import HeldOut
from srde_ds.training.reporting.metrics import memory_gib
from srde_ds.training.reporting.step_metrics import expert_metrics
from srde_ds.training.schedule import ScheduledStep
from srde_ds.training.signals import StopRequest


@dataclass
class Run:
    """A run in progress, as its observers see it.

    Attributes:
        held_out: None without validation rows.
        beat: called before each micro-step and each batch of a measurement.
        line: the coming step's line of metrics as it fills; after the step, the complete line.
        measured: whether nothing that is measured after the last finished step was interrupted.
        allowed_experts: those of the last finished step, see `model.policy.RoutingPolicy`.
        scheduled: what the last finished step trained.
    """

    config: Config
    topology: Topology
    state: RunState
    curriculum: Curriculum
    held_out: HeldOut | None
    stop: StopRequest
    beat: Callable[[], None]
    line: dict[str, Any] = field(default_factory=dict)
    measured: bool = True
    allowed_experts: Tensor | None = field(init=False)
    scheduled: ScheduledStep = field(init=False)

    def __post_init__(self) -> None:
        self._largest_signal = DelayedMax(self.topology.device)

    @property
    def engine(self) -> Engine:
        """The engine of the run's state."""
        return self.state.engine

    @property
    def step(self) -> int:
        """Number of finished optimizer steps."""
        return self.state.step

    @property
    def is_last_step(self) -> bool:
        """Whether no step follows."""
        return self.step == self.config.training.max_steps

    def is_due(self, every: int) -> bool:
        """Whether something that happens every `every` steps (0: never) is due after the last finished step."""
        return bool(every) and self.step % every == 0

    def stopped_by(self) -> str | None:
        """The signal that all ranks stop for, if one had come by the previous call; a collective."""
        return self.stop.agreed(self._largest_signal)

    def interrupted(self) -> bool:
        """Whether `stopped_by` names a signal."""
        self.beat()
        return self.stopped_by() is not None

    def finish_step(self, sums: dict[str, Tensor], seconds: float) -> None:
        """Count a step whose update is done, and make its line of metrics.

        Args:
            sums: as `optimizer_step` returns them.

        Raises:
            SRDEError: the loss or its gradient is not finite.
        """
        state, engine = self.state, self.engine
        loss = float(sums["loss"]) / (float(sums["label_weight"]) or 1.0)
        if not math.isfinite(loss) or internals.step_was_skipped(engine.deepspeed):
            raise SRDEError(
                f"step {self.step + 1}: the loss is {loss} or its gradient is not finite; the update was not saved. "
                f"{state.remedy()}"
            )
        curriculum = self.curriculum
        self._keep_schedule(curriculum.scheduled)
        curriculum.end_step(engine, sums)
        state.step += 1
        state.tokens += int(sums["real_tokens"])
        rates = {group["name"]: group["lr"] for group in engine.optimizer.param_groups}
        self.line = {
            "step": state.step,
            "phase": self.scheduled.phase,
            "unlocked_experts": curriculum.unlocked_experts(self.scheduled),
            "density": engine.model.config.density,
            "loss": loss,
            **({"learning_rate": rates["deltas"]} if "deltas" in rates else {}),
            "learning_rates": rates,
            "grad_norm": engine.global_grad_norm,
            "tokens": state.tokens,
            "tokens_per_second": float(sums["real_tokens"]) / seconds,
            **expert_metrics(sums),
            "memory_gib": memory_gib(),
            **self.line,
        }
        state.line = self.line

    def reopen_step(self) -> None:
        """Take up the last finished step of a run that ended before all was measured that follows it."""
        self.line = self.state.line
        self._keep_schedule(self.curriculum.schedule.step(self.step - 1))

    def observe_step(self, observers: Sequence[Observer]) -> str | None:
        """Let the observers see the finished step.

        Returns:
            The signal that has interrupted what they measure, if one did.
        """
        self.measured = True
        for observer in observers:
            observer.after_step(self)
        return None if self.measured else self.stopped_by()

    def _keep_schedule(self, step: ScheduledStep) -> None:
        self.scheduled, self.allowed_experts = step, self.curriculum.allowed_experts(step)


class Observer:
    """Observes the training loop. Every method is called on every rank; here they do nothing."""

    def on_start(self, run: Run) -> None:
        """The engine is ready, restored if the run resumes, and the run's folder is open."""

    def before_step(self, run: Run) -> None:
        """The coming step is about to be prepared. May add to `run.line`."""

    def after_step(self, run: Run) -> None:
        """A step has been finished and counted. May add to `run.line`."""

    def on_end(self, run: Run, error: BaseException | None) -> None:
        """The loop has ended: all steps are done, a signal has stopped it, or `error` was raised."""


@contextmanager
def observed(run: Run, observers: Sequence[Observer]) -> Iterator[None]:
    """Start the observers in order; when the block ends, end them in reverse order."""

    def end(observer: Observer, kind: object, error: BaseException | None, traceback: object) -> None:
        observer.on_end(run, error)

    with ExitStack() as stack:
        for observer in observers:
            observer.on_start(run)
            stack.push(partial(end, observer))
        yield
