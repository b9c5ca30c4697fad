"""Ends a process of a run when its launcher ends: nobody else would, and its GPU would stay occupied.

Seen with deepspeed 0.19.8: after SIGKILL of a host's launcher its ranks continue to train, and the runner waits
forever.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
from dataclasses import dataclass
from pathlib import Path

POLL_SECONDS = 1.0
# Time for a checkpoint; after that the process is killed.
SAVE_SECONDS = 75.0

# Found in the command line of a process that starts ranks and waits for them.
_LAUNCHERS = ("deepspeed", "torchrun", "torch.distributed", "mpirun", "mpiexec", "prterun", "orted", "prted", "srde-ds")
_SHELLS = ("sh", "bash", "dash")


@dataclass(frozen=True)
class Launcher:
    """A process, identified by its id and start time, since ids are reused."""

    pid: int
    started: str
    command: str

    def lives(self) -> bool:
        """Whether the process is still running."""
        return _read(self.pid) == self

    @property
    def is_launcher(self) -> bool:
        """Whether it starts ranks and waits for them."""
        # An sshd without a terminal is the other end of pdsh or ssh; one with a terminal may end before the run does.
        remote = "sshd" in self.command and "@notty" in self.command
        return remote or (not self.is_shell and any(name in self.command for name in _LAUNCHERS))

    @property
    def is_shell(self) -> bool:
        """Whether it is a shell."""
        return Path(self.command.split(" ")[0]).name in _SHELLS


def launchers() -> list[Launcher]:
    """The launchers among the parents of this process, nearest first. Shells between them are skipped."""
    found, pid = [], os.getppid()
    while pid > 1:
        process = _read(pid)
        if process is None or not (process.is_launcher or process.is_shell):
            break
        if process.is_launcher:
            found.append(process)
        pid = _parent(pid)
    return found


def launched_by_deepspeed() -> tuple[list[str], Path] | None:
    """The deepspeed command that started this process, and its folder; None for another launcher or host."""
    pid = os.getppid()
    while pid > 1:
        try:
            words = Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace").rstrip("\0").split("\0")
            folder = Path(os.readlink(f"/proc/{pid}/cwd"))
        except OSError:
            return None
        for index, word in enumerate(words[:3]):
            if Path(word).name == "deepspeed" or word == "deepspeed.launcher.runner":
                return words[index + 1 :], folder
        pid = _parent(pid)
    return None


class LauncherWatch:
    """Watches the launchers in a thread. Once one is gone, this process gets SIGTERM, and SIGKILL if it does not end.

    SIGTERM lets the run save and stop on all ranks if possible.

    Attributes:
        gone: a sentence about the launcher that ended first; None while all are running.
    """

    def __init__(self) -> None:
        self.gone: str | None = None
        self._watched = launchers()
        if self._watched:
            threading.Thread(target=self._watch, name="launchers", daemon=True).start()

    def _watch(self) -> None:
        pause = threading.Event()
        while all(launcher.lives() for launcher in self._watched):
            pause.wait(POLL_SECONDS)
        gone = next(launcher for launcher in self._watched if not launcher.lives())
        self.gone = f"its launcher (process {gone.pid}: {gone.command[:60]}) is gone"
        with contextlib.suppress(OSError):  # the pipe may also be gone
            print(f"srde-ds: {self.gone}: saving and stopping.", file=sys.stderr, flush=True)
        os.kill(os.getpid(), signal.SIGTERM)
        pause.wait(SAVE_SECONDS)
        os.kill(os.getpid(), signal.SIGKILL)


def start_time(pid: int) -> str | None:
    """When a process started, in ticks since boot; None if there is no such process."""
    process = _read(pid)
    return None if process is None else process.started


def _read(pid: int) -> Launcher | None:
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
        command = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
    except OSError:
        return None
    state, *fields = stat.rpartition(")")[2].split()
    return None if state in "ZX" else Launcher(pid, fields[18], command)


def _parent(pid: int) -> int:
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    except OSError:
        return 0
