"""`srde-ds doctor`: looks for problems that would end a run later."""

from __future__ import annotations

import socket
from collections.abc import Sequence
from dataclasses import dataclass

from srde_ds.cli.flags import Parser
from srde_ds.cli.train import ConfigFile, TrainOptions, resolved_of_launcher
from srde_ds.config.values import option


@dataclass(frozen=True)
class DoctorOptions:
    """Where to look."""

    hostfile: str | None = option(None, "hosts to check, over ssh (default: only this host)", metavar="FILE")
    master_port: int = option(29500, "rendezvous port of the ranks", metavar="PORT", minimum=1, maximum=65535)
    processes: int | None = option(
        None, "without a hostfile: number of processes on this host (default: one per GPU)", metavar="N", minimum=1
    )
    nodes: int = option(1, "without a hostfile: number of hosts with so many processes", metavar="N", minimum=1)


def doctor(arguments: Sequence[str]) -> int:
    """Print the findings. Returns 1 if something has to be repaired before training."""
    parser = Parser(
        "srde-ds doctor",
        "Look for problems that would end a run later, on this host or on all hosts of a hostfile. It also takes the "
        "options of a run, such as --model_name and --batch_size; --help-all lists them.",
    )
    parser.add_options(DoctorOptions)
    parser.add_options(ConfigFile)
    parser.add_options(TrainOptions, rare=True)  # launchers pass the flags of a run on unchanged
    parser.add_config_options(rare=True)
    given = parser.parse(arguments)
    options = parser.options(DoctorOptions, given)
    parser.options(TrainOptions, given)

    from srde_ds.cluster.doctor import check
    from srde_ds.cluster.hosts import read_hostfile
    from srde_ds.utils.escape import one_line, terminal

    config = resolved_of_launcher(given)  # what cannot be read, `check` reports
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
