"""Runs a training command until the run has finished, despite failures of ranks, launchers and hosts."""

from __future__ import annotations

import ctypes
import logging
import os
import secrets
import shlex
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import IO, Any

from srde_ds.cluster.doctor import SSH, check
from srde_ds.cluster.hosts import Host, format_hostfile, read_hostfile
from srde_ds.cluster.leftovers import VARIABLE, end_on_hosts, end_session
from srde_ds.config import Config
from srde_ds.errors import SRDEError
from srde_ds.liveness.heartbeat import read_heartbeat
from srde_ds.liveness.launch_check import SELECTING, launcher_options
from srde_ds.weights.locate import completed_step, goes_back, read_latest

logger = logging.getLogger(__name__)

BAD_INPUT = 2  # exit status of cli.main
RESTART_SECONDS = 5.0
# Long after a run has ended, its launcher may still wait for a host that is gone.
LINGER_SECONDS = 20.0
_PR_SET_PDEATHSIG = 1


@dataclass(frozen=True)
class Command:
    """A launcher's command line around `launch/train.py` or `srde-ds train`."""

    words: list[str]
    train: int
    """index of the first argument of training"""

    @classmethod
    def parse(cls, words: Sequence[str]) -> Command:
        """Parse a command; raises an SRDEError if it starts no training."""
        for index, word in enumerate(words):
            script = Path(word).name == "train.py"
            if script or (word == "train" and index and Path(words[index - 1]).name == "srde-ds"):
                return cls(list(words), index + 1)
        raise SRDEError(
            f"command '{shlex.join(words)}': starts no training. Give it after --, such as "
            "-- deepspeed --num_gpus 8 launch/train.py --config run.yaml"
        )

    @property
    def train_arguments(self) -> list[str]:
        """The arguments of the training itself."""
        return self.words[self.train :]

    @property
    def hostfile(self) -> str | None:
        """The hostfile of DeepSpeed's runner.

        Raises:
            SRDEError: the command uses a part of it alone, which the supervisor would not know.
        """
        hostfile = self._option("--hostfile", "-H") if self._program == "deepspeed" else None
        for name in SELECTING if hostfile else ():
            if (value := self._option(name)) is not None:
                raise SRDEError(
                    f"{name.lstrip('-')}={value}: with --hostfile, `supervise` counts on all its hosts and slots. "
                    "Leave the option out, and give a hostfile with just the hosts and slots that the run is to use."
                )
        return hostfile

    @property
    def port(self) -> int:
        """The rendezvous port; deepspeed has the same default as torchrun."""
        port = self._option("--master_port", "--master-port") or "29500"
        if not port.isdecimal():
            raise SRDEError(f"master_port={port}: must be a number.")
        return int(port)

    @property
    def processes(self) -> int | None:
        """Number of processes on this host without a hostfile; None: one per GPU."""
        if given := self._option("--num_gpus", "--nproc_per_node", "--nproc-per-node"):
            return int(given) if given.isdecimal() else None
        if included := self._option("--include", "-i"):
            slots = included.partition(":")[2]
            return len(slots.split(",")) if slots else None
        return 1 if self._program.startswith(("srde-ds", "python", "torchrun")) else None

    @property
    def nodes(self) -> int:
        """Number of hosts of torchrun with so many processes."""
        nodes = self._option("--nnodes") or "1"
        return int(nodes) if nodes.isdecimal() else 1

    @property
    def _program(self) -> str:
        return Path(self.words[0]).name

    def _option(self, *names: str) -> str | None:
        given = launcher_options(self.words[: self.train])
        return next((given[name] for name in names if name in given), None)

    def changed(self, *, hostfile: str | None, options: dict[str, str]) -> list[str]:
        """The command with another hostfile and other options of training."""
        launcher, train = self.words[: self.train], self.train_arguments
        if hostfile is not None:
            launcher = _with_value(launcher, ("--hostfile", "-H"), hostfile)
        for name, value in options.items():
            train = [*_without(train, f"--{name}"), f"--{name}", value]
        return launcher + train


