"""Learning rates and options of the quick start, compared at equal tokens: the same data, seeds and steps for each.

    python -m benchmarks.quickstart_sweep --name learning_rates --steps 30 \
        --vary "learning_rate=0.008" "learning_rate=0.015" "neuron_parts=1 muon_lr=0.02"

Each variant trains in a process of its own (one process, one thread, so that several fit side by side). Writes
benchmarks/results/<name>.json with machine and versions and prints a table of mean held-out losses.
"""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def run_variant(variant: str, steps: int, seed: int, extra: list[str], folder: Path) -> dict[str, float]:
    """Train one variant; its held-out loss by domain at the end."""
    command = [sys.executable, "launch/train.py", "--config", "launch/quickstart.yaml", "--output_dir", str(folder)]
    command += ["--max_steps", str(steps), "--warmup_steps", str(max(1, steps // 10)), "--seed", str(seed)]
    command += ["--eval_steps", "0", "--save_steps", "0", *extra]
    for item in variant.split():
        key, value = item.split("=")
        command += [f"--{key}", value]
    if not (folder / "completed.json").exists():
        environment = os.environ | {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        folder.mkdir(parents=True, exist_ok=True)
        with open(folder / "log.txt", "w") as log:
            subprocess.run(command, cwd=ROOT, env=environment, stdout=log, stderr=log, check=True)
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return lines[-1]["held_out"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--name", required=True)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--seeds", type=int, nargs="+", default=[42])
    parser.add_argument("--vary", nargs="+", required=True, help='variants, each "key=value key=value"')
    parser.add_argument("--common", nargs="*", default=[], help="key=value for all variants")
    options = parser.parse_args()
    extra = [part for item in options.common for part in (f"--{item.split('=')[0]}", item.split("=")[1])]
    results = []
    for variant in options.vary:
        for seed in options.seeds:
            folder = ROOT / "runs/sweep" / options.name / f"{variant.replace(' ', '_')}_seed{seed}"
            losses = run_variant(variant, options.steps, seed, extra, folder)
            mean = sum(losses.values()) / len(losses)
            results.append({"variant": variant, "seed": seed, "held_out": losses, "mean": mean})
            print(f"{variant:<50} seed {seed}  {mean:.4f}", flush=True)
    environment = json.loads((folder / "environment.json").read_text())
    kept = {key: environment[key] for key in ("versions", "python", "machine", "git_revision")}
    record = {"steps": options.steps, "common": options.common, "environment": kept, "results": results}
    target = ROOT / "benchmarks/results" / f"{options.name}.json"
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
