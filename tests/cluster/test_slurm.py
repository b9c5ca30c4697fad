"""Slurm: the verbs as jobs that wait for each other, and training that is preempted, requeued and goes on by itself."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

from tests.cluster.hosts import Hosts, missing
from tests.cluster.slurm import PROGRAMS, Slurm
from tests.cluster.training import ENVIRONMENT, arguments, small_run
from tests.distributed.training_helpers import DOMAINS, MAX_LENGTH, Inputs, metrics

STEPS = 80  # more than there is time for before the preemption


@pytest.fixture
def slurm(hosts: Hosts) -> Iterator[Slurm]:
    if reason := missing(*PROGRAMS):
        pytest.skip(f"Slurm: {reason}")
    # Not tmp_path: the sockets in there may have paths of 108 characters at most.
    with TemporaryDirectory(prefix="slurm-") as folder:
        yield Slurm(hosts, Path(folder))
        hosts.clear()  # its daemons write there


def test_the_whole_way_runs_as_jobs_through_a_preemption(slurm: Slurm, inputs: Inputs, tmp_path: Path) -> None:
    run, logs = tmp_path / "run", str(tmp_path / "%x.log")
    changes = {"max_steps": STEPS, "save_steps": 40, "batch_size": 4, "gradient_accumulation_steps": 1}
    options = small_run(inputs, run, processes=2, **changes)
    for name in ("model_name", "pretokenized_dir", "output_dir"):
        del options[name]
    variables = {
        "MODEL_NAME": inputs.base,
        "OUTPUT_DIR": str(run),
        "EVAL_FILE": inputs.eval_file,
        "JSONL_DATA": inputs.jsonl,
        "WORK_DIR": str(tmp_path / "data"),
        "BUILD_FLAGS": f"--domains {','.join(DOMAINS)} --max_length {MAX_LENGTH}",
        "EVALUATE_FLAGS": "--max_samples 6 --max_new_tokens 4 --bf16 false",
        "TRAIN_SBATCH": "--nodes 2 --ntasks-per-node 1",
    }
    for job in ("BUILD", "TRAIN", "VERB"):
        variables[f"{job}_SBATCH"] = f"{variables.get(f'{job}_SBATCH', '')} --output {logs}"
    submitted = slurm("cluster/slurm/pipeline.sh", *arguments(options), env=ENVIRONMENT | variables)
    words = submitted.replace(",", "").split()
    build, train, evaluate, convert = (
        words[words.index(name) + 1] for name in ("build", "train", "evaluate", "convert")
    )
    assert [slurm.state(job) for job in (train, evaluate, convert)] == ["PENDING 0"] * 3

    def log() -> str:
        return "\n".join(path.read_text() for path in sorted(tmp_path.glob("*.log")))

    def wait_for(condition: Callable[[], bool], seconds: float) -> None:
        """Asks Slurm seldom: its programs would take the time of the ranks."""
        deadline, look = time.monotonic() + seconds, time.monotonic()
        while not condition():
            if (now := time.monotonic()) > look:
                jobs = {job: slurm.state(job) for job in (build, train, evaluate, convert)}
                assert now < deadline and not any("FAILED" in state for state in jobs.values()), f"{jobs}\n{log()}"
                look = time.monotonic() + 5
            time.sleep(0.1)

    # A job that goes first takes both nodes once training has begun.
    wait_for(lambda: (run / "metrics.jsonl").exists() and len(metrics(run)) >= 2, 400)
    both = ["--partition=high", "--nodes=2", "--exclusive", "--output", logs]
    urgent = slurm("sbatch", "--parsable", *both, "--wrap", "srun hostname")
    wait_for(lambda: slurm.state(urgent) == "COMPLETED 0", 240)
    wait_for(lambda: slurm.state(train) == "PENDING 1", 60)
    stopped_at = len(metrics(run))
    assert stopped_at < STEPS and (run / "latest").read_text().strip() == f"checkpoint-{stopped_at}"
    assert not (run / "completed.json").exists()
    # Slurm lets a requeued job wait two minutes; within a second of the requeueing its nodes would refuse it.
    slurm("scontrol", "update", f"JobId={train}", "StartTime=now+3")
    wait_for((run / "completed.json").exists, 400)
    wait_for(lambda: all(slurm.state(job).startswith("COMPLETED") for job in (train, evaluate, convert)), 400)

    assert json.loads((run / "completed.json").read_text())["step"] == STEPS
    assert [line["step"] for line in metrics(run)] == list(range(1, STEPS + 1))
    text = (tmp_path / "srde-train.log").read_text()
    assert "0: ok      packages" in text and "1: ok      packages" in text  # the preflight, on both nodes
    assert "start 1" in text and "stopped by SIG" in text and "start 2" in text
    assert f"Resumed at step {stopped_at}" in text
    assert json.loads((run / "evaluation.json").read_text())
    assert (run / "export/srde_weights.safetensors").read_bytes() == (run / "srde_weights.safetensors").read_bytes()


def test_a_run_that_fails_is_not_started_again(slurm: Slurm, tmp_path: Path) -> None:
    log, flags = tmp_path / "log", ["--output_dir", str(tmp_path / "run"), "--model_name", str(tmp_path / "none")]
    sbatch = ["sbatch", "--parsable", "--nodes=2", "--ntasks-per-node=1", f"--output={log}"]
    job = slurm(*sbatch, "cluster/slurm/train.sbatch", *flags, env=ENVIRONMENT)
    deadline = time.monotonic() + 180
    while not slurm.state(job).startswith("FAILED"):
        assert time.monotonic() < deadline, f"{slurm.state(job)}\n{log.read_text()}"
        time.sleep(0.2)
    assert slurm.state(job) == "FAILED 0"
    *_, last = log.read_text().splitlines()
    assert last.startswith("train.sbatch: preflight: ") and str(tmp_path / "none") in last, log.read_text()
    assert not (tmp_path / "run").exists()
