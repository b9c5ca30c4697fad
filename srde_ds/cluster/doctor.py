"""Finds problems before a run that would end it later."""

from __future__ import annotations

import itertools
import json
import os
import re
import secrets
import shlex
import subprocess
import sys
import threading
import time
from collections.abc import Generator, Iterator, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, replace
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from queue import Empty, Queue
from typing import Any, Literal

from packaging.requirements import Requirement

from srde_ds.cluster.host_agent import describe_host, gpus
from srde_ds.cluster.hosts import Host
from srde_ds.cluster.rank_environment import read_rank_environment
from srde_ds.config import Config
from srde_ds.errors import SRDEError
from srde_ds.utils.units import GIB

Level = Literal["ok", "warning", "fatal"]
CLOCK_SECONDS = 2.0
ANSWER_SECONDS = 90.0
_AGENT = "srde_ds.cluster.host_agent"
_NO_FOLDER, _NO_PYTHON = 91, 92  # exit statuses of the command that starts the agent
SSH = ("ssh", "-o", "BatchMode=yes", "-o", "ConnectTimeout=10")


@dataclass(frozen=True)
class Finding:
    """The result of a check. `remedy` is empty if nothing is wrong, or if the text includes it."""

    level: Level
    text: str
    remedy: str = ""

    def __str__(self) -> str:
        remedy = f"\n\t-> {self.remedy}" if self.remedy else ""
        return f"{self.level}\t{self.text}{remedy}".expandtabs()


def check(
    config: Config, hosts: Sequence[Host], port: int, *, processes: int | None = None, nodes: int = 1
) -> Iterator[Finding]:
    """Run all checks.

    Args:
        hosts: the hosts of a hostfile; without them only this host is checked.
        port: the rendezvous port.
        processes: without a hostfile, the number of processes on this host (default: one per GPU).
        nodes: without a hostfile, the number of hosts with so many processes.
    """
    if hosts:  # this host may be none of them
        memory = yield from check_hosts(config.model.model_name, config.training.output_dir, hosts, port)
        yield from check_here(config, sum(host.slots for host in hosts), gpu_gib=memory)
        return
    here = processes or max(1, len(_visible(gpus())))
    yield from check_here(config, here * nodes, processes_here=here)


