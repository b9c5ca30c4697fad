"""`srde-ds supervise` with a stand-in for training; with real training: tests/cluster/test_faults.py."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from srde_ds.api import build_dataset
from srde_ds.cli.main import main
from srde_ds.cluster import supervisor as module
from srde_ds.cluster.hosts import Host
from srde_ds.cluster.supervisor import Command, Supervisor
from srde_ds.config import resolve
from srde_ds.errors import SRDEError
from tests.cli_helpers import DOMAINS, fails, save_base, write_records

# Does in each attempt what the next line of the plan says, and notes its arguments.
STAND_IN = """
import json, os, pathlib, subprocess, sys, time
run = pathlib.Path(sys.argv[sys.argv.index("--output_dir") + 1]); run.mkdir(exist_ok=True)
plan = pathlib.Path(os.environ["PLAN"]); first, *rest = plan.read_text().splitlines(); plan.write_text("\\n".join(rest))
with open(run / "calls", "a") as calls: calls.write(" ".join(sys.argv[1:]) + "\\n")
def beat(**more):
    content = {"state": "running", "step": 3, "host": os.uname().nodename, "pid": os.getpid(), "time": time.time()}
    (run / "heartbeat.json").write_text(json.dumps(content | more))
(run / "metrics.jsonl").write_text("{}")
if "saved" in first: (run / "latest").write_text("checkpoint-3")
if "failed" in first: beat(state="failed", reason="rank 1 (host b) failed: X.")
if "bad" in first: beat(state="failed", reason="the loss is nan", bad_input=True)
if "error" in first: print("srde-ds: error: rank 1: no such folder", file=sys.stderr)
if "orphan" in first: subprocess.Popen(["sleep", "300"])
if "completed" in first: (run / "completed.json").write_text('{"step": 1000}')
if "wait" in first: beat(); time.sleep(600)
sys.exit(int(first.split()[0]))
"""


@pytest.fixture
def script(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(module, "RESTART_SECONDS", 0.0)
    monkeypatch.setenv("PLAN", str(tmp_path / "plan"))
    (tmp_path / "train.py").write_text(STAND_IN)
    return tmp_path / "train.py"


def supervise(script: Path, plan: list[str], *more: str, max_restarts: int = 3) -> int:
    (script.parent / "plan").write_text("\n".join(plan))
    command = [sys.executable, str(script), "--output_dir", str(script.parent / "run"), *more]
    return main(["supervise", "--preflight", "false", "--max_restarts", str(max_restarts), "--", *command])


def calls(script: Path) -> list[str]:
    return (script.parent / "run/calls").read_text().splitlines()


def test_the_marker_decides_not_the_exit_code(script: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert supervise(script, ["0 saved", "9 completed"]) == 0
    first, second = calls(script)
    assert "--resume_from" not in first and second.endswith("--resume_from latest")
    printed = capfd.readouterr().err
    assert "ended after" in printed and "command ended with status 0 before training began" in printed
    assert supervise(script, ["1"]) == 0 and len(calls(script)) == 2  # nothing more to do


def test_a_checkpoint_that_is_there_is_used_at_once(script: Path) -> None:
    (script.parent / "run").mkdir()
    (script.parent / "run/latest").write_text("checkpoint-3")
    assert supervise(script, ["0 completed"]) == 0
    assert calls(script)[0].endswith("--resume_from latest")


def test_without_a_checkpoint_a_restart_begins_anew(script: Path) -> None:
    assert supervise(script, ["1", "0 completed"]) == 0
    assert "--resume_from" not in calls(script)[1]


def test_a_checkpoint_to_go_back_to_counts_until_the_run_has_begun(script: Path) -> None:
    (script.parent / "run").mkdir()
    (script.parent / "run/latest").write_text("checkpoint-1000")
    earlier = {"state": "failed", "step": 1400, "host": "here", "pid": 1, "time": 1.0}
    (script.parent / "run/heartbeat.json").write_text(json.dumps(earlier))  # of the run that went too far
    back = ["--resume_from", str(script.parent / "run/checkpoint-500")]
    assert supervise(script, ["1", "1 failed", "0 completed"], *back) == 0
    assert [call.split()[-1] for call in calls(script)] == [back[1], back[1], "latest"]


def test_a_checkpoint_of_another_run_counts_until_this_run_has_one(script: Path) -> None:
    other = ["--resume_from", str(script.parent / "other/checkpoint-5")]
    assert supervise(script, ["1"], *other, max_restarts=0) == 1
    (script.parent / "run/latest").write_text("checkpoint-8")
    assert supervise(script, ["0 completed"], *other) == 0
    assert [call.split()[-1] for call in calls(script)] == [other[1], "latest"]


def test_options_resolve_as_in_a_run_where_base_and_rows_can_be_read(script: Path, tmp_path: Path) -> None:
    assert supervise(script, ["0 completed"], "--model_name", "/none") == 0  # on the ranks' hosts
    data, base = write_records(tmp_path / "train.jsonl"), save_base(tmp_path / "base")
    rows = build_dataset(data, model_name=base, output=tmp_path / "rows", domains=DOMAINS, max_length=64)
    flags = ["--pretokenized_dir", str(rows), "--training_phases", "by_domain", "--num_experts", "2"]
    assert supervise(script, ["1"], *flags) == 0


def test_a_finished_run_goes_on_when_it_is_to_have_more_steps(script: Path) -> None:
    assert supervise(script, ["0 saved completed"]) == 0
    assert supervise(script, ["1"], "--max_steps", "1000") == 0 and len(calls(script)) == 1
    (script.parent / "run/heartbeat.json").unlink(missing_ok=True)
    assert supervise(script, ["2"], "--max_steps", "1001") == 2  # the marker of the first 1000 steps is none of these
    assert calls(script)[1].endswith("--resume_from latest")


def test_causes_are_said_and_restarts_are_counted(script: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert supervise(script, ["1 failed", "247 error", "1"], max_restarts=2) == 1
    lines = capfd.readouterr().err.splitlines()
    ended = [line.partition(": ")[2] for line in lines if " ended after " in line]
    assert "rank 1 (host b) failed: X; no checkpoint has been saved yet" in ended[0]
    assert "rank 1: no such folder" in ended[1] and "status 1 before training" in ended[2]
    assert "given up after 2 restarts" in lines[-1] and "status 1" in lines[-1]


def test_restarts_are_counted_from_the_last_new_checkpoint(script: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert supervise(script, ["1", "1 saved failed", "1", "1"], max_restarts=1) == 1
    assert len(calls(script)) == 3
    assert "given up after 1 restarts without a new checkpoint" in capfd.readouterr().err
    (script.parent / "run/latest").unlink()
    assert supervise(script, ["1", "1 saved failed", "0 completed"], max_restarts=1) == 0


def test_hosts_that_are_away_before_a_later_attempt_may_come_back(
    script: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "plan").write_text("1\n0 completed")
    hosts, asked = [Host("a", 1)], iter([True, False, True])
    command = Command.parse([sys.executable, str(script), "--output_dir", str(tmp_path / "run")])
    config = resolve({}, {"output_dir": str(tmp_path / "run"), "warmup_steps": 0})
    supervisor = Supervisor(command, config, max_restarts=2, min_nodes=None, host_timeout=-1.0, preflight=False)
    supervisor.hosts = hosts
    monkeypatch.setattr(module, "answering", lambda hosts: hosts if next(asked) else [])
    monkeypatch.setattr(supervisor, "_end_on_hosts", lambda hosts: None)
    monkeypatch.setattr(type(command), "changed", lambda self, **_: self.words)
    assert supervisor.supervise() == 0 and len(calls(script)) == 2
    missing = Supervisor(command, config, max_restarts=2, min_nodes=None, host_timeout=-1.0, preflight=False)
    missing.hosts = hosts
    (tmp_path / "run/completed.json").unlink()
    monkeypatch.setattr(module, "answering", lambda hosts: [])
    with pytest.raises(SRDEError, match="no answer over ssh from a"):
        missing.supervise()


@pytest.mark.parametrize("plan", ["2", "1 bad"])
def test_bad_input_is_not_tried_again(script: Path, plan: str) -> None:
    assert supervise(script, [plan, "0 completed"]) == 2
    assert len(calls(script)) == 1


def test_nothing_of_an_attempt_lives_on(script: Path) -> None:
    def sleepers() -> set[str]:
        found = subprocess.run(["pgrep", "-f", "^sleep 300"], capture_output=True, text=True).stdout
        return set(found.split())

    before = sleepers()
    assert supervise(script, ["1 orphan", "0 completed"]) == 0
    assert sleepers() <= before


def test_a_signal_goes_to_one_rank_and_is_no_reason_to_restart(script: Path) -> None:
    (script.parent / "plan").write_text("0 wait\n0 completed")
    command = [sys.executable, str(script), "--output_dir", str(script.parent / "run")]
    words = [sys.executable, "-m", "srde_ds.cli", "supervise", "--preflight", "false", "--", *command]
    program = f"import sys; sys.argv[1:] = {words[3:]}; from srde_ds.cli.main import entry_point; entry_point()"
    with subprocess.Popen([sys.executable, "-c", program], stderr=subprocess.PIPE, text=True) as process:
        deadline = time.monotonic() + 200
        while not (script.parent / "run/heartbeat.json").exists():
            assert time.monotonic() < deadline
            time.sleep(0.05)
        time.sleep(0.2)
        process.send_signal(signal.SIGTERM)
        _, errors = process.communicate(timeout=200)
    assert process.returncode == 128 + signal.SIGTERM
    assert "stopped by SIGTERM" in errors.splitlines()[-1] and len(calls(script)) == 1


def test_a_signal_that_comes_before_the_launcher_is_kept(script: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    command = [sys.executable, str(script), "--output_dir", str(script.parent / "run")]
    (script.parent / "plan").write_text("0 wait")
    with monkeypatch.context() as patch:
        patch.setattr(module, "preflight", lambda *arguments: os.kill(os.getpid(), signal.SIGTERM))
        assert main(["supervise", "--", *command]) == 128 + signal.SIGTERM
    assert not (script.parent / "run").exists()
    popen, began = subprocess.Popen, time.monotonic()

    def started(*arguments: Any, **options: Any) -> subprocess.Popen[bytes]:
        process = popen(*arguments, **options)
        os.kill(os.getpid(), signal.SIGTERM)  # before the supervisor knows its process
        return process

    monkeypatch.setattr(subprocess, "Popen", started)
    assert main(["supervise", "--preflight", "false", "--", *command]) == 128 + signal.SIGTERM
    assert time.monotonic() - began < 200


def test_errors_are_read_on_where_they_cannot_be_printed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    supervisor = make(tmp_path)
    with open("/dev/full", "wb", buffering=0) as full:
        monkeypatch.setattr(sys, "stderr", SimpleNamespace(buffer=full, flush=full.flush))
        supervisor._pass_on(io.BytesIO(b"a line\nsrde-ds: error: the last one\n"))
        monkeypatch.undo()
    assert supervisor._last_error == "the last one"


def test_a_launcher_that_waits_on_is_ended(script: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "LINGER_SECONDS", 0.2)
    script.write_text(STAND_IN.replace("sys.exit(int", "'failed' in first and time.sleep(600)\nsys.exit(int"))
    began = time.monotonic()
    assert supervise(script, ["1 failed", "0 completed"]) == 0
    assert time.monotonic() - began < 200


def test_commands_are_taken_apart() -> None:
    launcher = ["deepspeed", "--hostfile", "old", "--master_port", "1", "launch/train.py"]
    command = Command.parse([*launcher, "--seed", "4", "--resume_from=x", "--batch_size", "2"])
    assert command.hostfile == "old" and command.port == 1 and command.train_arguments[0] == "--seed"
    changed = command.changed(hostfile="new", options={"resume_from": "latest", "batch_size": "1"})
    assert " ".join(changed) == (
        "deepspeed --hostfile new --master_port 1 launch/train.py --seed 4 --resume_from latest --batch_size 1"
    )
    assert Command.parse(["srde-ds", "train", "--seed", "1"]).hostfile is None
    assert Command.parse(["deepspeed", "launch/train.py", "--master_port", "2"]).port == 29500
    assert Command.parse(["deepspeed", "--master_port", "2", "launch/train.py"]).port == 2
    with pytest.raises(SRDEError, match="master_port=two: must be a number"):
        _ = Command.parse(["deepspeed", "--master_port=two", "launch/train.py"]).port
    assert Command.parse(["torchrun", "--nproc-per-node", "2", "launch/train.py"]).train_arguments == []
    with pytest.raises(SRDEError, match="starts no training"):
        Command.parse(["deepspeed", "other.py"])


@pytest.mark.parametrize("option", ["--exclude node7", "-e=node7", "--include a@b:0", "--num_nodes 2", "--num_gpus=4"])
def test_a_part_of_a_hostfile_is_refused(option: str) -> None:
    """Preflight, `--min_nodes` and the accumulation would go by the whole hostfile."""
    words = ["deepspeed", "--hostfile", "hosts", *option.split(), "launch/train.py", "--num_nodes", "1"]
    with pytest.raises(SRDEError, match="with --hostfile, `supervise` counts on all its hosts and slots"):
        _ = Command.parse(words).hostfile
    words.remove("--hostfile")
    assert Command.parse(words).hostfile is None


def make(tmp_path: Path, **changes: Any) -> Supervisor:
    (tmp_path / "hosts").write_text("a slots=2\nb slots=2\nc slots=2\n")
    command = Command.parse(["deepspeed", "--hostfile", str(tmp_path / "hosts"), "launch/train.py"])
    options = {"output_dir": str(tmp_path / "run"), "gradient_accumulation_steps": 4, "warmup_steps": 0}
    return Supervisor(
        command, resolve({}, options | changes), max_restarts=1, min_nodes=1, host_timeout=0.0, preflight=False
    )


def test_fewer_hosts_take_the_same_rows(tmp_path: Path) -> None:
    supervisor = make(tmp_path)
    assert supervisor._options(supervisor.hosts) == {}
    assert supervisor._options(supervisor.hosts[:2]) == {"gradient_accumulation_steps": "6"}
    assert supervisor._options(supervisor.hosts[:1]) == {"gradient_accumulation_steps": "12"}
    with pytest.raises(SRDEError, match="4 processes cannot take over from 6: .* must stay 18"):
        make(tmp_path, gradient_accumulation_steps=3)._options(supervisor.hosts[:2])
    with pytest.raises(SRDEError, match="expert_parallel_size=6 must divide"):
        make(tmp_path, expert_parallel_size=6)._options(supervisor.hosts[:1])


def test_hosts_that_do_not_answer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    supervisor = make(tmp_path)
    monkeypatch.setattr(module, "answering", lambda hosts: [host for host in hosts if host.name != "b"])
    assert supervisor._hosts_left() == [Host("a", 2), Host("c", 2)]
    supervisor.min_nodes = 3
    supervisor._signal = signal.SIGTERM  # it is no question any more
    assert supervisor._hosts_left() == [Host("a", 2), Host("c", 2)]
    supervisor._signal = 0
    with pytest.raises(SRDEError, match="no answer over ssh from b, and min_nodes=3"):
        supervisor._hosts_left()


@pytest.mark.parametrize(
    ("words", "processes", "nodes"),
    [
        ("deepspeed", None, 1),
        ("deepspeed --num_gpus 2", 2, 1),
        ("deepspeed --include=localhost:0,3,4", 3, 1),
        ("deepspeed --include localhost", None, 1),
        ("torchrun", 1, 1),
        ("torchrun --nproc_per_node=gpu", None, 1),
        ("torchrun --nnodes 2 --nproc-per-node 4", 4, 2),
        ("python -m torch.distributed.run --nnodes 1:4 --nproc_per_node 4", 4, 1),
        ("python", 1, 1),
    ],
)
def test_the_preflight_plans_for_the_processes_that_will_start(
    words: str, processes: int | None, nodes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: dict[str, Any] = {}

    def check(*arguments: Any, **numbers: Any) -> list[Any]:
        asked.update(numbers)
        return []

    monkeypatch.setattr(module, "check", check)
    module.preflight(resolve({}, {"warmup_steps": 0}), [], Command.parse([*words.split(), "launch/train.py"]))
    assert asked == {"processes": processes, "nodes": nodes}


def test_a_command_that_cannot_start_and_one_that_is_missing(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["supervise", "--preflight", "false", "--", "no-such-launcher", "train.py"]) == 2
    assert "'no-such-launcher' cannot be started: No such file" in capsys.readouterr().err.splitlines()[-1]
    fails(capsys, ["supervise", "--max_restarts", "1"], "starts no training")
    fails(capsys, ["supervise", "--", "srde-ds", "train", "--dry_run"], "nothing to supervise")
    fails(capsys, ["supervise", "--max_restarts", "-1"], "max_restarts=-1: must be at least 0")
    fails(capsys, ["supervise", "--min_nodes", "0"], "min_nodes=0: must be at least 1")
    fails(capsys, ["supervise", "--host_timeout", "-1"], "host_timeout=-1.0: must be at least 0")


def test_the_preflight_refuses_what_would_fail(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["supervise", "--", "srde-ds", "train", "--output_dir", "/proc/run"]) == 2
    assert "preflight: output_dir=/proc/run is not writable" in capsys.readouterr().err.splitlines()[-1]
