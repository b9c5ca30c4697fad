"""The hosts that the tests of launchers and faults run on are what those tests take them for."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import psutil
import pytest

from tests.cluster.hosts import Hosts, missing, wait_until


def test_hosts_have_names_addresses_and_memory_of_their_own(hosts: Hosts) -> None:
    for name, other in zip(hosts.names, hosts.names[1:] + hosts.names[:1], strict=True):
        assert hosts.run(name, ["hostname", "-I"]).stdout.split() == [hosts.address(name)]
        assert hosts.run(name, ["ssh", other, "hostname"]).stdout == f"{other}\n"
    hosts.run("node1", ["touch", "/dev/shm/mine"])
    assert hosts.run("node2", ["ls", "/dev/shm"]).stdout == ""


def test_a_cut_host_is_silent_until_it_is_restored(hosts: Hosts) -> None:
    hosts.cut("node2")
    assert hosts.run("node1", ["ssh", "-o", "ConnectTimeout=1", "node2", "hostname"]).returncode == 255
    assert hosts.run("node1", ["ssh", "node3", "hostname"]).returncode == 0
    assert hosts.run("node2", ["hostname"]).returncode == 0
    hosts.restore("node2")
    assert hosts.run("node1", ["ssh", "node2", "hostname"]).returncode == 0


def test_a_killed_host_loses_its_processes_and_comes_up_again(hosts: Hosts) -> None:
    job = hosts.start("node1", ["ssh", "node2", "echo up; sleep 100"])
    job.wait_for("up", 60)
    (process,) = [process for process in hosts.processes("node2") if process.command == "sleep 100"]
    hosts.kill("node2")
    assert not psutil.pid_exists(process.pid)
    assert job.wait(60) == 255
    hosts.boot("node2")
    assert hosts.run("node1", ["ssh", "node2", "hostname"]).stdout == "node2\n"


def test_clearing_ends_what_a_test_left(hosts: Hosts) -> None:
    hosts.run("node3", ["bash", "-c", "setsid sleep 100 & disown"])
    wait_until(lambda: [process.command for process in hosts.processes("node3")] == ["sleep 100"])
    hosts.cut("node1")
    hosts.kill("node2")
    hosts.clear()
    assert hosts.processes("node3") == []
    assert hosts.run("node1", ["ssh", "node2", "hostname"]).returncode == 0


@pytest.mark.skipif(missing() is not None, reason=f"hosts: {missing()}")
def test_nothing_is_left_when_the_test_process_is_killed(tmp_path: Path) -> None:
    before = state()
    script = f"""
        import os, signal
        from pathlib import Path
        from tests.cluster.hosts import Hosts
        with Hosts(2, Path({str(tmp_path)!r})) as hosts:
            hosts.start("node2", ["sleep", "1000.5"])
            hosts.start("node1", ["ssh", "node2", "echo up; sleep 1000.5"]).wait_for("up", 60)
            os.kill(os.getpid(), signal.SIGKILL)
    """
    program = [sys.executable, "-c", textwrap.dedent(script)]
    assert subprocess.run(program, env=os.environ | {"PYTHONPATH": "."}).returncode == -9
    wait_until(lambda: not any(belongs_to(pid, tmp_path) for pid in psutil.pids()))
    wait_until(lambda: state() == before)
    assert str(tmp_path) not in Path("/proc/self/mounts").read_text()


def belongs_to(pid: int, folder: Path) -> bool:
    """Whether a process is one of hosts with this folder."""
    try:
        command = " ".join(psutil.Process(pid).cmdline())
    except psutil.NoSuchProcess:
        return False
    return str(folder) in command or "sleep 1000.5" in command


def state() -> tuple[str, str]:
    """Links and named network namespaces of this machine."""
    links, spaces = (
        subprocess.run(["ip", "-brief", *words], capture_output=True, text=True, check=True).stdout
        for words in (["link"], ["netns"])
    )
    return links, spaces
