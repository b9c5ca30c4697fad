"""`srde-ds train`: train experts on a frozen base."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from srde_ds.cli.flags import Parser, add_config_flags, resolved
from srde_ds.config import Config
from srde_ds.utils.launcher import launched_rank, launched_world_size


def train_config(arguments: Sequence[str]) -> tuple[Config, bool]:
    """The resolved config of a `train` command line, and whether it is a dry run."""
    parser = Parser(prog="srde-ds train", description="Train experts on a frozen base.")
    parser.add_argument("--config", metavar="FILE", help="YAML with sections and keys; flags take precedence")
    parser.boolean("--dry_run", False, "print the resolved config, parameters, memory and time line, and stop")
    parser.add_argument("--local_rank", help=argparse.SUPPRESS)  # the deepspeed launcher adds it
    add_config_flags(parser)
    given = vars(parser.parse(arguments))
    dry_run = given.pop("dry_run")
    given.pop("local_rank")
    return resolved(given), dry_run


def train(arguments: Sequence[str]) -> None:
    config, dry_run = train_config(arguments)
    if dry_run:
        from srde_ds.model.base_shape import base_shape
        from srde_ds.planner.describe import describe_run
        from srde_ds.planner.trained_values import describe_trained_values, trained_values
        from srde_ds.training.run_folder import check_dry_run
        from srde_ds.training.schedule import Schedule

        shape = base_shape(config)  # first: it knows what is wrong with a base
        check_dry_run(config)
        schedule = Schedule.of(config)
        parts = [describe_run(config, shape, world_size=launched_world_size()), schedule.describe()]
        if config.curriculum.initial_density:
            spans = trained_values(config.adapter, schedule.densities, shape.blocks)
            parts.insert(1, describe_trained_values(spans, schedule.max_steps))
        if launched_rank() == 0:
            print("\n\n".join(parts))
    else:
        from srde_ds.training.trainer import train as train_experts

        train_experts(config)
