"""Ends leftover processes of an attempt before the next one begins, here and on the other hosts.

On this host all processes of an attempt are in one session. On other hosts they are found by a variable in their
environment, since a launcher may leave processes behind: a frozen rank outlives the run and its launcher (seen with
deepspeed 0.19.8).
"""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

from srde_ds.cluster.doctor import SSH
from srde_ds.cluster.hosts import Host

# deepspeed 0.19.8 passes variables whose names begin like this to the ranks on other hosts.
VARIABLE = "PYTHON_SRDE_DS_SUPERVISOR"
_HOST_SECONDS = 30.0
# The shell and its programs do not have the variable, since ssh does not pass it on.
_SCRIPT = """
processes=
for environment in $(grep -alsF '{assignment}' /proc/[0-9]*/environ); do
    process=${{environment#/proc/}}; process=${{process%/environ}}
    kill -KILL "$process" && processes="$processes $process"
done
echo $processes
for process in $processes; do
    # Its memory, and that on a GPU, is free when it is gone or a zombie.
    for _ in $(seq 100); do
        grep -qs '^State:.[^ZX]' "/proc/$process/status" || break
        sleep 0.1
    done
done
"""


def end_on_hosts(hosts: Sequence[Host], value: str) -> dict[str, list[int]]:
    """Send SIGKILL to the processes on these hosts that were started with `VARIABLE=value`.

    Returns:
        Their process ids, by host. Hosts without such processes, or that do not answer over ssh soon, are left out.
    """
    command = shlex.join(["sh", "-c", _SCRIPT.format(assignment=f"{VARIABLE}={value}")])

    def end(host: Host) -> list[int]:
        with suppress(subprocess.TimeoutExpired):
            done = subprocess.run([*SSH, host.name, command], capture_output=True, text=True, timeout=_HOST_SECONDS)
            # A host's profile may also print something.
            return [int(word) for word in done.stdout.split() if word.isdecimal()]
        return []

    with ThreadPoolExecutor(min(32, len(hosts))) as pool:
        found = zip(hosts, pool.map(end, hosts), strict=True)
        return {host.name: numbers for host, numbers in found if numbers}


def end_session(leader: int) -> None:
    """Send SIGTERM, and later SIGKILL, to the processes of a session, which may have several process groups."""
    for number, seconds in ((signal.SIGTERM, 10.0), (signal.SIGKILL, 10.0)):
        members = _session(leader)
        for pid in members:
            with suppress(ProcessLookupError):
                os.kill(pid, number)
        deadline = time.monotonic() + seconds
        while members and time.monotonic() < deadline:
            time.sleep(0.1)
            members = _session(leader)
        if not members:
            return


def _session(leader: int) -> list[int]:
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            with suppress(OSError):
                state, _, _, session, *_ = (entry / "stat").read_text().rpartition(")")[2].split()
                if int(session) == leader and state not in "ZX":
                    found.append(int(entry.name))
    return found
