"""Finds out before a run what would end it later."""

from __future__ import annotations

import json
import os
import re
import secrets
import shlex
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from queue import Empty, Queue
from typing import Any, Literal

from packaging.requirements import Requirement

from srde_ds.cluster.host_agent import facts, gpus
from srde_ds.cluster.hosts import Host
from srde_ds.config import Config
from srde_ds.errors import SRDEError

Level = Literal["ok", "warning", "fatal"]
GIB = 2**30
# Of a GPU's memory; the rest is the driver's, NCCL's and fragmentation.
USABLE_MEMORY = 0.9
CLOCK_SECONDS = 2.0
ANSWER_SECONDS = 90.0
_AGENT = "srde_ds.cluster.host_agent"
_NO_FOLDER, _NO_PYTHON = 91, 92  # exit statuses of the command that starts it
SSH = ("ssh", "-o", "BatchMode=yes", "-o", "ConnectTimeout=10")


@dataclass(frozen=True)
class Finding:
    """`remedy` is empty if nothing is wrong, or if the text includes it."""

    level: Level
    text: str
    remedy: str = ""

    def __str__(self) -> str:
        return f"{self.level:<8}{self.text}" + (f"\n        -> {self.remedy}" if self.remedy else "")


def check(
    config: Config, hosts: Sequence[Host], port: int, *, processes: int | None = None, nodes: int = 1
) -> Iterator[Finding]:
    """All checks.

    Args:
        hosts: of a hostfile; without them this host alone is looked at.
        port: where the ranks meet.
        processes: on this host, if there is no hostfile (default: one a GPU).
        nodes: hosts with as many, if there is no hostfile.
    """
    here = hosts[0].slots if hosts else processes or max(1, len(gpus()))
    total = sum(host.slots for host in hosts) or here * nodes
    yield from check_here(config, total, processes_here=here)
    if hosts:
        yield from check_hosts(config, hosts, port, rank_variables())


def check_here(config: Config, processes: int, *, processes_here: int = 1) -> Iterator[Finding]:
    """Checks that take seconds on this host: packages, GPUs, base, memory, disk.

    Args:
        processes: of the whole run.
        processes_here: on this host.
    """
    yield from check_packages()
    found = facts(None, config.training.output_dir)
    yield check_gpus(found["gpus"], processes_here)
    yield from check_locks(Path(os.environ.get("TORCH_EXTENSIONS_DIR", Path.home() / ".cache/torch_extensions")))
    if not found["writable"]:
        yield Finding("fatal", f"output_dir={config.training.output_dir} is not writable", "choose another one")
    if config.model.model_name is None:
        yield Finding("warning", "no --model_name: memory and disk were not looked at", "give the options of the run")
        return
    memory = min((gpu["memory_gib"] for gpu in found["gpus"]), default=0.0)
    yield from check_sizes(config, processes, memory * GIB, found["free_bytes"])


def check_packages() -> Iterator[Finding]:
    """Whether the installed versions are those that this package needs."""
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
        yield Finding("ok", "packages have the versions that are needed")


def check_gpus(gpus: Sequence[dict[str, Any]], processes: int, host: str = "this host") -> Finding:
    """Whether the host has a GPU for each process; a warning where it has none at all."""
    if not gpus:
        return Finding(
            "warning", f"{host}: no GPU found (nvidia-smi)", "training runs on CPUs over gloo; else check the driver"
        )
    names = sorted({f"{gpu['name']}, driver {gpu['driver']}" for gpu in gpus})
    if len(gpus) < processes:
        return Finding("fatal", f"{host}: {len(gpus)} GPUs for {processes} processes", "start one process a GPU")
    return Finding("ok", f"{host}: {len(gpus)} x {' and '.join(names)}")


def check_locks(folder: Path) -> Iterator[Finding]:
    """A killed build of an extension leaves a lock, for which the next build waits for ever, without a word."""
    for lock in folder.glob("**/lock"):
        yield Finding("warning", f"'{lock}' may be left from a killed build", "remove it if nothing compiles right now")


