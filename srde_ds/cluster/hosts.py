"""The hosts of a run: reads DeepSpeed's hostfile, and makes one from a list, Slurm or Vast.ai.

A hostfile has one line per host, `NAME slots=PROCESSES`; `#` begins a comment line
(https://www.deepspeed.ai/getting-started/#resource-configuration-multi-node). DeepSpeed 0.19.8 ignores what follows
the number. Here that may be a comment or Open MPI's `max_slots=N`. Anything else is refused, and so is whatever
DeepSpeed would misread.
"""

from __future__ import annotations

import ipaddress
import itertools
import json
import logging
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from srde_ds.errors import SRDEError
from srde_ds.utils.files import check_ordinary

logger = logging.getLogger(__name__)

# A name that pdsh and ssh take literally, not as an option, a list or something for the shell.
NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*")
# From the best to the worst source of the number of processes.
_SLURM_SLOTS = ("SLURM_GPUS_PER_NODE", "SLURM_GPUS_ON_NODE", "SLURM_TASKS_PER_NODE")
_LINE = re.compile(r"(\S+)\s+slots=(\d+)(?:\s+max[_-]slots=\d+)?(?:\s+#.*)?")


@dataclass(frozen=True)
class Host:
    """A line of a hostfile: `name` for ssh, and `slots`, the number of processes."""

    name: str
    slots: int

    @property
    def address(self) -> str:
        """The name without the user."""
        return self.name.rpartition("@")[2]


def parse_hostfile(text: str, source: str = "hostfile") -> list[Host]:
    """The hosts in the order of the file, which is also that of the ranks.

    Raises:
        SRDEError: a line is not `NAME slots=N`, or a host is listed twice.
    """
    if text.startswith("\ufeff"):
        raise SRDEError(
            f"{source}: begins with a byte order mark, which DeepSpeed would read as a part of the first host's name. "
            "Save it as UTF-8 without one."
        )
    hosts = []
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip() or line.strip().startswith("#"):
            continue
        match = _LINE.fullmatch(line.strip())
        if match is None:
            raise SRDEError(f"{source}: line {number}, '{line.strip()}', is not of the form 'NAME slots=PROCESSES'.")
        hosts.append(Host(match[1], int(match[2])))
    return _checked(hosts, source)


def read_hostfile(path: str | Path) -> list[Host]:
    """`parse_hostfile` of a file.

    Raises:
        SRDEError: the file cannot be read, or has one of the faults of `parse_hostfile`.
    """
    try:
        check_ordinary(Path(path), f"hostfile={path}", "write one with `srde-ds hosts`")
        return parse_hostfile(Path(path).read_text(encoding="utf-8"), f"hostfile={path}")
    except OSError as error:
        raise SRDEError(f"hostfile={path}: {error.strerror}. Write one with `srde-ds hosts`.") from None
    except UnicodeDecodeError:
        raise SRDEError(f"hostfile={path}: is not UTF-8 text. Write one with `srde-ds hosts`.") from None


def format_hostfile(hosts: Iterable[Host]) -> str:
    """The hosts in the form of DeepSpeed's hostfile, one per line."""
    return "".join(f"{host.name} slots={host.slots}\n" for host in hosts)


def hosts_from_list(names: Sequence[str], slots: int | None) -> list[Host]:
    """Hosts given as `name` or `name:slots`.

    Raises:
        SRDEError: a host has no number of slots, or is not a valid name.
    """
    hosts = []
    for entry in names:
        name, _, own = entry.partition(":")
        if own and not own.isdecimal():
            raise SRDEError(f"list={entry}: '{own}' is not a number of processes. Write for example {name}:8.")
        hosts.append(Host(name, _slots(int(own) if own else slots, entry)))
    return _checked(hosts, "list")


def hosts_from_slurm(variables: Mapping[str, str], slots: int | None) -> list[Host]:
    """The hosts of the current Slurm job.

    Without `slots`, a host gets as many as the job has GPUs on each node, which Slurm says for `--gpus-per-node` only.
    Else it is the number of GPUs on this node, since nodes of a job are usually alike, or else that of tasks on each.

    Raises:
        SRDEError: this is not a Slurm job, or the job gives neither number.
    """
    nodes = variables.get("SLURM_JOB_NODELIST")
    if nodes is None:
        raise SRDEError("slurm: SLURM_JOB_NODELIST is not set. Run this inside a job, or give the hosts with --list.")
    names = expand_nodelist(nodes)
    variable = next((name for name in _SLURM_SLOTS if name in variables), None)
    if slots is not None or variable is None:
        per_host = [_slots(slots, nodes)] * len(names)
    else:
        value = variables[variable]
        logger.info("slots by %s=%s; --slots gives another number.", variable, value)
        if variable == "SLURM_TASKS_PER_NODE":
            per_host = _tasks_per_node(value)
        else:  # "8", "h100:8" or "h100:4,a100:4"
            per_host = [sum(int(part.rpartition(":")[2]) for part in value.split(","))] * len(names)
    return _checked([Host(name, number) for name, number in zip(names, per_host, strict=True)], "slurm")


