"""A run that a signal has stopped ends with 128 + the signal and without a traceback, whenever that comes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from srde_ds.cli.main import main
from tests.cli_helpers import flags
from tests.distributed.harness import Ranks, fork, free_port, run_forked
from tests.distributed.kill_helpers import wait_until
from tests.distributed.training_helpers import Inputs, latest, make_inputs, train_here

ROOT = Path(__file__).parents[2]
TRAIN = [sys.executable, "launch/train.py"]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Inputs:
    return make_inputs(tmp_path_factory.mktemp("inputs"))


class Training(subprocess.Popen[str]):
    """A run with its output, which gets no signal by itself."""

    def __init__(self, options: dict[str, Any], launcher: list[str] = TRAIN) -> None:
        environment = os.environ | {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
        pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        super().__init__([*launcher, *flags(options)], cwd=ROOT, env=environment, **pipes)
        self.output = ""
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.stdout
        for line in self.stdout:
            self.output += line

    def wait_for(self, text: str) -> None:
        deadline = time.monotonic() + 300
        while text not in self.output:
            assert time.monotonic() < deadline and self.poll() is None, self.output
            time.sleep(0.02)

    def ended(self) -> int:
        status = self.wait(120)
        self._reader.join(10)
        return status


def options(inputs: Inputs, run: Path) -> dict[str, Any]:
    values = inputs.flags(run, jsonl_data=inputs.jsonl, max_steps=1000, save_steps=500, eval_steps=0)
    del values["pretokenized_dir"]
    return values


def train(options: dict[str, Any]) -> int:
    """What launch/train.py does after its imports."""
    return main(["train", *flags(options)])


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_before_the_first_step_nothing_is_left(
    inputs: Inputs, one_rank: Ranks, tmp_path: Path, number: signal.Signals
) -> None:
    log = tmp_path / "log"
    log.touch()
    run = fork(log, train, options(inputs, tmp_path / "run"))
    wait_until(lambda: "72 records" in log.read_text(), [run], log)  # the data are being prepared
    os.kill(int(run.pid or 0), number)
    run.join(120)
    output = log.read_text()
    assert run.exitcode == 128 + number, output
    assert "Traceback" not in output and f"srde-ds: stopped by {number.name}." in output
    assert not (tmp_path / "run/latest").exists() and not (tmp_path / "run/run.lock").exists()
    again = options(inputs, tmp_path / "run") | {"max_steps": 3}
    assert one_rank(train_here, again) == [None]  # the folder blocks nothing
    assert (tmp_path / "run/completed.json").exists()


def test_in_its_first_second_a_run_ends_without_a_traceback(inputs: Inputs, tmp_path: Path) -> None:
    for seconds in (0.0, 0.5, 2.0):
        with Training(options(inputs, tmp_path / "run")) as run:
            deadline = time.monotonic() + 60
            while "libtorch" not in Path(f"/proc/{run.pid}/maps").read_text():
                assert time.monotonic() < deadline
                time.sleep(0.01)
            time.sleep(seconds)
            run.send_signal(signal.SIGINT)
            assert run.ended() == 128 + signal.SIGINT, run.output
        assert "Traceback" not in run.output


def test_the_launcher_ends_with_the_signal_of_a_rank(inputs: Inputs, one_rank: Ranks, tmp_path: Path) -> None:
    launcher = [str(Path(sys.executable).with_name("deepspeed")), "--num_gpus", "2", "--master_port", str(free_port())]
    launcher.append("launch/train.py")
    folder = tmp_path / "run"
    with Training(options(inputs, folder), launcher) as run:
        run.wait_for("step    2/1000")
        (error,) = one_rank(train_here, options(inputs, folder) | {"resume_from": "latest"})  # beside the living one
        assert "is training there (run.lock)" in error
        os.kill(json.loads((folder / "heartbeat.json").read_text())["pid"], signal.SIGTERM)
        assert run.ended() == 128 + signal.SIGTERM, run.output
    assert "Stopped by SIGTERM at step" in run.output and latest(folder).startswith("checkpoint-")
    heartbeat = json.loads((folder / "heartbeat.json").read_text())
    assert (heartbeat["state"], heartbeat["reason"]) == ("stopped", "stopped by SIGTERM")
    assert not (folder / "run.lock").exists()
    done = int(latest(folder).removeprefix("checkpoint-"))
    more = {"resume_from": "latest", "max_steps": done + 1, "learning_rate": 0.05, "batch_size": 4}
    assert run_forked(tmp_path / "log", train, options(inputs, folder) | more) == 0, (tmp_path / "log").read_text()
    resumed = (tmp_path / "log").read_text()
    table = resumed[resumed.index("Resumed at step") :].splitlines()[1:5]
    assert [line.split()[:3] for line in table] == [
        ["option", "before", "now"],
        ["learning_rate", "0.01", "0.05"],
        ["max_steps", "1000", str(done + 1)],
        ["batch_size", "2", "4"],
    ]
    assert (folder / f"config-until-{done}.yaml").exists() and not (folder / "metrics.attempt-1.jsonl").exists()
    (error,) = one_rank(train_here, options(inputs, folder) | more | {"max_steps": 3})
    assert f"already has {done + 1} steps. Give --max_steps {done + 1}" in error