def preflight(config: Config, hosts: Sequence[Host], command: Command) -> None:
    """Run `srde-ds doctor` for a command on this host, or on all hosts of a hostfile.

    Raises:
        SRDEError: there is a problem that would end the run.
    """
    findings = list(check(config, hosts, command.port, processes=command.processes, nodes=command.nodes))
    for finding in findings:
        if finding.level != "ok":
            logger.info("preflight: %s", finding)
    fatal = [finding for finding in findings if finding.level == "fatal"]
    if fatal:
        raise SRDEError(f"preflight: {'; '.join(finding.text for finding in fatal)} (--preflight false skips this).")


class HostsMissing(SRDEError):
    """Too few hosts answer; before another attempt they may be back."""


class Supervisor:
    """Starts the command and watches its run folder, repeatedly until `completed.json` names all steps.

    Exit codes of launchers are not trusted, since deepspeed's can be 0 although ranks have died.

    Args:
        config: the run's config, as the command gives it.
        max_restarts: number of attempts after the first, and after each that has left a new checkpoint.
        min_nodes: continue with this many of the hostfile's hosts; None: all are needed.
        host_timeout: seconds to wait for hosts that do not answer.
        preflight: first check for problems that would end the run.
    """

    def __init__(
        self,
        command: Command,
        config: Config,
        *,
        max_restarts: int,
        min_nodes: int | None,
        host_timeout: float,
        preflight: bool,
    ) -> None:
        self.command, self.config, self.preflight = command, config, preflight
        self.max_restarts, self.min_nodes, self.host_timeout = max_restarts, min_nodes, host_timeout
        self._mark = secrets.token_hex(8)
        self.run = Path(config.training.output_dir)
        self.hosts = read_hostfile(command.hostfile) if command.hostfile else []
        self._signal = 0
        self._opened = False
        self._process: subprocess.Popen[bytes] | None = None

    def supervise(self) -> int:
        """The exit status: 0 if the run has finished, 128 + the signal that asked to stop, 2 for bad input, else 1."""
        former = {number: signal.signal(number, self._handle) for number in _STOPPING}
        try:
            restarts = attempt = 0
            while True:
                if self._finished():
                    self._say("the run has already finished")
                    return 0
                before = read_latest(self.run)
                try:
                    status = self._attempt(attempt)
                except HostsMissing as error:
                    if not attempt:
                        raise
                    status, self._last_cause = None, str(error)
                    self._say(self._last_cause)
                if status is not None:
                    return status
                if read_latest(self.run) != before:
                    restarts = 0
                if restarts == self.max_restarts:
                    break
                restarts, attempt = restarts + 1, attempt + 1
                self._pause(RESTART_SECONDS)
                if self._signal:
                    return 128 + self._signal
            self._say(f"given up after {restarts} restarts without a new checkpoint; {self._last_cause}")
            return 1
        finally:
            for number, handler in former.items():
                signal.signal(number, handler)

    def _attempt(self, attempt: int) -> int | None:
        """Run the command once; None if another attempt may help."""
        hosts = self._hosts_left() if self.hosts else []
        if attempt:
            self._end_on_hosts(hosts)  # a host that was cut off may be back
        elif self.preflight:
            preflight(self.config, hosts, self.command)
        if self._signal:  # it came before there was a launcher to pass it on to
            return self._stopped()
        options = self._options(hosts)
        with tempfile.NamedTemporaryFile("w", prefix="srde-ds-hosts-") as file:
            file.write(format_hostfile(hosts))
            file.flush()
            words = self.command.changed(hostfile=file.name if hosts else None, options=options)
            self._say(f"attempt {attempt + 1}: {shlex.join(words)}")
            began = time.time()
            self._earlier_heartbeat = read_heartbeat(self.run)
            status = self._run(words)
        heartbeat = self._heartbeat()
        self._opened = self._opened or bool(heartbeat)
        if self._finished():
            self._say("the run has finished")
            return 0
        if self._signal:
            return self._stopped()
        self._last_cause = f"{self._cause(heartbeat, status)}; {self._position()}"
        self._say(f"attempt {attempt + 1} ended after {time.time() - began:.0f} s: {self._last_cause}")
        if status == BAD_INPUT or heartbeat.get("bad_input"):
            return BAD_INPUT
        return None

    def _stopped(self) -> int:
        self._say(f"stopped by {signal.Signals(self._signal).name}; {self._position()}")
        return 128 + self._signal

    def _finished(self) -> bool:
        """Whether the run has done its steps; it continues if --max_steps has grown since then."""
        done = completed_step(self.run)
        return done is not None and done >= self.config.training.max_steps

    def _run(self, words: Sequence[str]) -> int:
        """The command's exit status, once it has ended with all its processes on the hosts that answer."""
        try:
            # Its own session, so that exactly its processes can be ended.
            self._process = process = subprocess.Popen(
                words,
                start_new_session=True,
                preexec_fn=_end_with_parent,
                stderr=subprocess.PIPE,
                env=os.environ | {VARIABLE: self._mark},
            )
        except OSError as error:
            raise SRDEError(f"command '{words[0]}' cannot be started: {error.strerror}.") from None
        if self._signal:  # it came while the launcher was being started
            process.send_signal(signal.SIGTERM)
        threading.Thread(target=self._pass_on, args=(process.stderr,), daemon=True).start()
        ended_at = None
        while process.poll() is None:
            time.sleep(0.2)
            if ended_at is None and self._heartbeat().get("state") in ("failed", "stopped", "finished"):
                ended_at = time.monotonic()
            if ended_at is not None and time.monotonic() - ended_at > LINGER_SECONDS:
                self._say("the run has ended, but its launcher is still waiting: ending it")
                break
        end_session(process.pid)
        self._end_on_hosts(self.hosts)
        return process.wait()

    def _end_on_hosts(self, hosts: Sequence[Host]) -> None:
        for host, processes in (end_on_hosts(hosts, self._mark) if hosts else {}).items():
            self._say(f"ended leftover processes of an attempt on {host}: {', '.join(map(str, processes))}")

    def _pass_on(self, errors: IO[bytes]) -> None:
        """Print the command's errors, and keep the last error of training, since at the start there is no heartbeat.

        It reads to the end, whatever becomes of its own output: ranks would wait for room in a pipe that nobody reads.
        """
        self._last_error = ""
        for line in errors:
            with suppress(OSError, ValueError):  # a full disk, a reader that has left, a closed file
                sys.stderr.buffer.write(line)
                sys.stderr.flush()
            _, found, text = line.decode(errors="replace").partition("srde-ds: error: ")
            if found:
                self._last_error = text.strip()

    def _options(self, hosts: list[Host]) -> dict[str, str]:
        """Options of training that are added to those of the command."""
        options: dict[str, str] = {}
        # `latest` counts once an attempt has begun to train, or if the command does not ask to go back. Before that it
        # may be the checkpoint that the user wants to leave.
        if (self.run / "latest").exists() and (
            self._opened or not goes_back(self.config.training.resume_from, self.run)
        ):
            options["resume_from"] = "latest"
        if sum(host.slots for host in hosts) != sum(host.slots for host in self.hosts):
            options["gradient_accumulation_steps"] = str(self._accumulation(hosts))
        return options

    def _accumulation(self, hosts: list[Host]) -> int:
        """The number of micro-steps with which fewer processes take the same number of rows per step."""
        training, size = self.config.training, self.config.parallel.expert_parallel_size
        before, now = (sum(host.slots for host in of) for of in (self.hosts, hosts))
        steps, rest = divmod(training.gradient_accumulation_steps * before, now)
        if rest or now % size:
            raise SRDEError(
                f"min_nodes={self.min_nodes}: {now} processes cannot take over from {before}: "
                f"gradient_accumulation_steps x processes must stay {training.gradient_accumulation_steps * before}, "
                f"and expert_parallel_size={size} must divide the processes."
            )
        return steps

    def _hosts_left(self) -> list[Host]:
        """The hosts that answer, after waiting a while for all of them, or until a signal comes.

        Raises:
            HostsMissing: too few hosts answer.
        """
        deadline = time.monotonic() + self.host_timeout
        while True:
            left = answering(self.hosts)
            gone = [host.name for host in self.hosts if host not in left]
            if not gone or self._signal:
                return left
            if time.monotonic() > deadline:
                break
            self._say(f"no answer over ssh from {', '.join(gone)}; waiting")
            self._pause(RESTART_SECONDS)
        if self.min_nodes is None or len(left) < self.min_nodes:
            needed = "all are needed (--min_nodes)" if self.min_nodes is None else f"min_nodes={self.min_nodes}"
            raise HostsMissing(
                f"no answer over ssh from {', '.join(gone)}, and {needed}. Bring them up or leave them out."
            )
        self._say(f"continuing without {', '.join(gone)}")
        return left

    def _heartbeat(self) -> dict[str, Any]:
        """The heartbeat of this attempt; empty until there is one."""
        content = read_heartbeat(self.run)
        return {} if content == self._earlier_heartbeat else content

    def _cause(self, heartbeat: dict[str, Any], status: int) -> str:
        if "reason" in heartbeat:
            return str(heartbeat["reason"]).rstrip(".")
        if self._last_error:
            return self._last_error.rstrip(".")
        if heartbeat:
            return f"its processes ended without a word at step {heartbeat['step']} (exit status {status})"
        return f"the command ended with status {status} before training began; see its output"

    def _position(self) -> str:
        latest = read_latest(self.run)
        return f"the latest checkpoint is {latest}" if latest else "no checkpoint has been saved yet"

    def _handle(self, number: int, frame: FrameType | None) -> None:
        """Ask the run to save and stop by a signal to one rank, which is enough; launchers would not wait for the save.

        deepspeed 0.19.8 ends its ranks one by one, and on several hosts by pkill.
        """
        again, self._signal = bool(self._signal), self._signal or number
        process = self._process
        if process is None or process.poll() is not None:
            return
        heartbeat = self._heartbeat()
        if not again and heartbeat.get("state") == "running" and heartbeat.get("host") == socket.gethostname():
            with suppress(ProcessLookupError):
                os.kill(heartbeat["pid"], signal.SIGTERM)
                return
        process.send_signal(signal.SIGTERM)

    def _pause(self, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline and not self._signal:
            time.sleep(0.1)

    def _say(self, text: str) -> None:
        logger.info("supervisor: %s.", text)

    _last_cause = _last_error = ""
    _earlier_heartbeat: dict[str, Any] = {}


_STOPPING = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


def answering(hosts: Sequence[Host]) -> list[Host]:
    """The hosts that run a command over ssh within half a minute, since a busy host may need that long."""

    def answers(host: Host) -> bool:
        with suppress(subprocess.TimeoutExpired):
            return subprocess.run([*SSH, host.name, "true"], capture_output=True, timeout=30).returncode == 0
        return False

    with ThreadPoolExecutor(min(32, len(hosts))) as pool:
        return [host for host, up in zip(hosts, pool.map(answers, hosts), strict=True) if up]


def _end_with_parent() -> None:
    """Have the new process get SIGTERM when the supervisor dies."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


def _without(words: Sequence[str], name: str) -> list[str]:
    kept, skip = [], False
    for word in words:
        if skip:
            skip = False
        elif word == name:
            skip = True
        elif not word.startswith(f"{name}="):
            kept.append(word)
    return kept


def _with_value(words: Sequence[str], names: Sequence[str], value: str) -> list[str]:
    kept = list(words)
    for name in names:
        kept = _without(kept, name)
    return [kept[0], names[0], value, *kept[1:]]
