"""The training run, from top to bottom."""

from __future__ import annotations

import json
import math
import os
import socket
import time
from pathlib import Path
from typing import Any, Literal

import torch

from srde_ds.config import Config
from srde_ds.data.loader import RowStream
from srde_ds.data.manifest import load_manifest, load_rows
from srde_ds.distributed import zero_placement as placement
from srde_ds.distributed.processes import (
    Topology,
    adopt_launcher,
    all_reduce_max,
    check_same,
    gather_objects,
    launched_rank,
    on_main_rank,
    start_processes,
)
from srde_ds.errors import LostContact, SRDEError
from srde_ds.export.weights import export_weights
from srde_ds.liveness.contact import VERDICT_SECONDS, contact
from srde_ds.liveness.heartbeat import Heartbeat
from srde_ds.liveness.launcher_watch import LauncherWatch
from srde_ds.liveness.status import doing
from srde_ds.training.checkpointing import RunState
from srde_ds.training.consistency import facts
from srde_ds.training.curriculum import Curriculum
from srde_ds.training.engine_rebuild import Stages
from srde_ds.training.reporting.held_out import HeldOut
from srde_ds.training.reporting.metrics import MetricsWriter, ProgressLine, memory_gib
from srde_ds.training.reporting.step_metrics import ExpertWatch, expert_metrics
from srde_ds.training.run_folder import (
    check_inputs,
    check_run_folder,
    data_folder,
    open_run_folder,
    prepare_data,
    row_mixing,
)
from srde_ds.training.signals import StopRequest
from srde_ds.training.step import optimizer_step, scheduled_factor
from srde_ds.utils.launcher import launched_world_size, stop_processes


def train(config: Config, *, leave: bool = True) -> None:
    """Train until `max_steps`, a signal or an error.

    Writes the run folder that docs/guide.md describes; `completed.json` is its last file and the only sign of success.

    Args:
        leave: the process group, at the end. DeepSpeed cannot join another one: a process that trains again keeps it.

    Raises:
        SRDEError: bad input, before anything long starts; a loss that is not finite, or an expert without gradient,
            with the step's number; ranks that differ in software, options or data.
        LostContact: rank 0 was not there. Later a lost rank ends this process (liveness/contact.py).
    """
    adopt_launcher()
    rank, timeout = launched_rank(), config.parallel.collective_timeout
    heartbeat = Heartbeat(config, world_size=launched_world_size(), enabled=rank == 0)
    launchers = LauncherWatch()
    doing("checking the inputs", step=0)
    try:
        with contact(timeout, config.parallel.start_timeout) as others:
            others.on_verdict = lambda verdict: heartbeat.failed(verdict.text, verdict.rank)
            check_inputs(config)
            if rank == 0:
                # Before the collectives begin, so that none waits for tokenising.
                check_run_folder(config)
                doing("preparing the data")
                prepare_data(config)
                others.release_others()
            else:
                others.wait_for_main()
            doing("joining the process group")
            topology = start_processes(timeout + VERDICT_SECONDS)  # torch's own end comes after the verdict
            with StopRequest() as stop:
                if stopped := run(config, topology, stop, heartbeat):
                    heartbeat.stopped(f"stopped by {stopped}{launchers_gone(launchers)}")
            doing("leaving")
            if leave:
                stop_processes()
    except Exception as error:
        heartbeat.failed(describe(error), rank, bad_input=isinstance(error, SRDEError))
        raise


