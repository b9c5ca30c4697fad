"""`srde-ds hosts`: write a hostfile and the variables of its ranks."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path

from srde_ds.cli.flags import Parser
from srde_ds.errors import SRDEError


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


def _text(path: str) -> str:
    try:
        return sys.stdin.read() if path == "-" else Path(path).read_text()
    except OSError as error:
        raise SRDEError(f"vastai={path}: {error.strerror}.") from None
