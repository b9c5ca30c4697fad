"""The scripts of cluster/ with stand-ins for Slurm's and other programs: when a job is done, what ranks get."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from unittest.mock import patch

import pytest

from srde_ds.api import build_dataset
from srde_ds.liveness.heartbeat import Heartbeat
from tests.cli_helpers import DOMAINS, save_base, write_records

SCRIPT = Path(__file__).parents[2] / "cluster/slurm/train.sbatch"
SRUN = """#!/bin/sh
echo "$@" >> calls
rm -f run/completed.json # as a run does that opens its folder
if [ -n "$SIGNAL" ]; then trap 'exit 138' USR1; kill -s "$SIGNAL" $PPID; while :; do sleep 0.05; done; fi
if [ -n "$SAVED" ]; then echo "$SAVED" > run/latest; fi
if [ "$STEPS" != none ]; then echo "{\\"checkpoint\\": \\"c\\", \\"step\\": $STEPS}" > run/completed.json; fi
exit "$STATUS"
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "bin").mkdir()
    (tmp_path / "run").mkdir()
    scontrol, python = '#!/bin/sh\necho "$@" >> scontrol\necho localhost\n', f'#!/bin/sh\nexec {sys.executable} "$@"\n'
    for name, text in {"srun": SRUN, "scontrol": scontrol, "python": python}.items():
        (tmp_path / "bin" / name).write_text(text)
        (tmp_path / "bin" / name).chmod(0o755)
    return tmp_path


def job(
    folder: Path,
    *flags: str,
    steps: int | None,
    status: int = 0,
    signal: str = "",
    preflight: str = "false",
    saved: str = "",
) -> subprocess.CompletedProcess[str]:
    """A job whose ranks end with `status`, after they have `saved` a checkpoint or finished `steps`, or when the job
    gets `signal`."""
    environment = {name: os.environ[name] for name in ("BASH_ENV",) if name in os.environ} | {
        "PATH": f"{folder / 'bin'}:{os.environ['PATH']}",
        "PYTHONPATH": str(SCRIPT.parents[2]),  # a job is submitted from there
        "SLURM_SUBMIT_DIR": str(folder),
        "SLURM_JOB_NODELIST": "localhost",
        "SLURM_JOB_ID": "7",
        "SLURM_TASKS_PER_NODE": "1",
        "SLURM_JOB_NUM_NODES": "1",
        "PREFLIGHT": preflight,
        "STEPS": "none" if steps is None else str(steps),
        "STATUS": str(status),
        "SIGNAL": signal,
        "SAVED": saved,
    }
    command = ["bash", str(SCRIPT), "--output_dir", "run", *flags]
    return subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True)


def test_a_run_that_ends_is_done(folder: Path) -> None:
    assert job(folder, steps=5).returncode == 0


def test_a_finished_run_is_left_alone(folder: Path) -> None:
    job(folder, steps=5)
    again = job(folder, "--max_steps", "5", steps=None)
    assert (again.returncode, (folder / "calls").read_text().count("\n")) == (0, 1)
    assert "'run' is a finished run of 5 steps; a larger --max_steps" in again.stderr


def test_a_finished_run_whose_domains_its_rows_name_is_left_alone(folder: Path) -> None:
    data, base = write_records(folder / "train.jsonl"), save_base(folder / "base")
    build_dataset(data, model_name=base, output=folder / "rows", domains=DOMAINS, max_length=64)
    job(folder, steps=5)
    flags = ["--max_steps", "5", "--training_phases", "by_domain", "--num_experts", "2"]
    again = job(folder, "--pretokenized_dir", str(folder / "rows"), *flags, steps=None)
    assert (again.returncode, (folder / "calls").read_text().count("\n")) == (0, 1), again.stderr
    assert "'run' is a finished run of 5 steps" in again.stderr


@pytest.mark.parametrize("flags", [["--max_steps", "many"], ["--config", "none.yaml"]])
def test_what_is_wrong_with_the_options_of_a_finished_run_its_ranks_say(folder: Path, flags: list[str]) -> None:
    job(folder, steps=5)
    again = job(folder, *flags, steps=None, status=2)
    assert (again.returncode, (folder / "calls").read_text().count("\n")) == (2, 2)
    assert "do not resolve here; the ranks will say why" in again.stderr and "Traceback" not in again.stderr


@pytest.mark.parametrize("flags", [["--max_steps=9"], ["--config", "run.yaml"]])
def test_a_finished_run_is_extended(folder: Path, flags: list[str]) -> None:
    (folder / "run.yaml").write_text("training: {max_steps: 9}\n")
    job(folder, steps=5)
    (folder / "run/latest").write_text("checkpoint-5")
    assert job(folder, *flags, steps=9).returncode == 0
    assert "--resume_from latest" in (folder / "calls").read_text()


def test_a_finished_run_whose_extension_fails_is_not_finished(folder: Path) -> None:
    job(folder, steps=5)
    failed = job(folder, "--max_steps", "12", steps=None, status=3)
    assert failed.returncode == 3 and "left no new 'run/completed.json'" in failed.stderr


def test_a_finished_run_that_is_extended_is_requeued_at_its_time_limit(folder: Path) -> None:
    job(folder, steps=5)
    (folder / "run/latest").write_text("checkpoint-5")
    stopped = job(folder, "--max_steps", "9", steps=None, signal="USR1")
    assert stopped.returncode == 138 and "stopped by SIGUSR1, requeued" in stopped.stdout
    assert "requeue 7" in (folder / "scontrol").read_text()


