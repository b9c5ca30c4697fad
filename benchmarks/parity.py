"""Ten optimizer steps on several processes against the same ten on one.

    python -m benchmarks.parity    # writes benchmarks/results/parity.json and the table of docs/expert_parallelism.md

A random Llama (two layers, D 30, F 96) in float32 on CPU processes, three experts, GramMuon and AdamW, every loss on,
gradients clipped, twelve rows a step. Differences are the largest of any tensor, relative to the tensor's largest
value; of losses and gradient norms, the largest of the ten steps.
"""

import json
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from benchmarks.tables import ROOT, markdown, put_into
from srde_ds.environment import environment
from tests.distributed.harness import Ranks
from tests.distributed.training_helpers import Inputs, make_inputs
from tests.distributed.update_trace import Whole, largest_differences, metric_differences, train_tracing, whole

ROWS, STEPS = 12, 10
SIZES = [(2, 1), (2, 2), (4, 2), (4, 4), (3, 3), (6, 3)]
ADAPTERS: dict[str, dict[str, Any]] = {
    "free deltas": {},
    "4 atoms": {"num_atoms": 4},
    "4 atoms, gathered": {"num_atoms": 4, "owner_computes": False},
}


def run(inputs: Inputs, folder: Path, ranks: Ranks, **changes: Any) -> Whole:
    cut = {"batch_size": 1, "gradient_accumulation_steps": ROWS // ranks.world_size}
    flags = inputs.flags(folder, **{"max_steps": STEPS, "save_steps": 0, "eval_steps": 0} | cut | changes)
    return whole(ranks(train_tracing, flags, (1, STEPS)))


def table(rows: list[dict[str, Any]]) -> str:
    kinds = list(rows[0]["differences"])
    body = [
        [row["adapter"], f"({row['processes']}, {row['expert_parallel_size']})", row["transport"] or ""]
        + [f"{row['differences'][kind]:.0e}" for kind in kinds]
        for row in rows
    ]
    return markdown(["Deltas", "(W, P)", "Transport", *kinds], body)


def main() -> None:
    rows = []
    with tempfile.TemporaryDirectory() as name, ExitStack() as stack:
        folder = Path(name)
        sizes = {1} | {processes for processes, _ in SIZES}
        ranks = {size: stack.enter_context(Ranks(size, timeout=1800)) for size in sizes}
        inputs = make_inputs(folder)
        for adapter, options in ADAPTERS.items():
            alone = folder / adapter / "alone"
            expected = run(inputs, alone, ranks[1], batch_size=4, gradient_accumulation_steps=3, **options)
            for processes, size in SIZES:
                for transport in ("tokens", "deltas") if size > 1 else ("",):
                    there = folder / adapter / f"{processes}-{size}{transport}"
                    chosen = {"expert_transport": transport} if transport else {}
                    found = run(inputs, there, ranks[processes], expert_parallel_size=size, **chosen, **options)
                    differences = metric_differences(there, alone) | largest_differences(found, expected)
                    case = {"adapter": adapter, "processes": processes, "expert_parallel_size": size}
                    rows.append(case | {"transport": transport or None, "differences": differences})
                    shown = ", ".join(f"{key} {value:.1e}" for key, value in differences.items())
                    print(f"{adapter}, {processes} processes, P {size} {transport}: {shown}", flush=True)
    kept = {key: environment()[key] for key in ("versions", "python", "machine", "git_revision")}
    target = ROOT / "benchmarks/results/parity.json"
    target.write_text(json.dumps({"rows": rows, "environment": kept}, indent=1) + "\n")
    put_into("expert_parallelism.md", "parity", table(rows))


if __name__ == "__main__":
    main()
