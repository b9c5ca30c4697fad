"""The training run, from top to bottom."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import torch

from srde_ds.config import Config
from srde_ds.data.loader import RowStream
from srde_ds.data.loss_weights import LossWeights
from srde_ds.data.manifest import Manifest, load_manifest, load_rows
from srde_ds.distributed.processes import Topology, adopt_launcher, check_same, start_processes
from srde_ds.errors import LostContact, SRDEError
from srde_ds.export.weights import export_weights
from srde_ds.liveness.heartbeat import Heartbeat
from srde_ds.liveness.launch_check import check_launch
from srde_ds.liveness.launcher_watch import LauncherWatch, launched_by_deepspeed
from srde_ds.liveness.meeting import VERDICT_SECONDS, contact
from srde_ds.liveness.status import doing
from srde_ds.training.checkpointing import RunState
from srde_ds.training.consistency import values_to_compare
from srde_ds.training.curriculum import Curriculum
from srde_ds.training.engine_rebuild import Engines
from srde_ds.training.observers import observers
from srde_ds.training.reporting.held_out import HeldOut
from srde_ds.training.run import Run, observed
from srde_ds.training.run_folder import (
    check_inputs,
    check_run_folder,
    data_folder,
    open_run_folder,
    prepare_data,
    row_mixing,
)
from srde_ds.training.run_lock import run_lock
from srde_ds.training.signals import StopRequest
from srde_ds.training.step import optimizer_step
from srde_ds.utils.dtypes import warn_of_slow_bfloat16
from srde_ds.utils.files import eventually, may_pass, write_text
from srde_ds.utils.launcher import launched_rank, launched_world_size, stop_processes
from srde_ds.utils.together import on_main_rank
from srde_ds.weights.locate import COMPLETED, WEIGHTS

# An NFS client believes for about half a minute that a file which it has looked for is not there.
_LATE_FILES_SECONDS = 60.0


def train(config: Config, *, leave: bool = True, settle: Callable[[Topology], Config] | None = None) -> str | None:
    """Train until `max_steps`, a signal or an error.

    Writes the run folder that docs/guide.md describes; `completed.json` is its last file and the only sign of success.

    Args:
        leave: whether to leave the process group at the end. DeepSpeed cannot join a second one, so a process that
            trains again must keep it.
        settle: the config with the options that depend on the memory of all ranks, once they have met; a collective.
            Until then, and without it, `config` counts.

    Returns:
        The name of the signal that stopped the run, after its last checkpoint; None if the run is complete.

    Raises:
        Stopped: a signal came before training began, so there is nothing to save.
        SRDEError: bad input, before anything long starts; a loss that is not finite, or an expert without gradient,
            with the step's number; ranks that differ in software, options or data.
        LostContact: rank 0 did not answer. If a rank is lost later, this process ends (liveness/contact.py).
    """
    adopt_launcher()
    if asked := launched_by_deepspeed():
        check_launch(*asked, launched_world_size())
    rank, timeout = launched_rank(), config.parallel.collective_timeout
    training = config.training
    heartbeat = Heartbeat(training.output_dir, training.max_steps, world_size=launched_world_size(), enabled=rank == 0)
    launchers = LauncherWatch()
    doing("checking the inputs", step=0)
    try:
        # Outermost: a signal outside of this block would end the process silently.
        with (
            StopRequest(at_once=True) as stop,
            contact(training.output_dir, timeout, config.parallel.start_timeout) as others,
        ):
            others.on_verdict = lambda verdict: heartbeat.failed(verdict.text, verdict.rank)
            check_inputs(config)
            with ExitStack() as until_the_end:
                found = None
                if rank == 0:
                    # Before any collective, so that none waits for tokenising.
                    found = check_run_folder(training.output_dir, training.resume_from)
                    warn_of_slow_bfloat16(config.model.bf16 and config.model.base_quantization != "fp8")
                    until_the_end.enter_context(run_lock(training.output_dir))
                    doing("preparing the data")
                    prepare_data(config)
                    others.release_others()
                else:
                    others.wait_for_main()
                doing("joining the process group")
                topology = start_processes(timeout + VERDICT_SECONDS)  # the verdict comes before torch's own timeout
                if settle is not None:
                    config = settle(topology)
                if stopped := run(config, topology, stop, heartbeat, found):
                    heartbeat.stopped(f"stopped by {stopped}{launchers_gone(launchers, topology)}")
                    # When the first rank returns 128 + the signal, launchers end the other ranks.
                    topology.all_reduce_max(0)
            doing("leaving")
            if leave:
                stop_processes()
    except Exception as error:
        heartbeat.failed(describe(error), rank, bad_input=isinstance(error, SRDEError) and not error.may_pass)
        raise
    return stopped


def run(config: Config, topology: Topology, stop: StopRequest, heartbeat: Heartbeat, found: Path | None) -> str | None:
    """Run on this rank, once all ranks have met.

    Args:
        found: on rank 0: the verified checkpoint that `resume_from` names, from `check_run_folder`.

    Returns:
        The signal that stopped the run, if one did.
    """
    folder = data_folder(config.data, config.training.output_dir)
    # Rank 0 may just have made them, and has checked them. The others must not be late for the next collective.
    patience = min(_LATE_FILES_SECONDS, config.parallel.collective_timeout / 2) if topology.rank else 0.0
    manifest = eventually(lambda: _whole_dataset(folder), SRDEError, patience)
    check_same(values_to_compare(config, manifest), topology)
    doing("loading the base")
    torch.manual_seed(config.training.seed)
    stream = training_rows(config, topology, folder, manifest)
    held_out = held_out_rows(config.training.batch_size, topology, folder, manifest)
    state = RunState(config, topology, stream, manifest)
    engines = Engines(config, topology, state)
    engines.build_first(found)
    # Not earlier: a run that is refused must leave the folder as it was.
    goes_on_here = state.saver.saved_step is not None
    on_main_rank(lambda: open_run_folder(config, state.step, goes_on_here=goes_on_here), topology)
    heartbeat.start(state.step)
    stop.at_once = False
    curriculum = Curriculum(config, topology, stream, state)
    current = Run(config, topology, state, curriculum, held_out, stop, heartbeat.beat)
    stopped: str | None = None
    watching = observers(heartbeat)
    with observed(current, watching):
        if state.awaits_measurement:
            current.reopen_step()
            stopped = current.observe_step(watching)
        while stopped is None and state.step < config.training.max_steps:
            doing("preparing the step", step=state.step + 1)
            engines.prune_if_due()
            current.line = state.line
            for observer in watching:
                observer.before_step(current)
            current.line |= curriculum.between_steps(current.engine, held_out, current.interrupted)
            started = time.monotonic()
            sums = optimizer_step(config, topology, current.engine, curriculum, state, current.interrupted)
            if sums is None:
                stopped = current.stopped_by()
                break  # a resumed run repeats the unfinished step
            current.finish_step(sums, time.monotonic() - started)
            stopped = current.observe_step(watching)
    current.engine.close()  # this process may train again
    if stopped:
        if topology.is_main:
            print(f"Stopped by {stopped} at step {state.step}. Continue with --resume_from latest.", flush=True)
        return stopped
    doing("exporting the weights")
    on_main_rank(lambda: finish(state, heartbeat), topology, long=True)
    return None


def _whole_dataset(folder: Path) -> Manifest:
    """The manifest of a dataset all of whose rows are there."""
    manifest = load_manifest(folder)
    for split in manifest.splits:
        load_rows(folder, split, manifest)
    return manifest


def training_rows(config: Config, topology: Topology, folder: Path, manifest: Manifest) -> RowStream:
    """The training rows, in the order that the seed gives."""
    training, periods = config.training, row_mixing(config.data, manifest)
    return RowStream(
        load_rows(folder, "train", manifest),
        seed=training.seed,
        global_batch_rows=training.batch_size * topology.world_size * training.gradient_accumulation_steps,
        periods=periods,
        loss_weights=LossWeights.of(config.losses.loss_weighting, manifest.splits["train"], mixed=periods is not None),
    )


def held_out_rows(batch_size: int, topology: Topology, folder: Path, manifest: Manifest) -> HeldOut | None:
    """The validation rows, if the dataset has any."""
    if "validation" not in manifest.splits:
        return None
    rows = load_rows(folder, "validation", manifest)
    return HeldOut(rows, manifest.domains, batch_size, topology)


def finish(state: RunState, heartbeat: Heartbeat) -> None:
    """Export the weights of the last checkpoint, then write the completion marker."""
    output = state.folder.parent
    weights = export_weights(state.folder, output / WEIGHTS)
    marker = {"step": state.step, "tokens": state.tokens, "weights": weights.name, "checkpoint": state.folder.name}
    heartbeat.finished()
    try:
        write_text(output / COMPLETED, json.dumps(marker, indent=2) + "\n")
    except OSError as error:
        reason = f"'{output / COMPLETED}' cannot be written: {error.strerror}."
        raise SRDEError(reason, may_pass=may_pass(error)) from None
    print(f"Finished: {weights}", flush=True)


def launchers_gone(launchers: LauncherWatch, topology: Topology) -> str:
    """Names the ranks that have lost their launcher, if that is why the run stopped; a collective."""
    reasons = enumerate(topology.gather(launchers.gone and f"host {socket.gethostname()}: {launchers.gone}"))
    return "".join(f"; rank {rank}, {reason}" for rank, reason in reasons if reason)


def describe(error: Exception) -> str:
    """An error in one line."""
    if isinstance(error, BrokenPipeError):
        return "the process that read this rank's output is gone: its launcher or supervisor was killed"
    text = (str(error).splitlines() or [""])[0]
    return text if isinstance(error, SRDEError | LostContact) else f"{type(error).__name__}: {text}"
