"""`srde-ds train`: trains experts on a frozen base."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from types import FrameType
from typing import Any

from srde_ds.cli.flags import Parser, resolved
from srde_ds.config import Config, RunInputs
from srde_ds.config.values import option
from srde_ds.errors import SRDEError, Stopped
from srde_ds.utils.launcher import launched_rank, launched_world_size


@dataclass(frozen=True)
class TrainOptions:
    """Options that do not belong to the run itself."""

    dry_run: bool = option(False, "print what would be done, and exit")


@dataclass(frozen=True)
class ConfigFile:
    """Where a run's options come from, apart from the flags."""

    config: str | None = option(None, "YAML file of options by section; flags override it", metavar="FILE")


def train_config(
    arguments: Sequence[str], resolve: Callable[[dict[str, Any]], Config] = resolved
) -> tuple[Config, bool]:
    """The config of a `train` command line, made of its flags by `resolve`, and whether it is a dry run."""
    parser = Parser(
        "srde-ds train",
        "Train experts on a frozen base. These are the common options; see --help-all.",
        usage="--model_name BASE (--jsonl_data FILE | --pretokenized_dir FOLDER) [options]",
    )
    parser.add_options(ConfigFile)
    parser.add_options(TrainOptions)
    parser.add_launcher_flag()
    parser.add_config_options(rare=None)
    given = parser.parse(arguments)
    options = parser.options(TrainOptions, given)
    return resolve(given), options.dry_run


def train_config_of_launcher(arguments: Sequence[str]) -> tuple[Config, bool]:
    """`train_config` on a host of `resolved_of_launcher`."""
    return train_config(arguments, resolved_of_launcher)


def resolved_of_launcher(given: dict[str, Any]) -> Config:
    """The config as a run resolves it, on a host that need not have the base and the rows; the ranks check them."""
    from srde_ds.training.run_inputs import read_run_inputs

    try:
        return resolved(dict(given), read_run_inputs)
    except SRDEError:
        with suppress(SRDEError):  # the first error is the one that the run would end with
            return resolved(given)
        raise


@contextmanager
def _ending_at_ctrl_c() -> Iterator[None]:
    """End the process at SIGINT while libraries load, since they abort if Python raises an exception within C++."""

    def end(number: int, frame: FrameType | None) -> None:
        if launched_rank() == 0:
            os.write(sys.stderr.fileno(), f"srde-ds: {Stopped(number)}.\n".encode())
        os._exit(128 + number)

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    former = signal.signal(signal.SIGINT, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, former)


def _read_run_inputs(config: Config, given: Collection[str]) -> RunInputs:
    """`read_run_inputs`, whose libraries take seconds to load: so help and wrong values come first."""
    with _ending_at_ctrl_c():
        from srde_ds.training.run_inputs import read_run_inputs

    return read_run_inputs(config, given)


def train(arguments: Sequence[str]) -> int:
    """Train as the command line says, or print what a run would do.

    Returns:
        The exit status: 128 + the signal that stopped the run, else 0.
    """
    asked, dry_run = train_config(arguments, lambda given: resolved(given, _read_run_inputs))
    with _ending_at_ctrl_c():
        from srde_ds.planner.settle import settle, settle_together
    config = settle(asked)
    if dry_run:
        from srde_ds.model.base_shape import base_shape
        from srde_ds.planner.describe import describe_run
        from srde_ds.planner.trained_values import describe_trained_values, trained_values
        from srde_ds.training.run_folder import NO_DATA, check_dry_run, has_data
        from srde_ds.training.schedule import Schedule

        shape = base_shape(config)  # first, since it reports what is wrong with a base
        check_dry_run(config, shape)
        schedule = Schedule.of(config)
        parts = [describe_run(config, shape, world_size=launched_world_size()), schedule.describe()]
        if config.curriculum.initial_density:
            spans = trained_values(config.adapter, schedule.densities, shape)
            parts.insert(1, describe_trained_values(spans, schedule.max_steps))
        if not has_data(config.data):
            parts.append(f"The run would be refused, since there is {NO_DATA}")
        if launched_rank() == 0:
            print("\n\n".join(parts))
    else:
        with _ending_at_ctrl_c():
            from srde_ds.training.trainer import train as train_experts

        if stopped := train_experts(config, settle=partial(settle_together, asked)):
            return 128 + signal.Signals[stopped]
    return 0
