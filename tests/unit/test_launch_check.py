"""What a launcher gave against what it was asked for, and variables that no launcher has set."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from srde_ds.cli.main import main
from srde_ds.distributed.processes import adopt_launcher
from srde_ds.errors import SRDEError
from srde_ds.liveness import launch_check
from srde_ds.liveness.launch_check import check_launch
from tests.distributed.harness import free_port

ROOT = Path(__file__).parents[2]
TRAIN = ["launch/train.py", "--max_steps", "3"]
ALONE = {"RANK": "1", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
NOT_TOLD: dict[str, Any] = dict.fromkeys(("RANK", "LOCAL_RANK", "WORLD_SIZE"))


@pytest.mark.parametrize(
    ("words", "processes", "refused"),
    [
        (["--hostfile", "nope"], 1, "hostfile=nope: no such file, so deepspeed has started 1 processes on this host"),
        (["-H", "nope"], 2, "hostfile=nope: no such file"),
        (["--hostfile=nope"], 2, "hostfile=nope: no such file"),
        (["--hostfile", "hosts"], 6, None),
        (["--hostfile", "hosts"], 4, "hostfile=hosts: lists 6 processes, but deepspeed has started 4"),
        (["--hostfile", "hosts", "--num_nodes", "1"], 2, None),
        (["--hostfile", "hosts", "--include", "a"], 2, None),
        (["--num_gpus", "2"], 2, None),
        (["--num_gpus", "2", "--master_port", "1"], 1, "num_gpus=2, but deepspeed has started 1 processes"),
        ([], 8, None),
    ],
)
def test_what_deepspeed_started(tmp_path: Path, words: list[str], processes: int, refused: str | None) -> None:
    (tmp_path / "hosts").write_text("# two\na slots=2\nb slots=4 # more\n")
    if refused is None:
        check_launch([*words, *TRAIN], tmp_path, processes)
    else:
        with pytest.raises(SRDEError, match=refused):
            check_launch([*words, *TRAIN], tmp_path, processes)
    check_launch([*TRAIN, "--hostfile", "nope"], tmp_path, processes)  # of the script, not of deepspeed


def test_a_hostfile_at_deepspeeds_own_place_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from deepspeed.launcher.runner import DLTS_HOSTFILE

    assert str(launch_check.DEFAULT_HOSTFILE) == DLTS_HOSTFILE
    (tmp_path / "hosts").write_text("a slots=2\nb slots=2\n")
    monkeypatch.setattr(launch_check, "DEFAULT_HOSTFILE", tmp_path / "hosts")
    check_launch(["--num_gpus", "2", *TRAIN], tmp_path, 4)  # on each host


def test_training_under_deepspeed_finds_its_arguments(tmp_path: Path) -> None:
    """The hostfile is missing: deepspeed would train on this host, with a warning among many."""
    launcher = str(Path(sys.executable).with_name("deepspeed"))
    words = [launcher, "--hostfile", "nope", "--num_gpus", "1", "--master_port", str(free_port()), *TRAIN]
    environment = {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "PATH": "/usr/bin:/bin", "PYTHONPATH": str(ROOT)}
    words += ["--output_dir", str(tmp_path / "run")]
    done = subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=200)
    assert done.returncode == 2, done.stderr
    assert "srde-ds: error: hostfile=nope: no such file" in done.stderr and not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("changes", "refused"),
    [
        ({"MASTER_ADDR": None}, "RANK=1 is set in the environment, but MASTER_ADDR is not: .* unset RANK"),
        ({"WORLD_SIZE": None}, "RANK=1 is set in the environment, but WORLD_SIZE is not"),
        ({"RANK": "2"}, "RANK=2 is set in the environment, but WORLD_SIZE=2 is not above it"),
        ({"RANK": "one"}, "RANK='one' in the environment: not a number. Unset it"),
        ({"RANK": None}, "WORLD_SIZE=2 is set in the environment, but RANK is not: .* unset WORLD_SIZE"),
        ({"RANK": None, "WORLD_SIZE": "x"}, "WORLD_SIZE='x' in the environment: not a number. Unset it"),
        (
            {"RANK": None, "WORLD_SIZE": None, "OMPI_COMM_WORLD_RANK": "1"},
            "OMPI_COMM_WORLD_RANK=1 is set .* unset OMPI",
        ),
        ({"LOCAL_RANK": None}, "LOCAL_RANK is not set in the environment, but RANK=1 is: .* Set it to"),
        ({"LOCAL_RANK": None, "RANK": "0", "WORLD_SIZE": "1"}, None),
        ({**NOT_TOLD, "SLURM_STEP_NUM_TASKS": "8"}, "SLURM_STEP_NUM_TASKS=8 is set .* cluster/slurm/task.sh"),
        ({**NOT_TOLD, "PMI_SIZE": "2", "SLURM_STEP_NUM_TASKS": "1"}, "PMI_SIZE=2 is set .* unset PMI_SIZE"),
        ({**NOT_TOLD, "PMI_SIZE": "1", "SLURM_STEP_NUM_TASKS": "1"}, None),
        ({**NOT_TOLD, "PMI_SIZE": ""}, None),
        ({"PMI_SIZE": "2", "SLURM_STEP_NUM_TASKS": "2"}, None),
        ({}, None),
    ],
)
def test_a_stray_rank(
    changes: dict[str, Any], refused: str | None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, value in (ALONE | changes).items():
        monkeypatch.setenv(name, value or "")  # so that what becomes of it is undone
        if value is None:
            monkeypatch.delenv(name)
    if refused is None:
        adopt_launcher()
        assert os.environ["RANK"] == ((ALONE | changes)["RANK"] or "0")
        assert os.environ["LOCAL_RANK"] == "0"
    else:
        with pytest.raises(SRDEError, match=refused):
            adopt_launcher()
        if changes.get("RANK") == "one":  # the first who asks for it is the console
            assert main(["train"]) == 2 and "RANK='one'" in capsys.readouterr().err


def test_stray_variables_of_open_mpi(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE"):  # other tests of this process may have been launched
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("OMPI_COMM_WORLD_SIZE", "4")
    monkeypatch.setattr("srde_ds.distributed.processes.find_spec", lambda name: None)
    with pytest.raises(SRDEError, match="OMPI_COMM_WORLD_SIZE=4 is set in the environment, but package 'mpi4py'"):
        adopt_launcher()
    monkeypatch.setattr("srde_ds.distributed.processes.find_spec", lambda name: object())
    monkeypatch.setattr(
        "srde_ds.distributed.processes.internals.adopt_mpi_launcher", lambda: monkeypatch.setenv("WORLD_SIZE", "1")
    )
    with pytest.raises(SRDEError, match="but MPI has 1 processes. Start with mpirun, or unset the variables OMPI_"):
        adopt_launcher()