def expand_nodelist(text: str) -> list[str]:
    """The names in Slurm's short form, in order, as from `scontrol show hostnames`: `n[08-10],login` has four.

    Raises:
        SRDEError: the brackets do not match, or a range goes backwards.
    """
    if not re.fullmatch(r"(?:[^\[\],\s]|\[[\d,-]+\])+(?:,(?:[^\[\],\s]|\[[\d,-]+\])+)*", text):
        raise SRDEError(f"nodelist '{text}': not of the form 'name[1-3,7],other'.")
    names = []
    for pattern in re.findall(r"(?:[^\[\],]|\[[^\]]*\])+", text):
        pieces = re.findall(r"\[([^\]]*)\]|([^\[\]]+)", pattern)
        choices = [_expand_range(ranges, text) if ranges else [plain] for ranges, plain in pieces]
        names += ["".join(parts) for parts in itertools.product(*choices)]
    return names


def _expand_range(ranges: str, nodelist: str) -> list[str]:
    """`08-10,12` as 08, 09, 10, 12. A range's numbers are as wide as its first one."""
    numbers = []
    for part in ranges.split(","):
        match = re.fullmatch(r"(\d+)(?:-(\d+))?", part)
        if match is None or int(match[2] or match[1]) < int(match[1]):
            raise SRDEError(f"nodelist '{nodelist}': '{part}' is not a range.")
        numbers += [str(number).zfill(len(match[1])) for number in range(int(match[1]), int(match[2] or match[1]) + 1)]
    return numbers


def _tasks_per_node(text: str) -> list[int]:
    """Slurm's `2(x3),1` as 2, 2, 2, 1."""
    numbers: list[int] = []
    for count, times in re.findall(r"(\d+)(?:\(x(\d+)\))?", text):
        numbers += [int(count)] * int(times or 1)
    return numbers


@dataclass(frozen=True)
class VastInstance:
    """A rented container, with what ssh needs to reach it."""

    host: Host
    address: str
    port: int


def read_vastai(text: str, slots: int | None) -> list[VastInstance]:
    """The running instances in the output of `vastai show instances --raw`, with `slots` processes or one per GPU.

    A directly mapped ssh port is preferred to the provider's proxy, which is slower.

    Raises:
        SRDEError: the text is not that JSON, or no instance is running.
    """
    try:
        listed = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise SRDEError(f"vastai: not JSON ({error}). Give the output of `vastai show instances --raw`.") from None
    if not isinstance(listed, list) or not all(isinstance(entry, dict) and "id" in entry for entry in listed):
        raise SRDEError("vastai: not a list of instances. Give the output of `vastai show instances --raw`.")
    running = [entry for entry in listed if entry.get("actual_status") == "running"]
    if not running:
        states = Counter(str(entry.get("actual_status")) for entry in listed)
        raise SRDEError(f"vastai: no instance is running (states: {dict(states)}). Start one and wait for it.")
    found = []
    for entry in running:
        address, port = _ssh_address(entry)
        number = entry.get("num_gpus") if slots is None else slots
        if not (isinstance(number, int) and isinstance(address, str) and address and isinstance(port, int)):
            raise SRDEError(f"vastai: instance {entry['id']} lacks num_gpus, ssh_host or ssh_port. Is it up?")
        found.append(VastInstance(Host(f"vast-{entry['id']}", number), address, port))
    _checked([instance.host for instance in found], "vastai")
    return found


def _ssh_address(entry: dict[str, Any]) -> tuple[Any, Any]:
    direct = (entry.get("ports") or {}).get("22/tcp")
    if direct and entry.get("public_ipaddr"):
        return str(entry["public_ipaddr"]).strip(), int(direct[0]["HostPort"])
    return entry.get("ssh_host"), entry.get("ssh_port")


def format_ssh_config(instances: Iterable[VastInstance]) -> str:
    """Entries for ~/.ssh/config, since a hostfile cannot name ports."""
    return "".join(
        f"Host {instance.host.name}\n    HostName {instance.address}\n    Port {instance.port}\n    User root\n"
        for instance in instances
    )


def _slots(slots: int | None, entry: str) -> int:
    if slots is None:
        raise SRDEError(f"slots: not given for '{entry}'. Give --slots, the number of its GPUs.")
    return slots


def _is_name(text: str) -> bool:
    """Whether a text is NAME, `user@NAME`, or an IPv6 address without a scope, whose % pdsh would replace."""
    user, at, name = text.rpartition("@")
    if ":" in name and not at and "%" not in name:
        with suppress(ValueError):
            return bool(ipaddress.IPv6Address(name))
    return NAME.fullmatch(name) is not None and (not at or NAME.fullmatch(user) is not None)


def _checked(hosts: list[Host], source: str) -> list[Host]:
    """The hosts; SRDEError if there is none, or if one is listed twice, has an impossible name or no slots."""
    if not hosts:
        raise SRDEError(f"{source}: lists no host.")
    for host in hosts:
        if not _is_name(host.name):
            raise SRDEError(f"{source}: '{host.name}' is not a host name.")
        if host.slots < 1:
            raise SRDEError(
                f"{source}: slots={host.slots} of host '{host.name}': must be at least 1. Take the line out."
            )
    name, times = Counter(host.name for host in hosts).most_common(1)[0]
    if times > 1:
        raise SRDEError(f"{source}: host '{name}' is listed {times} times. Give it one line with all its slots.")
    return hosts
