"""`srde-ds supervise`: run a training command until the run is finished."""

from __future__ import annotations

from collections.abc import Sequence

from srde_ds.cli.flags import Parser
from srde_ds.errors import SRDEError


def supervise(arguments: Sequence[str]) -> int:
    parser = Parser(
        prog="srde-ds supervise",
        description="Run a training command, and start it again after a failure, until the run is finished.",
        epilog="The command follows --: srde-ds supervise --max_restarts 3 -- deepspeed ... launch/train.py ...",
    )
    parser.add_argument("--max_restarts", type=int, default=3, help="attempts after the first one")
    parser.add_argument("--min_nodes", type=int, help="hosts of the hostfile to go on with (default: all)")
    parser.add_argument(
        "--host_timeout", type=float, default=60.0, help="seconds to wait for hosts that do not answer (default: 60)"
    )
    parser.boolean("--preflight", True, "look first for what would end the run (`srde-ds doctor`)")
    words = list(arguments)
    separator = words.index("--") if "--" in words else len(words)
    options = parser.parse(words[:separator])
    for name, least in (("max_restarts", 0), ("min_nodes", 1), ("host_timeout", 0)):
        value = getattr(options, name)
        if value is not None and value < least:
            raise SRDEError(f"{name}={value}: must be at least {least}.")

    from srde_ds.cli.train import train_config
    from srde_ds.cluster.supervisor import Command, Supervisor

    command = Command.parse(words[separator + 1 :])
    config, dry_run = train_config(command.train_arguments)
    if dry_run:
        raise SRDEError("dry_run=true: there is nothing to supervise. Leave --dry_run out, or `supervise` out.")
    return Supervisor(command, config, **vars(options)).supervise()
