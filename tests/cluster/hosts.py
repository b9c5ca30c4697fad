"""Several hosts on one machine, made from Linux namespaces: what the tests of launchers and faults run on.

    with Hosts(3, folder) as hosts:                       # about a second; fixtures: conftest.py
        done = hosts.run("node1", ["ssh", "node2", "hostname"], timeout=10)
        assert done.returncode == 0 and done.stdout == "node2\\n"
        job = hosts.start("node1", ["deepspeed", "--hostfile", ...], env={...})
        hosts.cut("node2")                                # the cable is out: packets get lost, nobody is told
        hosts.restore("node2")
        hosts.kill("node3")                               # all its processes die at once, its connections close
        hosts.boot("node3")
        for process in hosts.processes("node2"):          # sshd left out, zombies too
            os.kill(process.pid, signal.SIGKILL)          # process ids are those of the machine that runs the test
        status = job.wait(60); print(job.output())
        hosts.clear()                                     # ends all processes, restores all links, boots what is down

Hosts are called node1, node2, ... and have the addresses 10.77.0.1, .2, ... on `eth0`. Each has network, process ids,
host name, IPC and mounts of its own, an sshd, /etc/hosts, tmpfs on /dev/shm and /run, and `$HOME` in an empty folder of
its own (so `~/.deepspeed_env` is that of the test). All other files are shared with the machine, as on a cluster with a
network file system; `hosts.run(host, ["mount", "-t", "tmpfs", "-o", "size=1M", "tmpfs", path])` gives one host a small
disk of its own until it is killed. Nothing exists outside of the namespaces, and the kernel ends them with the process
that made them.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from signal import Signals

import psutil

SUBNET = "10.77.0"
PROGRAMS = ("ip", "nsenter", "setpriv", "ssh", "ssh-keygen", "sshd", "unshare")
# Dies with the thread that started it, whatever ends that one.
DIES_WITH_PARENT = ("setpriv", "--pdeathsig", "KILL")
OWN = ("--net", "--pid", "--uts", "--ipc", "--mount")
# The interpreter's folder first, as in an activated environment.
PATH = f"{Path(sys.executable).parent}:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"

# Runs as the first process of a host. $1: its name, $2: the folder with the files of all hosts.
BOOT = """
set -e
hostname "$1"
mount --bind "$2/hosts" /etc/hosts
mount --bind "$2/ssh_config" /etc/ssh/ssh_config
mount -t tmpfs tmpfs /dev/shm
mount -t tmpfs tmpfs /run
mkdir -p /run/sshd
while [ ! -e /sys/class/net/eth0 ]; do sleep 0.01; done
exec "$(command -v sshd)" -D -e -f "$2/sshd_config"
"""


def missing(*programs: str) -> str | None:
    """Why hosts cannot be made here, if so. `programs`: more that the test needs."""
    if os.geteuid() != 0:
        return "not root"
    absent = [program for program in (*PROGRAMS, *programs) if shutil.which(program, path=PATH) is None]
    if absent:
        return f"not installed: {', '.join(absent)}"
    tried = subprocess.run(["unshare", *OWN, "--fork", "true"], capture_output=True, text=True)
    return f"no namespaces: {tried.stderr.strip()}" if tried.returncode else None


@dataclass(frozen=True)
class Process:
    """A process of a host; `pid` is valid on the machine that runs the test."""

    pid: int
    command: str


class Job:
    """A command on a host that goes on beside the test."""

    def __init__(self, command: Sequence[str], log: Path) -> None:
        self.log = log
        with log.open("w") as output:
            self._nsenter = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=output, stderr=output)

    @property
    def pid(self) -> int:
        """Of the command itself, on the machine that runs the test."""
        nsenter = psutil.Process(self._nsenter.pid)
        wait_until(lambda: bool(nsenter.children()))
        return nsenter.children()[0].pid

    def send_signal(self, signal: Signals) -> None:
        os.kill(self.pid, signal)

    def output(self) -> str:
        """Standard output and error so far."""
        return self.log.read_text(errors="replace")

    def poll(self) -> int | None:
        """The exit status, negative for a signal, or None."""
        return self._nsenter.poll()

    def kill(self) -> None:
        """End the command, not what it started."""
        self._nsenter.kill()
        self._nsenter.wait()

    def wait(self, timeout: float) -> int:
        """The exit status, negative for a signal.

        Raises:
            AssertionError: it did not end in time; with its output.
        """
        try:
            return self._nsenter.wait(timeout)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"still running after {timeout} s:\n{self.output()}") from None

    def wait_for(self, text: str, timeout: float) -> None:
        """Until the output has `text`.

        Raises:
            AssertionError: it does not come in time, or the command ends without; with its output.
        """
        deadline = time.monotonic() + timeout
        while text not in self.output():
            ended = self.poll() is not None
            assert (not ended and time.monotonic() < deadline) or text in self.output(), (
                f"no '{text}' {'until the end' if ended else f'in {timeout} s'}:\n{self.output()}"
            )
            time.sleep(0.05)


class Hosts:
    """`count` hosts on one switch; see the module.

    Args:
        folder: an empty one, for keys, configuration, home folders and logs.
    """

    def __init__(self, count: int, folder: Path) -> None:
        self.names = [f"node{number}" for number in range(1, count + 1)]
        self.folder = folder
        self._switch: subprocess.Popen[bytes]
        self._first: dict[str, psutil.Process] = {}  # the sshd of each host, its process 1
        self._unshare: dict[str, subprocess.Popen[bytes]] = {}
        self._jobs = 0

    def __enter__(self) -> Hosts:
        self._write_files()
        self._switch = subprocess.Popen([*DIES_WITH_PARENT, "unshare", "--net", "sleep", "infinity"])
        try:
            wait_until(lambda: _namespace(self._switch.pid, "net") != _namespace(os.getpid(), "net"))
            self._in_switch("ip link add bridge type bridge && ip link set bridge up")
            for name in self.names:
                self._unshare[name] = self._begin(name)
            for name in self.names:
                self._connect(name)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *exception: object) -> None:
        for name in list(self._unshare):
            self.kill(name)
        self._switch.kill()
        self._switch.wait()

    def address(self, host: str) -> str:
        return f"{SUBNET}.{self.names.index(host) + 1}"

    def home(self, host: str) -> Path:
        """The host's $HOME, for what is started there; over ssh it is that of the machine."""
        return self.folder / f"home-{host}"

    def run(
        self, host: str, command: Sequence[str], *, env: Mapping[str, str] | None = None, timeout: float = 90
    ) -> subprocess.CompletedProcess[str]:
        """Run a command on a host to its end, in the current folder; standard error is part of `stdout`.

        Args:
            env: besides PATH, HOME and LANG, which are all that it gets of the environment.

        Raises:
            AssertionError: it did not end in time; with its output.
        """
        job = self.start(host, command, env=env)
        try:
            status = job.wait(timeout)
        except AssertionError:
            job.kill()
            raise
        return subprocess.CompletedProcess(list(command), status, job.output())

    def start(self, host: str, command: Sequence[str], *, env: Mapping[str, str] | None = None) -> Job:
        """Start a command on a host, in the current folder; arguments as for `run`. `clear` ends it at the latest."""
        self._jobs += 1
        variables = {"PATH": PATH, "HOME": str(self.home(host)), "LANG": "C.UTF-8"} | dict(env or {})
        assignments = [f"{name}={value}" for name, value in variables.items()]
        target = self._first[host].pid
        enter = ["nsenter", "--target", str(target), *OWN, f"--wd={os.getcwd()}", "--"]
        full = [*DIES_WITH_PARENT, *enter, *DIES_WITH_PARENT, "env", "-i", *assignments, *command]
        return Job(full, self.folder / f"job-{self._jobs}-{host}.log")

    def cut(self, host: str) -> None:
        """Take the host's link down at the switch: what is sent to or by it is lost without an error."""
        self._in_switch(f"ip link set {host} down")

    def restore(self, host: str) -> None:
        """Undo `cut`."""
        self._in_switch(f"ip link set {host} up")

    def kill(self, host: str) -> None:
        """End all processes of a host at once: the others see its connections closed, then no host at its address."""
        unshare, first = self._unshare.pop(host), self._first.pop(host, None)
        if first is None:  # it did not come up
            unshare.kill()
        else:
            first.kill()  # the kernel ends all processes of the namespace before this one is gone
        unshare.wait()
        self._in_switch(f"ip link delete {host} 2>/dev/null || true")  # else the kernel does so a little later

    def boot(self, host: str) -> None:
        """Bring a killed host up again."""
        self._unshare[host] = self._begin(host)
        self._connect(host)

    def processes(self, host: str) -> list[Process]:
        """What runs on a host, without sshd and without zombies."""
        return [process for process in self._all(host) if not process.command.startswith("sshd: ")]

    def _all(self, host: str) -> list[Process]:
        """Without process 1 and zombies."""
        first, found = self._first[host].pid, []
        for process in psutil.process_iter():
            with suppress(psutil.NoSuchProcess, OSError):  # it ended meanwhile, or is none that we may look at
                ours = _namespace(process.pid, "pid") == _namespace(first, "pid")
                if ours and process.pid != first and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(Process(process.pid, " ".join(process.cmdline())))
        return found

    def clear(self) -> None:
        """Bring every host back to its state after booting, files aside: for the next test."""
        for name in self.names:
            if name in self._unshare:
                while left := self._all(name):
                    for process in left:
                        with suppress(ProcessLookupError):
                            os.kill(process.pid, Signals.SIGKILL)
                self.restore(name)
            else:
                self.boot(name)

    def _write_files(self) -> None:
        for name in self.names:
            self.home(name).mkdir(parents=True)
        for key in ("host_key", "user_key"):
            subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", self.folder / key], check=True)
        shutil.copy(self.folder / "user_key.pub", self.folder / "authorized_keys")
        lines = ["127.0.0.1 localhost", *(f"{self.address(name)} {name}" for name in self.names)]
        (self.folder / "hosts").write_text("\n".join(lines) + "\n")
        (self.folder / "ssh_config").write_text(
            f"IdentityFile {self.folder}/user_key\nIdentitiesOnly yes\nBatchMode yes\nStrictHostKeyChecking no\n"
            "UserKnownHostsFile /dev/null\nLogLevel ERROR\nConnectTimeout 5\n"
        )
        (self.folder / "sshd_config").write_text(
            f"HostKey {self.folder}/host_key\nAuthorizedKeysFile {self.folder}/authorized_keys\n"
            "PermitRootLogin prohibit-password\nStrictModes no\nUsePAM no\nMaxStartups 100\nPidFile none\n"
            "LogLevel ERROR\n"
        )

    def _begin(self, name: str) -> subprocess.Popen[bytes]:
        isolate = ["unshare", *OWN, "--fork", "--kill-child", "--mount-proc"]
        command = [*DIES_WITH_PARENT, *isolate, "bash", "-c", BOOT, "boot", name, str(self.folder)]
        with (self.folder / f"sshd-{name}.log").open("w") as log:
            return subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log)

    def _connect(self, name: str) -> None:
        """Give a new host its link and wait for its sshd."""
        unshare = psutil.Process(self._unshare[name].pid)
        wait_until(lambda: bool(unshare.children()))
        self._first[name] = first = unshare.children()[0]
        hardware = f"02:00:00:00:00:{self.names.index(name) + 1:02x}"  # after booting too: neighbours remember it
        peer = f"peer name eth0 address {hardware} netns {first.pid}"
        self._in_switch(f"ip link add {name} type veth {peer} && ip link set {name} master bridge up")
        configure = f"ip link set lo up; ip address add {self.address(name)}/24 dev eth0; ip link set eth0 up"
        subprocess.run(["nsenter", "--target", str(first.pid), "--net", "sh", "-ec", configure], check=True)
        wait_until(lambda: first.name() == "sshd")
        up = f"exec 3<>/dev/tcp/{self.address(name)}/22"
        wait_until(lambda: self.run(name, ["bash", "-c", up]).returncode == 0)

    def _in_switch(self, script: str) -> None:
        subprocess.run(["nsenter", "--target", str(self._switch.pid), "--net", "sh", "-ec", script], check=True)


def _namespace(pid: int, kind: str) -> str:
    return os.readlink(f"/proc/{pid}/ns/{kind}")


def wait_until(condition: Callable[[], bool], timeout: float = 60) -> None:
    deadline = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < deadline, f"not within {timeout} s"
        time.sleep(0.02)
