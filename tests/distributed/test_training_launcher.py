"""`deepspeed launch/train.py` with two processes: what a run leaves behind, and what it refuses."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from srde_ds.config import resolve
from srde_ds.config.values import load_yaml
from srde_ds.data.loader import validation_batches
from srde_ds.data.manifest import load_manifest, load_rows
from srde_ds.model.adapter import load_adapter
from tests.distributed.harness import free_port
from tests.distributed.kill_helpers import ended, ranks, train_verb
from tests.distributed.training_helpers import (
    DOMAINS,
    Inputs,
    assert_same_training,
    latest,
    metrics,
    weights,
    without_clocks,
)

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="compares with runs on CPUs, bit for bit")

ROOT = Path(__file__).parents[2]
KEYS = {
    "step", "loss", "learning_rates", "grad_norm", "tokens", "tokens_per_second", "tokens_per_expert",
    "expert_gradient_norm", "delta_norm", "router_entropy", "epochs",
}  # fmt: skip


@dataclass(frozen=True)
class Launched:
    folder: Path
    status: int
    output: str


def launch(flags: dict[str, Any]) -> Launched:
    command = [str(Path(sys.executable).with_name("deepspeed")), "--num_gpus", "2", "--master_port", str(free_port())]
    command += ["launch/train.py"]
    for name, value in flags.items():
        command += [
            f"--{name}",
            ",".join(value)
            if isinstance(value, list)
            else str(value).lower()
            if isinstance(value, bool)
            else str(value),
        ]
    environment = os.environ | {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command,
        cwd=ROOT,
        env=environment,
        text=True,
        timeout=400,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    return Launched(Path(flags["output_dir"]), done.returncode, done.stdout)


def launch_flags(inputs: Inputs, folder: Path, **changes: Any) -> dict[str, Any]:
    """A run that tokenises the JSONL files itself, with a configuration of DeepSpeed that the project ships."""
    files = {"jsonl_data": inputs.jsonl, "eval_file": inputs.eval_file, "deepspeed_config": "ds_configs/zero3.json"}
    flags = inputs.flags(folder, **files) | changes
    del flags["pretokenized_dir"]
    return flags


@pytest.fixture(scope="module")
def finished(inputs: Inputs, tmp_path_factory: pytest.TempPathFactory) -> Launched:
    return launch(launch_flags(inputs, tmp_path_factory.mktemp("launched") / "run"))


def test_a_run_leaves_the_documented_folder(finished: Launched, inputs: Inputs) -> None:
    assert finished.status == 0, finished.output
    run = finished.folder
    names = {
        "config.yaml",
        "environment.json",
        "heartbeat.json",
        "metrics.jsonl",
        "latest",
        "checkpoint-3",
        "checkpoint-6",
        "tokenized",
    }
    assert {path.name for path in run.iterdir()} == names | {"srde_weights.safetensors", "completed.json"}
    assert latest(run) == "checkpoint-6"
    assert resolve(load_yaml(run / "config.yaml"), {}) == resolve({}, launch_flags(inputs, run))
    environment = json.loads((run / "environment.json").read_text())
    assert environment["versions"]["deepspeed"] == "0.19.8" and environment["world_size"] == 2
    head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, text=True, capture_output=True).stdout.strip()
    assert head in environment["git_revision"]
    times = {path: path.stat().st_mtime_ns for path in run.rglob("*") if path.is_file()}
    completed = run / "completed.json"
    assert all(time < times[completed] for path, time in times.items() if path != completed)
    assert json.loads(completed.read_text())["step"] == 6


def test_metrics_hold_a_line_a_step(finished: Launched) -> None:
    lines = metrics(finished.folder)
    assert [line["step"] for line in lines] == list(range(1, 7))
    assert all(line.keys() >= KEYS and len(line["tokens_per_expert"]) == len(DOMAINS) for line in lines)
    assert not any("learning_rate" in line for line in lines)  # Muon updates all deltas
    assert [line["step"] for line in lines if "held_out" in line] == [3, 6]
    assert all(list(line["held_out"]) == DOMAINS for line in lines if "held_out" in line)
    assert list(lines[0]["held_out_at_start"]) == DOMAINS
    rows = load_manifest(finished.folder / "tokenized").splits["train"].rows
    assert [line["epochs"] for line in lines] == [[8 * step / rows] for step in range(1, 7)]
    for line in lines:  # each token has two experts in each layer
        new = line["tokens"] - (lines[line["step"] - 2]["tokens"] if line["step"] > 1 else 0)
        assert sum(line["tokens_per_expert"]) == 2 * new


def test_the_exported_weights_give_the_held_out_loss_of_the_run(finished: Launched) -> None:
    model = load_adapter(finished.folder / "srde_weights.safetensors")
    folder = finished.folder / "tokenized"
    rows = load_rows(folder, "validation", load_manifest(folder)).with_format("numpy")
    for index, name in enumerate(DOMAINS):
        loss, count = 0.0, 0
        for batch in validation_batches(rows.select((rows["domain"][:] == index).nonzero()[0]), 1):
            inputs = {key: batch[key] for key in ("input_ids", "position_ids", "labels", "token_mask")}
            with torch.no_grad():
                output = model(**inputs)
            loss, count = loss + float(output.loss_sum), count + int(output.label_count)
        # fp32 sums in another order.
        assert loss / count == pytest.approx(metrics(finished.folder)[-1]["held_out"][name], rel=1e-6)


def test_the_launched_run_is_the_run_in_other_processes_bit_for_bit(finished: Launched, reference: Path) -> None:
    """New processes, data from JSONL, parameters kept whole instead of gathered: none of it changes a bit."""
    assert without_clocks(metrics(finished.folder)) == without_clocks(metrics(reference))
    assert_same_training(finished.folder, reference, tolerance=0)
    assert weights(finished.folder).keys() == weights(reference).keys()


def test_bad_input_is_refused_in_one_line(inputs: Inputs, tmp_path: Path) -> None:
    broken = tmp_path / "broken.jsonl"
    lines = Path(inputs.jsonl).read_text().splitlines()
    broken.write_text("\n".join([*lines[:4], '{"prompt": "torn', *lines[4:]]))
    log = tmp_path / "log"
    with ranks(launch_flags(inputs, tmp_path / "run", jsonl_data=str(broken)), 2, log, target=train_verb) as processes:
        assert ended(processes) == [2, 1], log.read_text()  # rank 1 is told why rank 0 has ended
    first, *others = (line for line in log.read_text().splitlines() if "error" in line or "Traceback" in line)
    assert first.startswith(f"srde-ds: error: {broken}:5: not valid JSON"), log.read_text()
    assert len(others) <= 1 and all("rank 0 (host " in line and "broken.jsonl:5: " in line for line in others)
    assert not (tmp_path / "run").exists()