def _visible(found: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """This host's GPUs in the order in which processes of this shell take them; with memory 0 if it is not known which
    they are.

    CUDA_VISIBLE_DEVICES has numbers, by which CUDA calls the fastest GPU the first unless it is told otherwise, or the
    beginnings of UUIDs. Without it, the one with the most memory stands for the fastest.
    """
    named, by_bus = os.environ.get("CUDA_VISIBLE_DEVICES"), os.environ.get("CUDA_DEVICE_ORDER") == "PCI_BUS_ID"
    if named is None:
        return found if by_bus else sorted(found, key=lambda gpu: -float(gpu["memory_gib"]))
    in_order = by_bus or len({gpu["memory_gib"] for gpu in found}) == 1
    visible: list[dict[str, Any]] = []
    for name in map(str.strip, named.split(",")):
        if name == "-1":
            break  # CUDA takes none of those behind it
        if name.isdecimal():
            visible += [gpu if in_order else gpu | {"memory_gib": 0.0} for gpu in found[int(name) : int(name) + 1]]
        elif name.startswith("MIG-"):
            visible.append({"name": name, "memory_gib": 0.0, "driver": "unknown"})
        elif name:
            visible += [gpu for gpu in found if gpu["uuid"].startswith(name)][:1]
    return visible


def check_here(
    config: Config, processes: int, *, processes_here: int = 1, gpu_gib: float | None = None
) -> Iterator[Finding]:
    """Quick checks of this host: packages, GPUs, base, memory, disk.

    Args:
        processes: number of processes of the whole run.
        processes_here: number of processes on this host.
        gpu_gib: least memory of the GPUs of the run's hosts; None: the run uses this host's GPUs.
    """
    yield from check_packages()
    found = describe_host(None, config.training.output_dir)
    if gpu_gib is None:
        visible = _visible(found["gpus"])
        gpu_gib = min((gpu["memory_gib"] for gpu in visible[:processes_here]), default=0.0)
        yield check_gpus(visible, processes_here)
    yield from check_locks(Path(os.environ.get("TORCH_EXTENSIONS_DIR", Path.home() / ".cache/torch_extensions")))
    if not found["writable"]:
        yield Finding("fatal", f"output_dir={config.training.output_dir} is not writable", "choose another one")
    if config.model.model_name is None:
        yield Finding("warning", "no --model_name: memory and disk were not checked", "give the options of the run")
        return
    # Checkpoints that are there make room for later ones.
    kept = sum(path.stat().st_size for path in Path(config.training.output_dir).glob("checkpoint-*/*"))
    yield from check_sizes(config, processes, gpu_gib * GIB, found["free_bytes"] + kept)


def check_packages() -> Iterator[Finding]:
    """Check that the installed packages have the versions that this package needs."""
    wrong = False
    for text in requires("srde-ds") or []:
        needed = Requirement(text)
        if needed.marker and not needed.marker.evaluate({"extra": ""}):
            continue
        try:
            found = version(needed.name)
        except PackageNotFoundError:
            found = "none"
        if found == "none" or not needed.specifier.contains(found, prereleases=True):
            wrong = True
            yield Finding(
                "fatal", f"package {needed.name}: {found}, needed {needed.specifier}", f"pip install '{text}'"
            )
    if not wrong:
        yield Finding("ok", "packages have the required versions")


def check_gpus(gpus: Sequence[dict[str, Any]], processes: int, host: str = "this host") -> Finding:
    """Check that the host has a GPU for each process; only a warning if it has none at all."""
    if not gpus:
        return Finding(
            "warning",
            f"{host}: no GPU found (nvidia-smi)",
            "training uses CPUs over gloo; otherwise check driver and CUDA_VISIBLE_DEVICES",
        )
    names = sorted({f"{gpu['name']}, driver {gpu['driver']}" for gpu in gpus})
    if len(gpus) < processes:
        return Finding("fatal", f"{host}: {len(gpus)} GPUs for {processes} processes", "start one process per GPU")
    return Finding("ok", f"{host}: {len(gpus)} x {' and '.join(names)}")


def check_locks(folder: Path) -> Iterator[Finding]:
    """Find locks that killed builds of extensions left behind: the next build would silently wait for them forever."""
    for lock in folder.glob("**/lock"):
        yield Finding("warning", f"'{lock}' may be left from a killed build", "remove it if nothing compiles right now")


def check_sizes(config: Config, processes: int, gpu_bytes: float, free_bytes: int) -> Iterator[Finding]:
    """Check that memory and disk suffice, also before supports are pruned.

    Args:
        gpu_bytes: memory of a GPU; 0 without one.
        free_bytes: room for the run's checkpoints, including those that are there.
    """
    from srde_ds.distributed.workload import Workload
    from srde_ds.model.base_shape import base_shape, check_whole
    from srde_ds.planner.memory import largest_memory
    from srde_ds.planner.settle import USABLE
    from srde_ds.planner.trainables import trainable_values

    try:
        shape = base_shape(config)
        check_whole(config.parallel, shape, processes)
    except SRDEError as error:
        yield Finding("fatal", str(error))
        return
    work = Workload.of(config, processes)
    if shape.packing is not None:  # whatever `auto` would say
        work = replace(work, whole_base=True)
    needed = largest_memory(work, shape).total
    if gpu_bytes and needed > USABLE * gpu_bytes:
        yield Finding(
            "fatal",
            f"memory: {needed / GIB:.1f} GiB per process, but the GPU has {gpu_bytes / GIB:.1f}",
            "smaller --batch_size or --max_length, --gradient_checkpointing, or more processes (srde-ds plan)",
        )
    else:
        yield Finding("ok", f"memory: {needed / GIB:.2f} GiB per process planned")
    per_value = 8 if config.optimizer.use_muon else 12
    checkpoint = per_value * sum(trainable_values(work.at(work.largest_density).adapter, shape).values())
    room = checkpoint * (config.training.save_total_limit + 1)
    text = f"disk: {room / GIB:.2f} GiB for {config.training.save_total_limit} checkpoints and one being written"
    if room > free_bytes:
        remedy = "free some space, or give another --output_dir or a smaller --save_total_limit"
        yield Finding("fatal", f"{text}; there is room for {free_bytes / GIB:.2f} GiB", remedy)
    else:
        yield Finding("ok", f"{text}; there is room for {free_bytes / GIB:.1f} GiB")


def check_hosts(base: str | None, output_dir: str, hosts: Sequence[Host], port: int) -> Generator[Finding, None, float]:
    """Check that the hosts can run together. `port` is that of the rendezvous.

    Returns:
        The least memory of their GPUs in GiB, since CUDA takes the better ones first; 0 if it is not known.
    """
    memory: list[float] = []
    with ExitStack() as stack:
        agents: dict[str, Agent] = {}
        for host in hosts:
            try:
                agents[host.name] = stack.enter_context(Agent(host.name))
                agents[host.name].ask("clock")
            except AgentError as error:
                yield error.finding()
                agents.pop(host.name, None)
        found: dict[str, dict[str, Any]] = {}
        for name, agent in list(agents.items()):
            try:
                found[name] = agent.ask("describe_host", base=base, output_dir=output_dir)
            except AgentError as error:  # the other hosts are checked without this one
                yield error.finding()
                del agents[name]
        try:
            yield from compare(found)
            for host in hosts:
                if host.name in found:
                    there = found[host.name]["gpus"]
                    memory += sorted(gpu["memory_gib"] for gpu in there)[-host.slots :]
                    yield check_gpus(there, host.slots, host.name)
            yield from check_interfaces(found, rank_variables())
            yield from _check_clocks(agents)
            yield from _check_shared(agents, Path(output_dir).absolute())
            yield from _check_ports(agents, port)
        except AgentError as error:
            yield error.finding()
    return min(memory, default=0.0)


def compare(found: dict[str, dict[str, Any]]) -> Iterator[Finding]:
    """Compare packages and base files of all hosts with those of the first."""
    if not found:
        return
    first, *others = found
    for what, remedy in (
        ("versions", "install the same packages"),
        ("base", "copy the same base, or share its folder"),
    ):
        expected, same = found[first][what], True
        for other in others:
            theirs = found[other][what]
            if theirs == expected:
                continue
            same = False
            if expected is None or theirs is None:
                yield Finding("fatal", f"{what}: there is none on {other if theirs is None else first}", remedy)
                continue
            names = [key for key in {**expected, **theirs} if expected.get(key) != theirs.get(key)]
            text = f"{names[0]}: {theirs.get(names[0])} on {other}, {expected.get(names[0])} on {first}"
            yield Finding("fatal", f"{what} differ: {text} ({len(names)} in all)", f"{remedy} on both")
        if same and expected is not None:
            yield Finding("ok", f"the same {what} on {len(found)} hosts")


def check_interfaces(found: dict[str, dict[str, Any]], variables: dict[str, str]) -> Iterator[Finding]:
    """Check that the ranks' network interface exists. With a wrong one, one side fails and the other hangs."""
    for library in ("GLOO", "NCCL"):
        name = variables.get(f"{library}_SOCKET_IFNAME", "")
        plain = re.fullmatch(r"[\w.]+", name) is not None  # NCCL also takes prefixes and exclusions
        for host, fact in found.items():
            if plain and not any(each.startswith(name) for each in fact["interfaces"]):
                remedy = f"it has {', '.join(fact['interfaces'])}: srde-ds hosts --hostfile HOSTFILE --interface NAME"
                yield Finding("fatal", f"{host}: no interface {name} ({library}_SOCKET_IFNAME)", remedy)
            elif library == "GLOO" and not name and not fact["gpus"] and fact["own_address"].startswith("127."):
                text = f"{host}: its name resolves to {fact['own_address']}, which gloo would offer to the other hosts"
                remedy = "name the interface: srde-ds hosts --hostfile HOSTFILE --interface eth0 (.deepspeed_env)"
                yield Finding("fatal", text, remedy)
        if name:
            yield Finding("ok", f"{library} uses interface {name}")


def _check_clocks(agents: dict[str, Agent]) -> Iterator[Finding]:
    skew = {}
    for name, agent in agents.items():
        asked = time.time()
        theirs = agent.ask("clock")
        skew[name] = theirs - (asked + time.time()) / 2
    if not skew:
        return
    worst = max(skew.values()) - min(skew.values())
    if worst > CLOCK_SECONDS:
        text = ", ".join(f"{name} {offset:+.1f} s" for name, offset in skew.items())
        yield Finding("warning", f"clocks differ: {text}", "run an NTP client: otherwise logs and file times mislead")
    else:
        yield Finding("ok", f"clocks agree within {max(worst, 0.1):.1f} s")


def _check_shared(agents: dict[str, Agent], output_dir: Path) -> Iterator[Finding]:
    """Check that every host sees a file that the first one writes."""
    if len(agents) < 2:
        return
    first, *others = agents
    token = output_dir.parent / f".srde-ds-doctor-{secrets.token_hex(4)}"
    reason = agents[first].ask("write", path=str(token))
    if reason:
        yield Finding(
            "fatal", f"'{token.parent}' cannot be written on {first}: {reason}", "choose another --output_dir"
        )
        return
    try:
        blind = [name for name in others if not agents[name].ask("see", path=str(token))]
    finally:
        with suppress(OSError):
            token.unlink()
    if blind:
        text = f"'{token.parent}' is not shared: {', '.join(blind)} cannot see what {first} writes there"
        yield Finding("fatal", text, "give an --output_dir on storage that all hosts share")
    else:
        yield Finding("ok", f"'{token.parent}' is shared by all hosts")


def _check_ports(agents: dict[str, Agent], port: int) -> Iterator[Finding]:
    failures = 0
    for name, agent in agents.items():
        if reason := agent.ask("listen", port=port):
            failures += 1
            yield Finding("fatal", f"{name}: port {port}: {reason}", "end what uses it, or give another --master_port")
    chosen = {name: agent.ask("listen_anywhere") for name, agent in agents.items()} if len(agents) > 1 else {}
    for one, other in itertools.permutations(agents, 2):
        for number, also in ((port, ""), (chosen[other], " (ranks need ports that the system chooses, too)")):
            if reason := agents[one].ask("connect", host=Host(other, 1).address, port=number):
                failures += 1
                text = f"{one} cannot reach {other}:{number}{also}: {reason}"
                yield Finding("fatal", text, "check firewall, routes, /etc/hosts")
                break
    if len(agents) > 1 and not failures:
        text = f"all pairs of {len(agents)} hosts can connect on port {port}, and on one that the system chooses"
        yield Finding("ok", text)


class AgentError(Exception):
    """A host has not answered.

    Attributes:
        test: a command to run there that shows the reason.
    """

    def __init__(self, host: str, reason: str, test: str = "true") -> None:
        super().__init__(reason)
        self.host, self.test = host, test

    def finding(self) -> Finding:
        """What the host said, and the command that shows it."""
        return Finding("fatal", f"{self.host}: {self}", f"try: {shlex.join([*SSH, self.host, self.test])}")


class Agent:
    """`host_agent.py` on a host, over ssh, in the current folder and with the current Python."""

    def __init__(self, host: str) -> None:
        self.host = host
        folder, python = shlex.quote(os.getcwd()), shlex.quote(sys.executable)
        remote = f"cd {folder} || exit {_NO_FOLDER}; [ -x {python} ] || exit {_NO_PYTHON}; {python} -m {_AGENT}"
        pipe = subprocess.PIPE
        self._process = subprocess.Popen([*SSH, host, remote], stdin=pipe, stdout=pipe, stderr=pipe, text=True)
        self._answers: Queue[str] = Queue()
        threading.Thread(target=self._read, daemon=True).start()

    def ask(self, question: str, **arguments: Any) -> Any:
        """Ask a question; raises an AgentError with ssh's reason, or after ANSWER_SECONDS."""
        assert self._process.stdin and self._process.stderr
        try:
            self._process.stdin.write(json.dumps([question, arguments]) + "\n")
            self._process.stdin.flush()
            answer = self._answers.get(timeout=ANSWER_SECONDS)
        except Empty:
            raise AgentError(self.host, f"no answer within {ANSWER_SECONDS:.0f} s") from None
        except OSError:
            answer = ""
        if not answer:
            said = self._process.stderr.read().strip().splitlines()
            status = self._process.wait()
            if status == _NO_FOLDER:
                raise AgentError(self.host, f"has no folder '{os.getcwd()}' like this host", f"ls -d {os.getcwd()}")
            if status == _NO_PYTHON:
                raise AgentError(self.host, f"has no Python at '{sys.executable}'", f"ls -l {sys.executable}")
            raise AgentError(self.host, said[-1] if said else "the connection ended")
        try:
            return json.loads(answer)
        except ValueError:
            said_instead = f"its shell prints {answer.strip()[:60]!r} where an answer should be"
            raise AgentError(self.host, said_instead, "true") from None

    def _read(self) -> None:
        assert self._process.stdout
        for line in self._process.stdout:
            self._answers.put(line)
        self._answers.put("")

    def __enter__(self) -> Agent:
        return self

    def __exit__(self, *exception: object) -> None:
        with suppress(OSError):
            assert self._process.stdin
            self._process.stdin.close()  # ends the agent
        try:
            self._process.wait(5)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


def rank_variables() -> dict[str, str]:
    """The variables about the network that deepspeed 0.19.8 passes to ranks on other hosts."""
    found = {name: value for name, value in os.environ.items() if name.startswith("NCCL")}
    for folder in (Path.home(), Path.cwd()):
        with suppress(OSError):
            found |= read_rank_environment(folder / ".deepspeed_env")
    return found
