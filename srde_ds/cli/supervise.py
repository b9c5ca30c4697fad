"""`srde-ds supervise`: runs a training command until the run has finished."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass

from srde_ds.cli.flags import Parser
from srde_ds.config.values import option
from srde_ds.errors import SRDEError


@dataclass(frozen=True)
class SuperviseOptions:
    """How often to restart the command, and with how many hosts."""

    max_restarts: int = option(
        3, "number of attempts after the first, and after each that has left a new checkpoint", metavar="N", minimum=0
    )
    min_nodes: int | None = option(
        None, "number of the hostfile's hosts that suffice to continue (default: all)", metavar="N", minimum=1
    )
    host_timeout: float = option(60.0, "seconds to wait for hosts that do not answer", metavar="SECONDS", minimum=0.0)
    preflight: bool = option(True, "check first for problems that would end the run, like `srde-ds doctor`")


def supervise(arguments: Sequence[str]) -> int:
    """Run a training command until its run has finished. Returns the exit status."""
    parser = Parser(
        "srde-ds supervise",
        "Run a training command, and restart it after failures, until the run has finished. The command follows "
        "--, as in: srde-ds supervise --max_restarts 3 -- deepspeed launch/train.py --config run.yaml",
        usage="[options] -- COMMAND",
    )
    parser.add_options(SuperviseOptions)
    words = list(arguments)
    separator = words.index("--") if "--" in words else len(words)
    options = parser.options(SuperviseOptions, parser.parse(words[:separator]))

    from srde_ds.cli.train import train_config_of_launcher
    from srde_ds.cluster.supervisor import Command, Supervisor

    command = Command.parse(words[separator + 1 :])
    config, dry_run = train_config_of_launcher(command.train_arguments)
    if dry_run:
        raise SRDEError("dry_run=true: there is nothing to supervise. Leave --dry_run out, or `supervise` out.")
    return Supervisor(command, config, **asdict(options)).supervise()