@pytest.mark.parametrize("flags", [["--resume_from", "run/checkpoint-5"], ["--config", "run.yaml"]])
def test_a_job_that_goes_back_to_a_checkpoint_does_so_once(folder: Path, flags: list[str]) -> None:
    (folder / "run.yaml").write_text("training: {resume_from: run/checkpoint-5}\n")
    (folder / "run/latest").write_text("checkpoint-10")
    (folder / "run/heartbeat.json").write_text('{\n "slurm_job": "6"\n}\n')  # of the job that went too far
    job(folder, *flags, steps=None, signal="TERM")  # while the ranks start
    (folder / "run/heartbeat.json").unlink()
    job(folder, *flags, steps=None)
    with patch.dict(os.environ, {"SLURM_JOB_ID": "7"}):
        Heartbeat(folder / "run", 20, world_size=1, enabled=True).start(5)
    job(folder, *flags, steps=20)
    given = [call.partition("--output_dir run ")[2] for call in (folder / "calls").read_text().splitlines()]
    assert given == [*[" ".join(flags)] * 2, " ".join(flags) + " --resume_from latest"]


def test_a_checkpoint_of_another_run_counts_until_this_run_has_one(folder: Path) -> None:
    flags = ["--resume_from", "other/checkpoint-5"]
    job(folder, *flags, steps=None)
    (folder / "run/latest").write_text("checkpoint-8")
    job(folder, *flags, steps=None)
    job(folder, *flags, "--max_steps", "many", steps=None)  # cannot be resolved
    job(folder, "--max_steps", "many", steps=None)
    latest = [call.endswith("--resume_from latest") for call in (folder / "calls").read_text().splitlines()]
    assert latest == [False, True, False, True]


def test_a_signal_before_the_preflight_leaves_it_out(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "run/latest").write_text("checkpoint-8")
    python = folder / "bin/python"
    python.write_text(python.read_text().replace("exec", "kill -s TERM $(ps -o ppid= $PPID)\nexec"))
    stopped = job(folder, steps=None, preflight="true")
    assert stopped.returncode == 143 and "requeue 7" in (folder / "scontrol").read_text()
    assert not (folder / "calls").exists()


@pytest.mark.parametrize(
    ("tasks", "node", "own"), [("8", 0, 8), ("4(x2),3", 1, 4), ("4(x2),3", 2, 3), ("1,2(x3)", 0, 1)]
)
def test_a_task_knows_how_many_are_on_its_node(tasks: str, node: int, own: int) -> None:
    slurm = {"SLURM_PROCID": "5", "SLURM_LOCALID": "1", "SLURM_NTASKS": "11", "SLURM_NODEID": str(node)}
    environment = {"PATH": os.environ["PATH"], "SLURM_STEP_TASKS_PER_NODE": tasks} | slurm
    command = [str(SCRIPT.parent / "task.sh"), "sh", "-c", "echo $RANK $LOCAL_RANK $WORLD_SIZE $LOCAL_WORLD_SIZE"]
    told = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout
    assert told == f"5 1 11 {own}\n"


def test_ranks_that_end_without_finishing_are_a_failure(folder: Path) -> None:
    assert job(folder, steps=None).returncode == 1
    assert job(folder, steps=None, status=4).returncode == 4


def test_ranks_that_fail_after_a_new_checkpoint_are_started_again(folder: Path) -> None:
    def requeued() -> bool:
        return "requeue 7" in (folder / "scontrol").read_text()

    assert job(folder, steps=None, status=4).returncode == 4 and not requeued()
    (folder / "run/heartbeat.json").write_text('{\n "bad_input": true\n}\n')
    assert job(folder, steps=None, status=4, saved="checkpoint-5").returncode == 4 and not requeued()
    (folder / "run/heartbeat.json").unlink()
    (folder / "run/latest").unlink()
    failed = job(folder, steps=None, status=4, saved="checkpoint-5")
    assert failed.returncode == 4 and requeued() and "after checkpoint-5 was saved, requeued" in failed.stderr


def test_the_status_of_a_launcher_that_ends_before_the_first_look_is_kept(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder / "late").write_text('kill() { sleep 0.3; builtin kill "$@"; }\n')
    monkeypatch.setenv("BASH_ENV", str(folder / "late"))
    assert job(folder, steps=None, status=4).returncode == 4
    shutil.copy(folder / "bin/srun", folder / "bin/mpirun")
    (folder / "hosts").write_text("localhost slots=1\n")
    environment = os.environ | {"PATH": f"{folder / 'bin'}:{os.environ['PATH']}", "PREFLIGHT": "false"}
    environment |= {"STEPS": "none", "STATUS": "5", "SIGNAL": ""}
    command = ["bash", str(SCRIPT.parents[1] / "mpi/train.sh"), "hosts", "--output_dir", "run"]
    assert subprocess.run(command, env=environment, cwd=folder, check=False).returncode == 5


@pytest.mark.parametrize(("script", "program"), [("mpi/train.sh", "mpirun"), ("ssh/train.sh", "ssh")])
def test_the_last_variable_for_the_ranks_needs_no_line_feed(folder: Path, script: str, program: str) -> None:
    (folder / f"bin/{program}").write_text('#!/bin/sh\necho "$@" >> calls\n')
    (folder / f"bin/{program}").chmod(0o755)
    (folder / "hosts").write_text("localhost slots=1\n")
    (folder / ".deepspeed_env").write_text("FIRST=1\nLAST=2")
    environment = os.environ | {"HOME": str(folder / "bin"), "PREFLIGHT": "false"}
    environment |= {"PATH": f"{folder / 'bin'}:{Path(sys.executable).parent}:{os.environ['PATH']}"}
    command = ["bash", str(SCRIPT.parents[1] / script), "hosts", "--output_dir", "run"]
    subprocess.run(command, env=environment, cwd=folder, check=True)
    given = (folder / "calls").read_text()
    assert "FIRST=1" in given and "LAST=2" in given
