"""Does SRDE learn as well on a base in 8 and 4 bits, or in FP8, as on a plain one? SmolLM2-135M, six domains.

    python launch/quickstart_inputs.py runs/quickstart-inputs     # the base, once
    python -m benchmarks.quantized_base     # adds to benchmarks/results/quantized_base.json what is missing there

Each run is a whole `srde-ds train`: a few steps of 2,048 positions with a warm start of the routers, and the loss of
the same held-out rows before the first step and after the last. Runs of a seed read the same rows in the same order,
so they are compared step by step. A run that has a record is not repeated.
Products are in `--dtype`, for all runs of a record; bitsandbytes multiplies in 8 bits whatever it is, and with FP8 all
that it does not multiply is in bfloat16.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from statistics import mean
from typing import Any

from benchmarks.learning.data import Inputs, prepare
from benchmarks.learning.first_look import difference
from benchmarks.learning.plan import Plan, late_loss
from benchmarks.tables import markdown, measured_on
from srde_ds.config import DOMAINS

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks/results/quantized_base.json"
QUANTIZATIONS = {"none": "plain", "int8": "8 bits", "nf4": "4 bits", "fp8": "FP8"}
ITEMS: dict[str, Any] = {"train_items": 100, "validation_items": 12, "test_items": 1}
"""of each domain"""
FLAGS: dict[str, Any] = {
    "batch_size": 2,
    "gradient_accumulation_steps": 2,
    "warm_start": "true",
    "warm_start_samples": 128,
    "domain_statistics_rows": 0,
    "save_steps": 0,
    "log_steps": 1000,
}


def run(inputs: Inputs, quantization: str, seed: int, steps: int, bf16: bool, folder: Path) -> dict[str, Any]:
    """Train, and return the losses."""
    shutil.rmtree(folder, ignore_errors=True)
    options = FLAGS | {
        "model_name": inputs.base,
        "pretokenized_dir": inputs.rows,
        "base_quantization": quantization,
        "bf16": bf16 or quantization == "fp8",
        "seed": seed,
        "max_steps": steps,
        "eval_steps": steps,
        "output_dir": folder,
    }
    flags = [text for name, value in options.items() for text in (f"--{name}", str(value))]
    started = time.monotonic()
    subprocess.run([sys.executable, "-m", "srde_ds.cli", "train", *flags], check=True, stdout=subprocess.DEVNULL)
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    start, end = lines[0]["held_out_at_start"], lines[-1]["held_out"]
    return {
        "quantization": quantization,
        "seed": seed,
        "steps": steps,
        "losses": [round(line["loss"], 5) for line in lines],
        "held_out_at_start": round(mean(start[domain] for domain in DOMAINS), 5),
        "held_out": round(mean(end[domain] for domain in DOMAINS), 5),
        "held_out_by_domain": {domain: round(end[domain], 5) for domain in DOMAINS},
        "seconds": round(time.monotonic() - started),
    }


def of(records: list[dict[str, Any]], quantization: str) -> dict[int, dict[str, Any]]:
    """The records of a form of the base, by seed."""
    return {record["seed"]: record for record in records if record["quantization"] == quantization}


def comparison(records: list[dict[str, Any]], quantization: str) -> dict[str, float]:
    """A quantised base against a plain one, in nats, over the seeds that both have: how much higher the held-out loss
    is at the start and the end, and the training loss of the second half of the steps (`late`), with half of its 95 %
    interval over these steps.
    """
    plain, other = of(records, "none"), of(records, quantization)
    seeds = sorted(plain.keys() & other.keys())
    late, half = difference(*((other[s]["losses"], plain[s]["losses"]) for s in seeds))
    return {
        "seeds": len(seeds),
        "at_start": mean(other[s]["held_out_at_start"] - plain[s]["held_out_at_start"] for s in seeds),
        "held_out": mean(other[s]["held_out"] - plain[s]["held_out"] for s in seeds),
        "late": late,
        "late_interval": half,
    }


def table(records: list[dict[str, Any]]) -> str:
    """Markdown: a line a run."""
    head = ["base", "seed", "held-out loss of the base", "after training", "training loss, second half", "seconds"]
    rows = [
        [
            QUANTIZATIONS[record["quantization"]],
            str(record["seed"]),
            f"{record['held_out_at_start']:.4f}",
            f"{record['held_out']:.4f}",
            f"{late_loss(record):.4f}",
            str(record["seconds"]),
        ]
        for record in sorted(
            records, key=lambda record: (list(QUANTIZATIONS).index(record["quantization"]), record["seed"])
        )
    ]
    return markdown(head, rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", type=Path, default=ROOT / "runs/quickstart-inputs/base")
    parser.add_argument("--folder", type=Path, default=ROOT / "runs/quantized_base", help="for data and runs")
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16")
    parser.add_argument("--forms", nargs="+", choices=QUANTIZATIONS, default=[*QUANTIZATIONS], help="of the base")
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args()
    budget = replace(Plan("medium", lambda _: None).budget, steps=options.steps, rows_per_step=4, **ITEMS)
    inputs = prepare(budget, 0, base=options.base, folder=options.folder)
    found = json.loads(options.results.read_text()) if options.results.exists() else {"runs": []}
    if found.setdefault("dtype", options.dtype) != options.dtype:
        parser.error(f"--dtype {options.dtype}: the runs in {options.results} are in {found['dtype']}")
    for seed in range(options.seeds):
        for quantization in options.forms:
            if seed in of(found["runs"], quantization):
                continue
            folder = options.folder / f"{quantization}-{seed}"
            record = run(inputs, quantization, seed, options.steps, options.dtype == "bfloat16", folder)
            packages = {name: version(name) for name in ("bitsandbytes", "accelerate")}
            found |= {"positions_a_step": 4 * budget.max_length, "flags": FLAGS, "items_a_domain": ITEMS}
            found["measured_on"] = measured_on() | {"packages": packages}
            found["runs"].append(record)
            options.results.write_text(json.dumps(found, indent=1) + "\n")
            print(f"{quantization}, seed {seed}: {record['held_out']} in {record['seconds']} s", flush=True)
    print(table(found["runs"]))


if __name__ == "__main__":
    main()
