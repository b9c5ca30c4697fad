"""`srde-ds doctor`: look for what would end a run later."""

from __future__ import annotations

import socket
from collections.abc import Sequence
from dataclasses import dataclass

from srde_ds.cli.flags import Parser, resolved
from srde_ds.cli.train import ConfigFile, TrainOptions
from srde_ds.config import Config
from srde_ds.config.values import option
from srde_ds.errors import SRDEError


@dataclass(frozen=True)
class DoctorOptions:
    """Where to look."""

    hostfile: str | None = option(None, "hosts to look at, over ssh (default: this host alone)", metavar="FILE")
    master_port: int = option(29500, "port at which the ranks meet", metavar="PORT", minimum=1, maximum=65535)
    processes: int | None = option(
        None, "without a hostfile: processes on this host (default: one for each GPU)", metavar="N", minimum=1
    )
    nodes: int = option(1, "without a hostfile: hosts with as many processes", metavar="N", minimum=1)


def doctor(arguments: Sequence[str]) -> int:
    """Print what was found. Returns 1 if something has to be repaired before training."""
    parser = Parser(
        "srde-ds doctor",
        "Look for what would end a run later: on this host, or on all hosts of a hostfile. It takes the options of a "
        "run, such as --model_name and --batch_size, as well; --help-all lists them.",
    )
    parser.add_options(DoctorOptions)
    parser.add_options(ConfigFile)
    parser.add_options(TrainOptions, rare=True)  # launchers hand on the flags of a run as they are
    parser.add_config_options(rare=True)
    given = parser.parse(arguments)
    options = parser.options(DoctorOptions, given)
    parser.options(TrainOptions, given)

    from srde_ds.cluster.doctor import check
    from srde_ds.cluster.hosts import read_hostfile
    from srde_ds.utils.escape import one_line, terminal

    config = _config(given)
    hosts = read_hostfile(options.hostfile) if options.hostfile else []
    fatal = []
    for finding in check(config, hosts, options.master_port, processes=options.processes, nodes=options.nodes):
        print(terminal(str(finding)), flush=True)
        if finding.level == "fatal":
            fatal.append(finding.text)
    host = socket.gethostname()
    verdict = f"{len(fatal)} to repair before training: {'; '.join(fatal)}" if fatal else "fit to train"
    print(one_line(f"{host}: {verdict}"))
    return int(bool(fatal))


def _config(given: dict[str, str]) -> Config:
    """As a run would resolve it; where the base or the rows cannot be read, as it is: `check` tells of that."""
    from srde_ds.training.run_inputs import read_run_inputs

    try:
        return resolved(dict(given), read_run_inputs)
    except SRDEError:
        return resolved(given)
