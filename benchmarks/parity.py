"""Ten optimizer steps on several processes against the same ten on one.

    python -m benchmarks.parity    # writes benchmarks/results/parity.json and the table of docs/expert_parallelism.md

A random Llama (two layers, D 30, F 96) in float32 on CPU processes, three experts, GramMuon and AdamW, every loss on,
gradients clipped, twelve rows a step. Differences are the largest of any tensor, relative to the tensor's largest
value; of losses and gradient norms, the largest of the ten steps.
"""

import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.tables import ROOT, markdown, measured_on, put_into
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
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        inputs = make_inputs(folder)
        with Ranks(1, timeout=1800) as one:
            cut = {"batch_size": 4, "gradient_accumulation_steps": 3}
            alone = {case: run(inputs, folder / case, one, **cut, **options) for case, options in ADAPTERS.items()}
        # One group of processes at a time: each takes half a gigabyte.
        for processes in sorted({processes for processes, _ in SIZES}):
            with Ranks(processes, timeout=1800) as ranks:
                for adapter, size, transport in cases(processes):
                    there = folder / f"{adapter} {processes} {size} {transport}"
                    options = ADAPTERS[adapter] | ({"expert_transport": transport} if transport else {})
                    found = run(inputs, there, ranks, expert_parallel_size=size, **options)
                    differences = metric_differences(there, folder / adapter)
                    differences |= largest_differences(found, alone[adapter])
                    case = {"adapter": adapter, "processes": processes, "expert_parallel_size": size}
                    rows.append(case | {"transport": transport, "differences": differences})
                    write(rows)
                    shown = ", ".join(f"{key} {value:.1e}" for key, value in differences.items())
                    print(f"{adapter}, {processes} processes, P {size} {transport or ''}: {shown}", flush=True)


def cases(processes: int) -> Iterator[tuple[str, int, str | None]]:
    """Adapter, expert-parallel size and transport of the runs with so many processes."""
    for adapter in ADAPTERS:
        for size in (size for count, size in SIZES if count == processes):
            yield from ((adapter, size, transport) for transport in (("tokens", "deltas") if size > 1 else (None,)))


def write(rows: list[dict[str, Any]]) -> None:
    """After each run, so that a stopped benchmark leaves what it has seen."""
    kept = measured_on()
    target = ROOT / "benchmarks/results/parity.json"
    target.write_text(json.dumps({"rows": rows, "environment": kept}, indent=1) + "\n")
    put_into("expert_parallelism.md", "parity", table(rows))


if __name__ == "__main__":
    main()
