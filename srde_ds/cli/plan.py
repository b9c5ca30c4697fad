"""`srde-ds plan`: estimates memory, traffic, time and price of a run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from srde_ds.cli.flags import Parser, resolved
from srde_ds.cli.train import ConfigFile
from srde_ds.config.values import option
from srde_ds.planner.machines import Machines
from srde_ds.utils.escape import terminal


@dataclass(frozen=True)
class PlanOptions:
    """Where the plan goes."""

    output_file: str | None = option(None, "JSON to write", metavar="FILE", aliases=("output",))


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
    parser.add_options(Machines, title="machines")
    parser.add_config_options(rare=True)
    given = parser.parse(arguments)
    options, machines = parser.options(PlanOptions, given), parser.options(Machines, given)

    from srde_ds.planner.describe import describe_plan
    from srde_ds.planner.plan import make_plan, write_plan
    from srde_ds.training.run_inputs import read_run_inputs
    from srde_ds.training.schedule import Schedule

    config = resolved(given, read_run_inputs)
    made = make_plan(config, machines, Schedule.of(config).prunings)
    print(terminal(describe_plan(made)))
    if options.output_file:
        write_plan(made, options.output_file)
        print(f"Plan: {options.output_file}")
