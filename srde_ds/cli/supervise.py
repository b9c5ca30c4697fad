"""`srde-ds supervise`: run a training command until the run is finished."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass

from srde_ds.cli.flags import Parser
from srde_ds.config.values import option
from srde_ds.errors import SRDEError


@dataclass(frozen=True)
class SuperviseOptions:
    """How often, and with how many hosts, the command is started again."""

    max_restarts: int = option(3, "attempts after the first one", metavar="N", minimum=0)
    min_nodes: int | None = option(
        None, "hosts of the hostfile that are enough to go on with (default: all)", metavar="N", minimum=1
    )
    host_timeout: float = option(60.0, "seconds to wait for hosts that do not answer", metavar="SECONDS", minimum=0.0)
    preflight: bool = option(True, "look first for what would end the run, as `srde-ds doctor` does")


def supervise(arguments: Sequence[str]) -> int:
    """Run a training command until its run is finished. Returns its exit status."""
    parser = Parser(
        "srde-ds supervise",
        "Run a training command, and start it again after a failure, until the run is finished. The command follows "
        "--, as in: srde-ds supervise --max_restarts 3 -- deepspeed launch/train.py --config run.yaml",
        usage="[options] -- COMMAND",
    )
    parser.add_options(SuperviseOptions)
    words = list(arguments)
    separator = words.index("--") if "--" in words else len(words)
    options = parser.options(SuperviseOptions, parser.parse(words[:separator]))

    from srde_ds.cli.train import train_config
    from srde_ds.cluster.supervisor import Command, Supervisor

    command = Command.parse(words[separator + 1 :])
    # This host need not hold the base: the ranks look at it.
    config, dry_run = train_config(command.train_arguments)
    if dry_run:
        raise SRDEError("dry_run=true: there is nothing to supervise. Leave --dry_run out, or `supervise` out.")
    return Supervisor(command, config, **asdict(options)).supervise()
