"""What each process mixing its own rows of atoms saves against gathering atoms and importance, by the cost model.

    python -m benchmarks.owner_computes_share     # prints a table, writes benchmarks/results/owner_computes_share.json

Reference case: the shape of Ministral-3-14B, E 6, K 2, density 0.01, bf16, rows of 4,096 tokens, checkpointed layers,
16 micro-steps. With plain ZeRO-3 each process gathers (A + E)·n values of a layer, and their gradients are summed; with
the exchange, the rows of E·n effective deltas travel both ways.
"""

import json
from pathlib import Path
from typing import Any

from srde_ds.config import resolve
from srde_ds.distributed.workload import Workload
from srde_ds.model.base_shape import base_shape
from srde_ds.planner.traffic import step_traffic
from srde_ds.utils.environment import environment

BASE = Path(__file__).resolve().parent / "ministral_3_14b"
CASES: dict[str, dict[str, Any]] = {
    "preset reference (16 atoms, element)": {"preset": "reference"},
    "16 atoms, neuron": {"num_atoms": 16},
    "default (free deltas, quarters of neurons)": {},
}


def received(gpus: int, **options: Any) -> tuple[float, float]:
    """GB that a process gets in a micro-step: from all others, and from other nodes of eight."""
    values = {"model_name": str(BASE), "max_length": 4096, "gradient_checkpointing": True}
    config = resolve({}, values | options)
    traffic = step_traffic(Workload.of(config, gpus), base_shape(config))
    scale = 1e-9 / config.training.gradient_accumulation_steps
    return sum(t.received for t in traffic) * scale, sum(t.between_nodes(8) for t in traffic) * scale


def main() -> None:
    rows = []
    print(
        f"{'GB a micro-step':<38}{'GPUs':>5}{'P':>4}{'gathered':>10}{'exchanged':>10}{'saved':>8}{'between nodes':>15}"
    )
    for gpus in (8, 64, 512):
        for size in (1, 8):
            for case, options in CASES.items():
                gathered = received(gpus, expert_parallel_size=size, owner_computes=False, **options)
                exchanged = received(gpus, expert_parallel_size=size, **options)
                saved, saved_between = (
                    1 - new / old if old else 0 for old, new in zip(gathered, exchanged, strict=True)
                )
                rows.append(
                    {
                        "case": case,
                        "gpus": gpus,
                        "expert_parallel_size": size,
                        "gathered_gb": gathered[0],
                        "exchanged_gb": exchanged[0],
                        "saved_share": saved,
                        "gathered_gb_between_nodes": gathered[1],
                        "exchanged_gb_between_nodes": exchanged[1],
                    }
                )
                print(
                    f"{case:<38}{gpus:>5}{size:>4}{gathered[0]:>10.1f}{exchanged[0]:>10.1f}{saved:>8.1%}{saved_between:>15.1%}"
                )
    kept = {key: environment()[key] for key in ("versions", "git_revision")}
    target = Path(__file__).resolve().parent / "results/owner_computes_share.json"
    target.write_text(json.dumps({"rows": rows, "environment": kept}, indent=1) + "\n")


if __name__ == "__main__":
    main()