def check_sizes(config: Config, processes: int, gpu_bytes: float, free_bytes: int) -> Iterator[Finding]:
    """Whether memory and disk suffice. `gpu_bytes` is 0 without a GPU."""
    from srde_ds.model.base_shape import base_shape
    from srde_ds.planner.memory import memory
    from srde_ds.planner.trainables import trainable_values

    try:
        shape = base_shape(config)
    except SRDEError as error:
        yield Finding("fatal", str(error))
        return
    needed = memory(config, shape, processes).total
    if gpu_bytes and needed > USABLE_MEMORY * gpu_bytes:
        yield Finding(
            "fatal",
            f"memory: {needed / GIB:.1f} GiB a process, the GPU has {gpu_bytes / GIB:.1f}",
            "smaller --batch_size or --max_length, --gradient_checkpointing, or more processes (srde-ds plan)",
        )
    else:
        yield Finding("ok", f"memory: {needed / GIB:.2f} GiB a process planned")
    per_value = 8 if config.optimizer.use_muon else 12
    checkpoint = per_value * sum(trainable_values(config.adapter, shape).values())
    room = checkpoint * (config.training.save_total_limit + 1)
    text = f"disk: {room / GIB:.2f} GiB for {config.training.save_total_limit} checkpoints and one being written"
    if room > free_bytes:
        remedy = "free space, another --output_dir, or a smaller --save_total_limit"
        yield Finding("fatal", f"{text}; {free_bytes / GIB:.2f} GiB are free", remedy)
    else:
        yield Finding("ok", f"{text}; {free_bytes / GIB:.1f} GiB are free")


def check_hosts(config: Config, hosts: Sequence[Host], port: int, variables: dict[str, str]) -> Iterator[Finding]:
    """Whether the hosts can run together.

    Args:
        port: the rendezvous port.
        variables: that ranks get (`.deepspeed_env`).
    """
    with ExitStack() as stack:
        agents: dict[str, Agent] = {}
        for host in hosts:
            try:
                agents[host.name] = stack.enter_context(Agent(host.name))
                agents[host.name].ask("clock")
            except AgentError as error:
                yield Finding("fatal", f"{host.name}: {error}", f"try: {shlex.join([*SSH, host.name, error.test])}")
                agents.pop(host.name, None)
        found = {
            name: agent.ask("facts", base=config.model.model_name, output_dir=config.training.output_dir)
            for name, agent in agents.items()
        }
        yield from compare(found)
        for host in hosts:
            if host.name in found:
                yield check_gpus(found[host.name]["gpus"], host.slots, host.name)
        yield from check_interfaces(found, variables)
        yield from _check_clocks(agents)
        yield from _check_shared(agents, Path(config.training.output_dir).absolute())
        yield from _check_ports(agents, port)


def compare(found: dict[str, dict[str, Any]]) -> Iterator[Finding]:
    """Packages and base files of all hosts against the first one's."""
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
    """Whether the network interface that the ranks will use exists. A wrong one makes one side fail, the other hang."""
    for library in ("GLOO", "NCCL"):
        name = variables.get(f"{library}_SOCKET_IFNAME", "")
        plain = re.fullmatch(r"[\w.]+", name) is not None  # NCCL also takes prefixes and exclusions
        for host, fact in found.items():
            if plain and not any(each.startswith(name) for each in fact["interfaces"]):
                remedy = f"it has {', '.join(fact['interfaces'])}: srde-ds hosts --interface NAME"
                yield Finding("fatal", f"{host}: no interface {name} ({library}_SOCKET_IFNAME)", remedy)
            elif library == "GLOO" and not name and not fact["gpus"] and fact["own_address"].startswith("127."):
                text = f"{host}: its name stands for {fact['own_address']}, which gloo would offer to the other hosts"
                yield Finding("fatal", text, "name the interface: srde-ds hosts --interface eth0 (.deepspeed_env)")
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
        yield Finding("warning", f"clocks differ: {text}", "run an NTP client: logs and file times mislead")
    else:
        yield Finding("ok", f"clocks agree within {max(worst, 0.1):.1f} s")


