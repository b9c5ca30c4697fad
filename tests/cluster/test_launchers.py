"""Training over several hosts with each launcher: to its end, and the same as without one."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from signal import SIGTERM

import pytest

from srde_ds.cli.main import main
from tests.cluster.hosts import Hosts, missing
from tests.cluster.training import ENVIRONMENT, TRAIN, arguments, small_run
from tests.distributed.training_helpers import Inputs, assert_same_training, latest, metrics

LONGEST = 400  # seconds a run may take


@pytest.fixture
def hostfile(hosts: Hosts, tmp_path: Path) -> Path:
    """A path for one; the environment of the ranks is where launchers on node1 look for it."""
    variables = ",".join(f"{name}={value}" for name, value in ENVIRONMENT.items())
    file = str(hosts.home("node1") / ".deepspeed_env")
    assert main(["hosts", "--list", "node1:1", "--variables", variables, "--environment_file", file]) == 0
    return tmp_path / "hosts"


def write(hostfile: Path, names: str) -> None:
    assert main(["hosts", "--list", names, "--output_file", str(hostfile)]) == 0


def train(hosts: Hosts, launcher: Sequence[str], inputs: Inputs, run: Path, *, processes: int) -> str:
    """Start the small run on node1; the output of a run that has come to its end."""
    flags = arguments(small_run(inputs, run, processes=processes))
    done = hosts.run("node1", [*launcher, *flags], timeout=LONGEST)
    assert done.returncode == 0, done.stdout
    assert (run / "completed.json").exists()
    return done.stdout


def assert_same_bits(run: Path, other: Path) -> None:
    assert (run / "srde_weights.safetensors").read_bytes() == (other / "srde_weights.safetensors").read_bytes()


@pytest.mark.skipif(missing("pdsh") is not None, reason=f"{missing('pdsh')}")
@pytest.mark.parametrize("count", [2, 3])
def test_deepspeed_with_pdsh(
    count: int, hosts: Hosts, hostfile: Path, inputs: Inputs, two_processes: Path, tmp_path: Path
) -> None:
    write(hostfile, ",".join(f"{name}:1" for name in hosts.names[:count]))
    launcher = ["deepspeed", "--hostfile", str(hostfile), TRAIN]
    output = train(hosts, launcher, inputs, tmp_path / "run", processes=count)
    assert all(f"node{number}: " in output for number in range(1, count + 1))
    if count == 2:
        assert_same_bits(tmp_path / "run", two_processes)
    else:
        assert_same_training(tmp_path / "run", two_processes, tolerance=1e-4)


def test_torchrun_over_ssh(hosts: Hosts, hostfile: Path, inputs: Inputs, two_processes: Path, tmp_path: Path) -> None:
    write(hostfile, "node1:1,node2:1")
    output = train(hosts, ["cluster/ssh/train.sh", str(hostfile)], inputs, tmp_path / "run", processes=2)
    assert "ok      all pairs of 2 hosts can connect" in output and "node1: fit to train" in output
    assert_same_bits(tmp_path / "run", two_processes)


@pytest.mark.skipif(missing("mpirun") is not None, reason=f"{missing('mpirun')}")
def test_mpirun_on_two_hosts(hosts: Hosts, hostfile: Path, inputs: Inputs, two_processes: Path, tmp_path: Path) -> None:
    write(hostfile, "node1:2,node2:2")
    output = train(hosts, ["cluster/mpi/train.sh", str(hostfile)], inputs, tmp_path / "run", processes=4)
    assert "ok      all pairs of 2 hosts can connect" in output and "node1: fit to train" in output
    assert_same_training(tmp_path / "run", two_processes, tolerance=1e-4)


@pytest.mark.skipif(missing("mpirun") is not None, reason=f"{missing('mpirun')}")
def test_mpirun_saves_when_it_is_stopped(hosts: Hosts, hostfile: Path, inputs: Inputs, tmp_path: Path) -> None:
    run = tmp_path / "run"
    write(hostfile, "node1:2")
    flags = arguments(small_run(inputs, run, processes=2, max_steps=1000, save_steps=1000))
    job = hosts.start("node1", ["cluster/mpi/train.sh", str(hostfile), *flags], env={"PREFLIGHT": "false"})
    job.wait_for("2/1000", LONGEST)
    job.send_signal(SIGTERM)
    assert job.wait(120) == 128 + SIGTERM, job.output()
    assert "Stopped by SIGUSR1" in job.output() and "fit to train" not in job.output()
    assert latest(run) == f"checkpoint-{len(metrics(run))}"
    assert hosts.processes("node1") == []
