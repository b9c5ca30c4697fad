"""`srde-ds plan`: memory, traffic, time and price of a run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields

from srde_ds.cli.flags import Parser, add_config_flags, resolved
from srde_ds.utils.escape import terminal


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

    from srde_ds.planner.describe import describe_plan
    from srde_ds.planner.plan import Machines, make_plan, write_plan
    from srde_ds.training.schedule import prunings

    own = {field.name: given.pop(field.name) for field in fields(Machines)}
    config = resolved(given)
    made = make_plan(config, Machines(**own), prunings(config))
    print(terminal(describe_plan(made)))
    if output_file:
        write_plan(made, output_file)
        print(f"Plan: {output_file}")
