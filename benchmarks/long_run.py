"""A run of many steps on two processes: what it holds and how long a step takes, at its end against its beginning.

    python benchmarks/long_run.py [--steps 3000] [--from_step 100]

A tiny base trains, with an evaluation, a save and a line on the console every few steps. Memory, descriptors and
threads are those of rank 0, looked at after each step that its heartbeat tells of; it also gives the time of a step.
The result goes to benchmarks/results/long_run.json.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from srde_ds.utils.environment import environment
from tests.cli_helpers import flags
from tests.distributed.harness import free_port
from tests.distributed.training_helpers import make_inputs

ROOT = Path(__file__).parents[1]
WINDOW = 50  # steps over which a figure's median is taken


def usage(pid: int) -> dict[str, float]:
    """What a process holds: resident MiB, open descriptors, threads."""
    status = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines() if ":" in line)
    return {
        "memory_mib": int(status["VmRSS"].split()[0]) / 1024,
        "descriptors": len(os.listdir(f"/proc/{pid}/fd")),
        "threads": int(status["Threads"]),
    }


def watch(process: subprocess.Popen[bytes], run: Path) -> list[dict[str, float]]:
    """Step, time and usage after each finished step that is seen, until the run ends."""
    seen: list[dict[str, float]] = []
    while process.poll() is None:
        time.sleep(0.1)
        try:
            beat = json.loads((run / "heartbeat.json").read_text())
            lines = (run / "metrics.jsonl").stat().st_size
            if not seen or beat["step"] > seen[-1]["step"]:
                seen.append({"step": beat["step"], "time": beat["time"], "bytes": lines, **usage(beat["pid"])})
        except (OSError, ValueError, KeyError):  # before the first step, and after the last one
            continue
    return seen


def figures(seen: list[dict[str, float]], first: int, last: int) -> dict[str, float]:
    """Medians of the usage, and seconds a step, between two steps."""
    part = [each for each in seen if first <= each["step"] <= last]
    spent = [(b["time"] - a["time"]) / (b["step"] - a["step"]) for a, b in zip(part, part[1:], strict=False)]
    medians = {key: statistics.median(each[key] for each in part) for key in ("memory_mib", "descriptors", "threads")}
    return {key: round(value, 4) for key, value in {**medians, "seconds_a_step": statistics.median(spent)}.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--from_step", type=int, default=100, help="where the beginning is taken")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks/results/long_run.json")
    options = parser.parse_args()
    window = min(WINDOW, options.from_step)
    with tempfile.TemporaryDirectory() as folder:
        inputs, run = make_inputs(Path(folder)), Path(folder) / "run"
        values: dict[str, Any] = inputs.flags(run, max_steps=options.steps, save_steps=20, eval_steps=20, log_steps=10)
        launcher = str(Path(sys.executable).with_name("deepspeed"))
        words = [launcher, "--num_gpus", "2", "--master_port", str(free_port()), "launch/train.py", *flags(values)]
        variables = os.environ | {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
        with open(Path(folder) / "log", "wb") as log:
            process = subprocess.Popen(words, cwd=ROOT, env=variables, stdout=log, stderr=subprocess.STDOUT)
            seen = watch(process, run)
        if process.returncode:
            sys.exit((Path(folder) / "log").read_text()[-2000:])
    begin = figures(seen, options.from_step, options.from_step + window)
    end = figures(seen, options.steps - window, options.steps)
    result = {
        "environment": environment(),
        "steps": options.steps,
        "processes": 2,
        f"after {options.from_step} steps": begin,
        "at the end": end,
        "change": {key: round(end[key] / begin[key] - 1, 4) for key in begin},
    }
    options.output.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps({key: result[key] for key in list(result)[3:]}, indent=1))


if __name__ == "__main__":
    main()
