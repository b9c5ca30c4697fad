"""`srde-ds hosts`: writes a hostfile and the variables of its ranks."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from srde_ds.cli.flags import Parser
from srde_ds.config.values import option
from srde_ds.errors import SRDEError
from srde_ds.utils.files import output


@dataclass(frozen=True)
class HostsOptions:
    """Where the hosts come from, and where the hostfile goes."""

    list: str | None = option(None, "hosts by name", metavar="NAME[:SLOTS],...")
    slurm: bool = option(False, "the nodes of the current Slurm job")
    vastai: str | None = option(
        None, "output of `vastai show instances --raw`; '-' reads standard input", metavar="FILE"
    )
    hostfile: str | None = option(None, "an existing hostfile, to check and rewrite", metavar="FILE")
    slots: int | None = option(
        None, "number of processes on each host, one per GPU (default: as the source says)", metavar="N"
    )
    output_file: str | None = option(None, "hostfile to write (default: print it)", metavar="FILE", aliases=("output",))
    ssh_config: str | None = option(None, "with vastai: file to write entries for ~/.ssh/config to", metavar="FILE")


@dataclass(frozen=True)
class RankVariables:
    """The environment of the ranks."""

    interface: str | None = option(
        None, "network interface between the hosts, such as eth0, for gloo and NCCL", metavar="NAME"
    )
    variables: str | None = option(
        None, "further variables; NAME alone takes its value from here", metavar="NAME[=VALUE],..."
    )
    environment_file: str = option(
        ".deepspeed_env", "file to add them to, as deepspeed expects it; others there stay", metavar="FILE"
    )


def hosts(arguments: Sequence[str]) -> None:
    """Write or print a hostfile, and write the ranks' variables."""
    parser = Parser(
        "srde-ds hosts",
        "Write a hostfile for `deepspeed --hostfile`, and .deepspeed_env, the variables of its ranks.",
        usage="(--list NAMES | --slurm | --vastai FILE | --hostfile FILE) [options]",
    )
    parser.add_options(HostsOptions)
    parser.add_options(RankVariables, title="variables of the ranks")
    given = parser.parse(arguments)
    options, ranks = parser.options(HostsOptions, given), parser.options(RankVariables, given)
    sources = [name for name in ("list", "slurm", "vastai", "hostfile") if getattr(options, name)]
    if len(sources) > 1:
        raise SRDEError(f"--{sources[0]} and --{sources[1]} both name the hosts: leave one out.")

    from srde_ds.cluster import hosts as cluster_hosts
    from srde_ds.cluster.rank_environment import format_rank_environment, rank_environment, read_rank_environment

    written: dict[str, str] = {}
    ssh_config = None
    if options.list:
        found = cluster_hosts.hosts_from_list(options.list.split(","), options.slots)
    elif options.slurm:
        found = cluster_hosts.hosts_from_slurm(os.environ, options.slots)
    elif options.vastai:
        instances = cluster_hosts.read_vastai(_text(options.vastai), options.slots)
        found, ssh_config = [instance.host for instance in instances], cluster_hosts.format_ssh_config(instances)
    elif options.hostfile:
        found = cluster_hosts.read_hostfile(options.hostfile)
        if options.slots is not None:
            raise SRDEError(
                f"slots={options.slots} with hostfile={options.hostfile}: the file already has them. Leave it out."
            )
    else:
        raise SRDEError(f"no hosts: give --list, --slurm, --vastai or --hostfile (see {parser.prog} --help)")
    if options.output_file:
        written[options.output_file] = cluster_hosts.format_hostfile(found)
    else:
        print(cluster_hosts.format_hostfile(found), end="")
    if options.ssh_config:
        if ssh_config is None:
            raise SRDEError("ssh_config: only --vastai knows the ports. Leave it out.")
        written[options.ssh_config] = ssh_config
    if ranks.interface or ranks.variables:
        names = ranks.variables.split(",") if ranks.variables else []
        variables = rank_environment(names, ranks.interface, os.environ)
        try:
            there = read_rank_environment(Path(ranks.environment_file))
        except (OSError, UnicodeDecodeError):
            raise SRDEError(f"environment_file={ranks.environment_file}: cannot be read. Remove it.") from None
        if kept := [name for name in there if name not in variables]:
            print(f"Kept in {ranks.environment_file}: {', '.join(kept)}", file=sys.stderr)
        written[ranks.environment_file] = format_rank_environment(there | variables)
    for path, text in written.items():
        try:
            with output(Path(path)) as partial:
                partial.write_text(text)
        except OSError as error:
            raise SRDEError(f"'{path}' cannot be written: {error.strerror}.") from None
        print(f"Written: {path}", file=sys.stderr)


def _text(path: str) -> str:
    try:
        return sys.stdin.read() if path == "-" else Path(path).read_text()
    except OSError as error:
        raise SRDEError(f"vastai={path}: {error.strerror}.") from None
