"""`srde-ds doctor`: look for what would end a run later."""

from __future__ import annotations

import socket
from collections.abc import Sequence

from srde_ds.cli.flags import Parser, add_config_flags, resolved


def doctor(arguments: Sequence[str]) -> int:
    parser = Parser(
        prog="srde-ds doctor", description="Look for what would end a run later: on this host, or on all of a hostfile."
    )
    parser.add_argument("--hostfile", metavar="FILE", help="hosts to look at, over ssh (default: this one alone)")
    parser.add_argument("--master_port", type=int, default=29500, help="rendezvous port")
    alone = parser.add_argument_group("the run, without a hostfile")
    alone.add_argument("--processes", type=int, help="on this host (default: one a GPU)")
    alone.add_argument("--nodes", type=int, default=1, help="hosts with as many processes")
    parser.add_argument("--config", metavar="FILE", help="YAML of the run; flags take precedence")
    # Launchers give a run's flags as they are.
    parser.boolean("--dry_run", False, "of the run: a dry run's hosts are looked at, too")
    add_config_flags(parser)
    given = vars(parser.parse(arguments))
    del given["dry_run"]
    hostfile, port = given.pop("hostfile"), given.pop("master_port")
    processes, nodes = given.pop("processes"), given.pop("nodes")

    from srde_ds.cluster.doctor import check
    from srde_ds.cluster.hosts import read_hostfile
    from srde_ds.utils.escape import one_line, terminal

    config = resolved(given)
    hosts = read_hostfile(hostfile) if hostfile else []
    fatal = []
    for finding in check(config, hosts, port, processes=processes, nodes=nodes):
        print(terminal(str(finding)), flush=True)
        if finding.level == "fatal":
            fatal.append(finding.text)
    host = socket.gethostname()
    verdict = f"{len(fatal)} to repair before training: {'; '.join(fatal)}" if fatal else "fit to train"
    print(one_line(f"{host}: {verdict}"))
    return int(bool(fatal))
