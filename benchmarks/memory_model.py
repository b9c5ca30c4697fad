"""The memory that `srde-ds plan` predicts against what torch's allocator hands out in a training step.

    python launch/quickstart_inputs.py runs/quickstart-inputs      # the base, once; or --base FOLDER
    python -m benchmarks.memory_model                              # a table, and benchmarks/results/memory_model.json

SmolLM2-135M on CPU processes, two micro-steps of rows of 256 tokens. Each case runs in fresh processes; its second step
is watched, tensors that were there before it included. Bytes are those of rank 0. The share of labelled positions, on
which the logits depend, is the measured one.
"""

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.tables import measured_on
from srde_ds.config import resolve
from srde_ds.data.build.from_files import RowsOfFiles, build_dataset
from srde_ds.data.tokenizer import load_tokenizer
from srde_ds.distributed.workload import Workload
from srde_ds.model.base_shape import base_shape
from srde_ds.planner.memory import memory
from tests.data_helpers import sums, write_jsonl
from tests.distributed.harness import run_distributed
from tests.distributed.measures import Allocated, allocated, train_measuring

MIB = 2**20
LENGTH = 256
DOMAINS = ["red", "green"]
CASES: list[tuple[int, dict[str, Any]]] = [
    (1, {}),
    (1, {"batch_size": 4}),
    (1, {"batch_size": 4, "gradient_checkpointing": True}),
    (1, {"batch_size": 4, "bf16": True}),
    (1, {"granularity": "element", "num_atoms": 16}),
    (2, {}),
    (2, {"batch_size": 4}),
    (2, {"batch_size": 4, "gradient_checkpointing": True}),
    (2, {"batch_size": 4, "gradient_checkpointing": True, "base_placement": "resident"}),
    (2, {"batch_size": 4, "num_atoms": 16}),
    (2, {"batch_size": 4, "expert_parallel_size": 2, "expert_transport": "tokens"}),
]


def watched(flags: dict[str, Any]) -> Allocated:
    found: Allocated = train_measuring(flags, 2, allocated)
    return found


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--base", default="runs/quickstart-inputs/base", help="folder of SmolLM2-135M")
    base = parser.parse_args().base
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "data"
        build_dataset(
            RowsOfFiles(
                write_jsonl(Path(folder) / "train.jsonl", [r for d in DOMAINS for r in sums(d, range(600))]),
                None,
                DOMAINS,
                max_length=LENGTH,
                too_long="error",
                seed=0,
            ),
            data,
            load_tokenizer(base),
        )
        for number, (processes, changes) in enumerate(CASES):
            flags = {
                "model_name": base,
                "bf16": False,
                "pretokenized_dir": str(data),
                "domains": DOMAINS,
                "max_length": LENGTH,
                "output_dir": str(Path(folder) / f"run-{number}"),
                "max_steps": 2,
                "warmup_steps": 0,
                "gradient_accumulation_steps": 2,
                "save_steps": 0,
                "eval_steps": 0,
                "log_steps": 100,
            } | changes
            found = run_distributed(watched, processes, flags, timeout=1800)[0]
            config = resolve({}, flags)
            predicted = memory(Workload.of(config, processes), base_shape(config), labelled=max(found.labelled))
            measured = max(found.peaks.values())
            row = {
                "processes": processes,
                "options": changes,
                "labelled_share": max(found.labelled),
                "predicted_mib": predicted.total / MIB,
                "measured_mib": measured / MIB,
                "error": predicted.total / measured - 1,
                "predicted_states_mib": sum(predicted.states.values()) / MIB,
                "measured_states_mib": found.start / MIB,
                "predicted_moment": predicted.peak_moment,
                "measured_moment": max(found.peaks, key=lambda part: found.peaks[part]),
                "measured_mib_by_part": {part: size / MIB for part, size in found.peaks.items()},
            }
            rows.append(row)
            print(
                f"{processes} {changes}: predicted {row['predicted_mib']:.0f}, measured {row['measured_mib']:.0f} MiB "
                f"({row['error']:+.1%}); states {row['predicted_states_mib']:.0f}, {row['measured_states_mib']:.0f}; "
                f"{row['predicted_moment']}, {row['measured_moment']}",
                flush=True,
            )
    kept = measured_on()
    target = Path(__file__).resolve().parent / "results/memory_model.json"
    target.write_text(json.dumps({"cases": rows, "environment": kept}, indent=1) + "\n")


if __name__ == "__main__":
    main()
