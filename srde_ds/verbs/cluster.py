"""What surrounds runs on several hosts: `hosts`, `supervise`, `monitor` and `doctor`."""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Sequence
from pathlib import Path

from srde_ds.errors import SRDEError
from srde_ds.verbs.flags import Parser, add_config_flags, resolved


def hosts(arguments: Sequence[str]) -> None:
    parser = Parser(
        prog="srde-ds hosts",
        description="Write a hostfile for `deepspeed --hostfile`, and .deepspeed_env, the variables of its ranks.",
    )
    source = parser.add_argument_group("hosts", "one of these").add_mutually_exclusive_group()
    source.add_argument("--list", metavar="NAME[:SLOTS],...", help="hosts by name")
    source.add_argument("--slurm", action="store_true", help="the nodes of the Slurm job that this runs in")
    source.add_argument(
        "--vastai", metavar="FILE", help="what `vastai show instances --raw` printed; '-' reads standard input"
    )
    parser.add_argument("--slots", type=int, help="processes on each host, one a GPU (default: as the source says)")
    parser.add_argument("--output_file", metavar="FILE", help="hostfile to write (default: print it)")
    parser.add_argument("--ssh_config", metavar="FILE", help="vastai: entries for ~/.ssh/config to write")
    ranks = parser.add_argument_group("variables of the ranks")
    ranks.add_argument("--interface", help="network interface between the hosts, such as eth0, for gloo and NCCL")
    ranks.add_argument("--variables", metavar="NAME[=VALUE],...", help="more; NAME alone takes the value it has here")
    ranks.add_argument("--environment_file", metavar="FILE", default=".deepspeed_env", help="where deepspeed looks")
    options = parser.parse(arguments)

    from srde_ds.cluster import hosts as cluster_hosts
    from srde_ds.cluster.rank_environment import format_rank_environment, rank_environment

    written: dict[str, str] = {}
    ssh_config = None
    if options.list:
        found = cluster_hosts.hosts_from_list(options.list.split(","), options.slots)
    elif options.slurm:
        found = cluster_hosts.hosts_from_slurm(os.environ, options.slots)
    elif options.vastai:
        instances = cluster_hosts.read_vastai(_text(options.vastai), options.slots)
        found, ssh_config = [instance.host for instance in instances], cluster_hosts.format_ssh_config(instances)
    else:
        raise SRDEError(f"no hosts: give --list, --slurm or --vastai (see {parser.prog} --help)")
    if options.output_file:
        written[options.output_file] = cluster_hosts.format_hostfile(found)
    else:
        print(cluster_hosts.format_hostfile(found), end="")
    if options.ssh_config:
        if ssh_config is None:
            raise SRDEError("ssh_config: only --vastai tells ports. Leave it out.")
        written[options.ssh_config] = ssh_config
    if options.interface or options.variables:
        names = options.variables.split(",") if options.variables else []
        variables = rank_environment(names, options.interface, os.environ)
        written[options.environment_file] = format_rank_environment(variables)
    for path, text in written.items():
        try:
            Path(path).write_text(text)
        except OSError as error:
            raise SRDEError(f"'{path}' cannot be written: {error.strerror}.") from None
        print(f"Written: {path}", file=sys.stderr)


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

    from srde_ds.cluster.supervisor import Command, Supervisor
    from srde_ds.verbs.training import train_config

    command = Command.parse(words[separator + 1 :])
    config, dry_run = train_config(command.train_arguments)
    if dry_run:
        raise SRDEError("dry_run=true: there is nothing to supervise. Leave --dry_run out, or `supervise` out.")
    return Supervisor(command, config, **vars(options)).supervise()


def monitor(arguments: Sequence[str]) -> int:
    parser = Parser(prog="srde-ds monitor", description="Watch a run by its progress, and tell a webhook of changes.")
    parser.add_argument("run", help="the --output_dir of a run")
    parser.add_argument("--webhook", metavar="URL", help="gets JSON by POST (default: WEBHOOK_URL of the environment)")
    parser.boolean("--once", False, "print the state and stop; the status is 1 for a run that is not well")
    parser.add_argument("--interval", type=float, default=10.0, help="seconds between looks")
    parser.add_argument("--stall_seconds", type=float, help="without a finished step (default: ten usual steps)")
    options = vars(parser.parse(arguments))

    from srde_ds.cluster import monitor as monitoring

    options["webhook"] = options["webhook"] or monitoring.webhook_from_environment()
    return monitoring.monitor(**options)


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

    config = resolved(given)
    hosts = read_hostfile(hostfile) if hostfile else []
    fatal = []
    for finding in check(config, hosts, port, processes=processes, nodes=nodes):
        print(finding, flush=True)
        if finding.level == "fatal":
            fatal.append(finding.text)
    host = socket.gethostname()
    print(f"{host}: {len(fatal)} to repair before training: {'; '.join(fatal)}" if fatal else f"{host}: fit to train")
    return int(bool(fatal))


def _text(path: str) -> str:
    try:
        return sys.stdin.read() if path == "-" else Path(path).read_text()
    except OSError as error:
        raise SRDEError(f"vastai={path}: {error.strerror}.") from None
