"""Faults of a run over hosts, and what `srde-ds doctor` sees of hosts. More faults: benchmarks/faults.py."""

from __future__ import annotations

from pathlib import Path
from signal import Signals

import pytest

from srde_ds.cluster.leftovers import VARIABLE
from srde_ds.liveness.heartbeat import read_heartbeat
from tests.cluster.hosts import Hosts, missing
from tests.cluster.supervised import SupervisedRun
from tests.cluster.training import ENVIRONMENT
from tests.distributed.training_helpers import Inputs

pytestmark = pytest.mark.skipif(missing("pdsh") is not None, reason=f"hosts: {missing('pdsh')}")


def test_a_supervised_run_goes_on_after_each_fault(hosts: Hosts, inputs: Inputs, tmp_path: Path) -> None:
    slots = {"node1": 1, "node2": 1}
    flags = ["--max_restarts", "2", "--min_nodes", "1", "--host_timeout", "10"]
    run = SupervisedRun(hosts, inputs, tmp_path, slots, *flags, collective_timeout=20)
    run.wait_for_steps()
    cut = run.see("cut", lambda: hosts.cut("node2"), then=lambda: hosts.restore("node2"))
    dead = run.see("host", lambda: run.kill_host("node2"))
    ended, status = run.see_end("signal", lambda: run.job.send_signal(Signals.SIGTERM))

    assert "preflight: warning node2: no GPU found" in run.output()  # it looked at all hosts
    assert "no sign of life from rank 1 (host node2" in cut.message
    assert "rank 1 (host node2, process " in dead.message and "ended without a word" in dead.message
    assert "step " in dead.message and "checkpoint" in dead.message and "continuing without node2" in run.output()
    assert cut.left == dead.left == []
    assert cut.resumed_at and dead.resumed_at and 0 < cut.resumed_at < dead.resumed_at
    assert status == 128 + Signals.SIGTERM and ended.left == []
    heartbeat = read_heartbeat(run.run)
    assert heartbeat["state"] == "stopped"  # the rank saved and ended itself; a launcher that kills it leaves "running"
    assert f"stopped by SIGTERM; the latest checkpoint is checkpoint-{heartbeat['step']}" in ended.message


def test_what_an_attempt_leaves_on_another_host_is_ended(hosts: Hosts) -> None:
    ours = hosts.start("node2", ["sleep", "300"], env={VARIABLE: "ours"})
    theirs = hosts.start("node2", ["sleep", "301"], env={VARIABLE: "theirs"})
    started = {ours.pid, theirs.pid}
    hosts.kill("node3")
    arguments = "[Host(name, 1) for name in ('node1', 'node2', 'node3')], 'ours'"
    program = "from srde_ds.cluster.leftovers import end_on_hosts; from srde_ds.cluster.hosts import Host; "
    done = hosts.run("node1", ["python", "-c", f"{program}print(end_on_hosts({arguments}))"])
    assert done.returncode == 0 and done.stdout.startswith("{'node2': [") and "," not in done.stdout, done.stdout
    assert ours.wait(60) == -Signals.SIGKILL
    assert {process.pid for process in hosts.processes("node2")} & started == {theirs.pid}


def test_a_launcher_looks_at_all_hosts_first(hosts: Hosts, inputs: Inputs, tmp_path: Path) -> None:
    hosts.kill("node3")
    hostfile = tmp_path / "hosts"
    hostfile.write_text("node1 slots=1\nnode2 slots=1\nnode3 slots=1\n")
    (hosts.home("node1") / ".deepspeed_env").write_text("GLOO_SOCKET_IFNAME=eth7\n")
    assert hosts.run("node2", ["mount", "-t", "tmpfs", "tmpfs", str(tmp_path)]).returncode == 0
    options = ["--model_name", inputs.base, "--max_length", "96", "--output_dir", str(tmp_path / "run")]
    done = hosts.run("node1", ["cluster/ssh/train.sh", str(hostfile), *options], env=ENVIRONMENT, timeout=400)
    hosts.kill("node2")
    hosts.boot("node2")
    assert done.returncode == 1
    for line in (
        "ok      the same versions on 2 hosts",
        "ok      the same base on 2 hosts",
        "fatal   node3: ssh: connect to host node3 port 22",
        "fatal   node1: no interface eth7 (GLOO_SOCKET_IFNAME)",
        f"fatal   '{tmp_path}' is not shared: node2 cannot see what node1 writes there",
        "ok      clocks agree",
        "ok      all pairs of 2 hosts can connect on port 29500, and on one that the system chooses",
    ):
        assert line in done.stdout, done.stdout
    *_, last = done.stdout.splitlines()
    assert last.startswith("node1: 4 to repair before training: node3: ssh: connect to host"), done.stdout
    assert not (tmp_path / "run").exists()
