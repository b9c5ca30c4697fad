"""`srde-ds plan`: estimates memory, traffic, time and price of a run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass

from srde_ds.cli.flags import Parser, resolved
from srde_ds.cli.train import ConfigFile
from srde_ds.config.values import option
from srde_ds.utils.escape import terminal


@dataclass(frozen=True)
class PlanOptions:
    """Where the plan goes."""

    output_file: str | None = option(None, "JSON to write", metavar="FILE", aliases=("output",))


@dataclass(frozen=True)
class MachineOptions:
    """The machines of `planner.plan.Machines`."""

    gpus: int = option(1, "GPUs in each node", metavar="N")
    nodes: int = option(1, "nodes that share a network", metavar="N")
    gpu_memory_gib: float = option(72.0, "memory of a GPU that tensors may take, in GiB", metavar="GIB")
    peak_tflops: float = option(989.0, "dense TFLOP/s of a GPU in the training dtype", metavar="TFLOPS")
    utilisation: float = option(0.4, "share of that peak which computation reaches", metavar="SHARE")
    intra_node_gb_s: float = option(450.0, "GB/s into a GPU from its node", metavar="GB_S")
    inter_node_gbit_s: float = option(400.0, "Gbit/s into a node from the others", metavar="GBIT_S")
    labelled_share: float = option(1.0, "share of the positions that carry a label", metavar="SHARE")
    hourly_price: float | None = option(None, "price of a GPU for an hour, in any currency", metavar="PRICE")


def plan(arguments: Sequence[str]) -> None:
    """Print the plan of a run, and write it if asked to."""
    parser = Parser(
        "srde-ds plan",
        "Estimate memory, traffic, time and price of a run from the config.json of its base alone. It takes the "
        "options of a run, such as --model_name and --batch_size, as well; --help-all lists them.",
        usage="--model_name BASE [options]",
    )
    parser.add_options(ConfigFile)
    parser.add_options(PlanOptions)
    parser.add_options(MachineOptions, title="machines")
    parser.add_config_options(rare=True)
    given = parser.parse(arguments)
    options, machines = parser.options(PlanOptions, given), parser.options(MachineOptions, given)

    from srde_ds.planner.describe import describe_plan
    from srde_ds.planner.plan import Machines, make_plan, write_plan
    from srde_ds.training.run_inputs import read_run_inputs
    from srde_ds.training.schedule import Schedule

    config = resolved(given, read_run_inputs)
    made = make_plan(config, Machines(**asdict(machines)), Schedule.of(config).prunings)
    print(terminal(describe_plan(made)))
    if options.output_file:
        write_plan(made, options.output_file)
        print(f"Plan: {options.output_file}")