def _check_shared(agents: dict[str, Agent], output_dir: Path) -> Iterator[Finding]:
    """Every host sees a file that the first one writes."""
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
        text = f"'{token.parent}' is not shared: what {first} writes there is not seen on {', '.join(blind)}"
        yield Finding("fatal", text, "an --output_dir on storage of all hosts")
    else:
        yield Finding("ok", f"'{token.parent}' is shared by all hosts")


def _check_ports(agents: dict[str, Agent], port: int) -> Iterator[Finding]:
    failures = 0
    for name, agent in agents.items():
        if reason := agent.ask("listen", port=port):
            failures += 1
            yield Finding("fatal", f"{name}: port {port}: {reason}", "end what uses it, or another --master_port")
    for one in agents:
        for other in agents:
            if one != other and (reason := agents[one].ask("connect", host=Host(other, 1).address, port=port)):
                failures += 1
                yield Finding("fatal", f"{one} cannot reach {other}:{port}: {reason}", "firewall, routes, /etc/hosts")
    if len(agents) > 1 and not failures:
        yield Finding("ok", f"all pairs of {len(agents)} hosts can connect on port {port}")


class AgentError(Exception):
    """A host did not answer.

    Attributes:
        test: what shows the reason when it is run there.
    """

    def __init__(self, reason: str, test: str = "true") -> None:
        super().__init__(reason)
        self.test = test


class Agent:
    """`host_agent.py` on a host, over ssh, in this folder and with this Python."""

    def __init__(self, host: str) -> None:
        self.host = host
        folder, python = shlex.quote(os.getcwd()), shlex.quote(sys.executable)
        remote = f"cd {folder} || exit {_NO_FOLDER}; [ -x {python} ] || exit {_NO_PYTHON}; {python} -m {_AGENT}"
        pipe = subprocess.PIPE
        self._process = subprocess.Popen([*SSH, host, remote], stdin=pipe, stdout=pipe, stderr=pipe, text=True)
        self._answers: Queue[str] = Queue()
        threading.Thread(target=self._read, daemon=True).start()

    def ask(self, question: str, **arguments: Any) -> Any:
        """Raises AgentError with ssh's reason, or after ANSWER_SECONDS."""
        assert self._process.stdin and self._process.stderr
        try:
            self._process.stdin.write(json.dumps([question, arguments]) + "\n")
            self._process.stdin.flush()
            answer = self._answers.get(timeout=ANSWER_SECONDS)
        except Empty:
            raise AgentError(f"no answer within {ANSWER_SECONDS:.0f} s") from None
        except OSError:
            answer = ""
        if not answer:
            said = self._process.stderr.read().strip().splitlines()
            status = self._process.wait()
            if status == _NO_FOLDER:
                raise AgentError(f"has no folder '{os.getcwd()}', in which this runs", f"ls -d {os.getcwd()}")
            if status == _NO_PYTHON:
                raise AgentError(f"has no '{sys.executable}', this Python", f"ls -l {sys.executable}")
            raise AgentError(said[-1] if said else "the connection ended")
        return json.loads(answer)

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
            self._process.stdin.close()  # the agent takes it as the end
        try:
            self._process.wait(5)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


def rank_variables() -> dict[str, str]:
    """What deepspeed 0.19.8 gives to ranks on other hosts, as far as it concerns the network."""
    found = {name: value for name, value in os.environ.items() if name.startswith("NCCL")}
    for folder in (Path.home(), Path.cwd()):
        with suppress(OSError):
            for line in (folder / ".deepspeed_env").read_text().splitlines():
                name, _, value = line.partition("=")
                found[name] = value
    return found
