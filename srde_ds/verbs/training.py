"""`train` and `plan`."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import fields

from srde_ds.config import Config
from srde_ds.launcher import launched_rank, launched_world_size
from srde_ds.verbs.flags import Parser, add_config_flags, resolved


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
        from srde_ds.parallel.describe import describe_run
        from srde_ds.parallel.shapes import base_shape
        from srde_ds.training.phases import describe_timeline
        from srde_ds.training.run_folder import check_dry_run
        from srde_ds.training.stage_sizes import describe_stages

        base_shape(config)  # first: it knows what is wrong with a base
        check_dry_run(config)
        parts = [describe_run(config, world_size=launched_world_size()), describe_timeline(config)]
        if config.curriculum.initial_density:
            parts.insert(1, describe_stages(config, base_shape(config).blocks))
        if launched_rank() == 0:
            print("\n\n".join(parts))
    else:
        from srde_ds.training.trainer import train as train_experts

        train_experts(config)


def plan(arguments: Sequence[str]) -> None:
    parser = Parser(
        prog="srde-ds plan", description="Memory, traffic, time and price of a run; needs a base's config.json alone."
    )
    parser.add_argument("--config", metavar="FILE", help="YAML of the run; flags take precedence")
    parser.add_argument("--output_file", help="JSON to write")
    machines = parser.add_argument_group("machines")
    machines.add_argument("--gpus", type=int, default=1, help="in each node")
    machines.add_argument("--nodes", type=int, default=1, help="that share a network")
    machines.add_argument("--gpu_memory_gib", type=float, default=72.0, help="of a GPU that tensors may take")
    machines.add_argument("--peak_tflops", type=float, default=989.0, help="of a GPU in the training dtype, dense")
    machines.add_argument("--utilisation", type=float, default=0.4, help="share of the peak that computation reaches")
    machines.add_argument("--intra_node_gb_s", type=float, default=450.0, help="GB/s into a GPU from its node")
    machines.add_argument("--inter_node_gbit_s", type=float, default=400.0, help="Gbit/s into a node from the others")
    machines.add_argument("--labelled_share", type=float, default=1.0, help="share of positions that carry a label")
    machines.add_argument("--hourly_price", type=float, help="of one GPU")
    add_config_flags(parser)
    given = vars(parser.parse(arguments))

    output_file = given.pop("output_file")

    from srde_ds.parallel.describe import describe_plan
    from srde_ds.parallel.plan import Machines, make_plan, write_plan
    from srde_ds.training.phases import prunings

    own = {field.name: given.pop(field.name) for field in fields(Machines)}
    config = resolved(given)
    made = make_plan(config, Machines(**own), prunings(config))
    print(describe_plan(made))
    if output_file:
        write_plan(made, output_file)
        print(f"Plan: {output_file}")
