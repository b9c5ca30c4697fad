"""The visit to a GPU, rehearsed on the CPU."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import gpu_visit

ROOT = Path(__file__).parents[2]


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_the_script_runs_its_parts_and_goes_on_after_one_that_fails(tmp_path: Path) -> None:
    broken = tmp_path / "python"
    broken.write_text(f'#!/bin/sh\n[ "$3" = layer ] && exit 3\nexec {sys.executable} "$@"\n')
    broken.chmod(0o755)
    file = tmp_path / "visit.jsonl"
    result = subprocess.run(
        [ROOT / "benchmarks/gpu_visit.sh", file, "--rehearse"],
        env=os.environ | {"PARTS": "layer machine", "PYTHON": str(broken)},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 1 and "layer: ended with status 3" in result.stdout
    found = lines(file)
    assert {line["part"] for line in found} == {"machine"}
    assert found[0]["versions"]["torch"] and found[-1]["what"] == "done"
    assert next(line for line in found if line["what"] == "product, bf16")["tflops"] > 0


def test_the_whole_model_with_its_switches(tmp_path: Path) -> None:
    file = tmp_path / "visit.jsonl"
    gpu_visit.main(["model", "--rehearse", "--output_file", str(file)])
    timed = {line["what"]: line for line in lines(file) if "tokens_per_second" in line}
    assert list(timed) == [
        "frozen base, plain, checkpointing",
        "PEFT LoRA, feed-forward, plain, checkpointing",
        "SRDE quarters of neurons, plain, checkpointing",
        "SRDE, loss of all logits",
        "SRDE, attention with a dense mask",
        "SRDE, experts' arithmetic compiled",
        "SRDE, Triton's kernels",
        "SRDE neuron, plain, checkpointing",
        "SRDE random blocks, plain, checkpointing",
        "SRDE single weights, plain, checkpointing",
        "frozen base, base in FP8",
        "SRDE quarters of neurons, base in FP8",
    ]
    assert all(0 < line["host_seconds"] <= line["seconds"] for line in timed.values())


def test_decoding(tmp_path: Path) -> None:
    file = tmp_path / "visit.jsonl"
    gpu_visit.main(["decode", "--rehearse", "--output_file", str(file)])
    found = {line["what"]: line for line in lines(file)}
    cases = [f"token, {model}, {how}" for model in ("SRDE", "base") for how in ("CUDA graph", "eagerly")]
    added = [f"token, what the experts add to a layer, {how}" for how in ("CUDA graph", "eagerly")]
    assert list(found) == [*cases, *added, "done"] and all(found[case]["seconds"] > 0 for case in cases)
    for case in cases[::2]:
        assert found[case]["graphs"] == 1 and found[case]["cudagraph_skips"] == 0


def test_the_summary_of_tests(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_visit, "GPU_TESTS", tmp_path)
    (tmp_path / "test_quick.py").write_text(
        "import atexit, sys\natexit.register(print, 'a warning at the end', file=sys.stderr)\n\n"
        "def test_a():\n    pass\n\ndef test_b():\n    assert 1 == 2\n"
    )
    file = tmp_path / "visit.jsonl"
    gpu_visit.main(["tests", "--rehearse", "--output_file", str(file)])
    *_, last, _ = lines(file)
    assert last["status"] == 1 and last["summary"].startswith("1 failed, 1 passed in")
    assert len(last["failed"]) == 1 and "test_b - assert 1 == 2" in last["failed"][0]


def test_a_test_that_hangs_leaves_the_results_of_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "test_memory.py").write_text("import time\n\ndef test_hangs():\n    time.sleep(600)\n")
    (tmp_path / "test_quick.py").write_text(
        "import pytest\n\n@pytest.mark.parametrize('x', ['a b', 'c'])\ndef test_x(x):\n    assert x == 'c'\n"
    )
    file = tmp_path / "visit.jsonl"
    program = (
        "import pathlib, sys\nfrom benchmarks import gpu_visit\n"
        f"gpu_visit.GPU_TESTS = pathlib.Path({str(tmp_path)!r})\n"
        f"gpu_visit.main(['tests', '--rehearse', '--output_file', {str(file)!r}])\n"
    )
    with subprocess.Popen([sys.executable, "-c", program], cwd=ROOT, start_new_session=True) as process:
        deadline = time.monotonic() + 300
        while process.poll() is None and time.monotonic() < deadline and not (file.exists() and len(lines(file)) > 1):
            time.sleep(0.2)
        os.killpg(process.pid, signal.SIGKILL)
    assert [(line["what"], line["result"]) for line in lines(file)] == [
        ("test_x[a b]", "failed"),
        ("test_x[c]", "passed"),
    ]


def test_every_part_has_a_time_limit_and_all_together_eight_minutes() -> None:
    text = (ROOT / "benchmarks/gpu_visit.sh").read_text()
    limits = dict(line.split() for line in text.split("<<'PARTS'\n")[1].split("\nPARTS")[0].splitlines())
    assert limits.keys() == gpu_visit.PARTS.keys()
    assert sum(map(int, limits.values())) <= 480


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_only_a_rehearsal_runs() -> None:
    with pytest.raises(SystemExit, match="no GPU"):
        gpu_visit.main(["machine"])