def run(config: Config, topology: Topology, stop: StopRequest, heartbeat: Heartbeat) -> str | None:
    """The run on this rank, once all ranks have met. Returns the signal that stopped it, if one did."""
    training = config.training
    folder = data_folder(config)
    manifest = load_manifest(folder)
    check_same(facts(config, manifest), topology)
    doing("loading the base")
    torch.manual_seed(training.seed)
    stream = RowStream(
        load_rows(folder, "train", manifest),
        seed=training.seed,
        global_batch_rows=training.batch_size * topology.world_size * training.gradient_accumulation_steps,
        phases=row_mixing(config.data, manifest),
    )
    held_out = None
    if "validation" in manifest.splits:
        rows = load_rows(folder, "validation", manifest)
        held_out = HeldOut(rows, config.data.domains, training.batch_size, topology)
    state = RunState(config, topology, stream, manifest)
    stages = Stages(config, topology, state)
    engine = stages.first_engine()
    # Not earlier: a run that may not resume leaves the folder as it was.
    on_main_rank(lambda: open_run_folder(config), topology)
    heartbeat.start(state.step)
    curriculum = Curriculum(config, topology, stream, state)
    watch = ExpertWatch(engine.model.expert_names)

    def signal() -> str | None:
        return stop.agreed(lambda value: all_reduce_max(value, topology.device))

    def interrupted() -> bool:
        return signal() is not None

    metrics = MetricsWriter(
        training.output_dir,
        config.tracking,
        enabled=topology.is_main,
        resume_step=state.step,
        run_config=config.to_dict(),
    )
    progress = ProgressLine(training.max_steps, training.log_steps, start_step=state.step, enabled=topology.is_main)
    stopped: str | None = None
    with metrics, progress, state.saver:
        while state.step < training.max_steps:
            doing("preparing the step", step=state.step + 1)
            engine = stages.engine_of_step(engine)
            before: dict[str, Any] = {}
            if held_out and state.step == 0 and training.eval_steps:
                doing("held-out loss")
                before = measured("held_out_at_start", held_out.losses(engine, interrupted))
            before |= curriculum.between_steps(engine, held_out, interrupted)
            started = time.monotonic()
            sums = optimizer_step(config, topology, engine, curriculum, state, interrupted)
            stopped = signal() if sums is None else None
            if sums is None:
                break  # the unfinished step is done anew after resuming

            loss = float(sums["loss"] / sums["labels"].clamp(min=1))
            if not math.isfinite(loss) or placement.step_was_skipped(engine.deepspeed):
                raise SRDEError(not_finite(state, loss))
            experts = expert_metrics(sums)
            watch.check(state.step + 1, sums["assignments"].sum(0).tolist(), experts["expert_gradient_norm"])
            plan, unlocked = curriculum.plan, curriculum.unlocked_experts()
            curriculum.end_step(engine, sums)
            state.step += 1
            state.tokens += int(sums["real_tokens"])
            line: dict[str, Any] = {
                "step": state.step,
                "phase": plan.phase,
                "unlocked_experts": unlocked,
                "density": engine.model.config.density,
                "loss": loss,
                "learning_rate": scheduled_factor(config, state.step - 1) * config.optimizer.learning_rate,
                "learning_rates": {group["name"]: group["lr"] for group in engine.optimizer.param_groups},
                "grad_norm": engine.global_grad_norm,
                "tokens": state.tokens,
                "tokens_per_second": float(sums["real_tokens"]) / (time.monotonic() - started),
                **experts,
                "memory_gib": memory_gib(),
                **before,
            }
            doing("statistics of the step")
            last = state.step == training.max_steps
            if last or state.step % training.log_steps == 0:
                line["delta_norm"] = engine.delta_norms().tolist()
                if plan.only_domain is None:
                    line["epochs"] = stream.epochs(state.step)
            if held_out and (last or (training.eval_steps and state.step % training.eval_steps == 0)):
                doing("held-out loss")
                expert: Literal["domain"] | None = "domain" if plan.forced else None
                line |= measured("held_out", held_out.losses(engine, interrupted, expert=expert))
            metrics.write(line)
            progress.update(line)
            heartbeat.update(line)
            state.look_after_save()
            if not last and training.save_steps and state.step % training.save_steps == 0:
                doing(f"saving checkpoint-{state.step}")
                state.save()
        doing(f"saving checkpoint-{state.step}, the last one")
        state.save(final=True)
    if stopped:
        say(topology, f"Stopped by {stopped} at step {state.step}. Continue with --resume_from latest.")
        return stopped
    doing("exporting the weights")
    on_main_rank(lambda: finish(config, state, heartbeat), topology)
    return None


def measured(key: str, losses: dict[str, float] | None) -> dict[str, Any]:
    """Part of a metrics line; empty when a signal cut the measurement off."""
    return {} if losses is None else {key: losses}


def not_finite(state: RunState, loss: float) -> str:
    return (
        f"step {state.step + 1}: the loss is {loss} or its gradient is not finite; the update was not saved. "
        f"{state.remedy()}"
    )


def finish(config: Config, state: RunState, heartbeat: Heartbeat) -> None:
    """Export the weights, then write the completion marker."""
    output = Path(config.training.output_dir)
    weights = export_weights(state.folder, output / "srde_weights.safetensors")
    marker = {"step": state.step, "tokens": state.tokens, "weights": weights.name, "checkpoint": state.folder.name}
    heartbeat.finished()
    partial = output / "completed.json.tmp"
    try:
        partial.write_text(json.dumps(marker, indent=2) + "\n")
        os.replace(partial, output / "completed.json")
    except OSError as error:
        raise SRDEError(f"'{output / 'completed.json'}' cannot be written: {error.strerror}.") from None
    print(f"Finished: {weights}", flush=True)


def launchers_gone(launchers: LauncherWatch) -> str:
    """The ranks whose launcher is gone, for which the run has stopped. A collective."""
    reasons = enumerate(gather_objects(launchers.gone and f"host {socket.gethostname()}: {launchers.gone}"))
    return "".join(f"; rank {rank}, {reason}" for rank, reason in reasons if reason)


def describe(error: Exception) -> str:
    """In one line."""
    if isinstance(error, BrokenPipeError):
        return "what read the output of this rank is gone: its launcher or supervisor was killed"
    text = (str(error).splitlines() or [""])[0]
    return text if isinstance(error, SRDEError | LostContact) else f"{type(error).__name__}: {text}"


def say(topology: Topology, text: str) -> None:
    if topology.is_main:
        print(text, flush=True)
