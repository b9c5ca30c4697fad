"""What an exchange of effective deltas would save against gathering atoms and importance, by the cost model.

    python benchmarks/owner_computes_share.py     # prints a table, writes benchmarks/results/owner_computes_share.json

Reference case: the shape of Ministral-3-14B, E 6, K 2, density 0.01, bf16, rows of 4,096 tokens, gradient
checkpointing, 16 micro-steps. With plain ZeRO-3 each process gathers (A + E)·n values of a layer, and their gradients are summed; with
an exchange, E·n effective deltas travel both ways, as `num_atoms: 0` does by itself.
"""

import json
from pathlib import Path
from typing import Any

from srde_ds.config import Config, resolve
from srde_ds.environment import environment
from srde_ds.parallel.shapes import base_shape
from srde_ds.parallel.traffic import step_traffic

BASE = Path(__file__).resolve().parent / "ministral_3_14b"
TRAINABLES = ("trainables gathered", "gradients", "persistent weights")
FREE = {"num_atoms": 0, "atom_mixing": "linear", "granularity": "element", "use_muon": False}


def run(**options: Any) -> Config:
    values = {"model_name": str(BASE), "max_length": 4096, "gradient_checkpointing": True}
    return resolve({}, values | options)


def received(config: Config, gpus: int, kinds: tuple[str, ...] | None = None) -> tuple[float, float]:
    """GB that a process gets in a micro-step: from all others, and from other nodes of eight."""
    traffic = [t for t in step_traffic(config, base_shape(config), gpus) if kinds is None or t.kind in kinds]
    scale = 1e-9 / config.training.gradient_accumulation_steps
    return sum(t.received for t in traffic) * scale, sum(t.between_nodes(8) for t in traffic) * scale


def main() -> None:
    rows = []
    print(f"{'case':<36}{'GPUs':>5}{'P':>4}{'GB':>8}{'saved':>8}{'share':>8}{'GB between nodes':>18}{'share':>8}")
    for gpus in (8, 64, 512):
        for size in (1, 8):
            for name, options in {
                "preset reference (16 atoms, element)": {"preset": "reference"},
                "16 atoms, neuron": {"num_atoms": 16},
                "default (free deltas, neuron)": {},
            }.items():
                config = run(expert_parallel_size=size, **options)
                total, between = received(config, gpus)
                now = received(config, gpus, TRAINABLES)
                free = run(expert_parallel_size=size, **options | (FREE if config.adapter.num_atoms else {}))
                then = received(free, gpus, TRAINABLES)
                saved, saved_between = now[0] - then[0], now[1] - then[1]
                row = {
                    "case": name,
                    "gpus": gpus,
                    "expert_parallel_size": size,
                    "gb_a_micro_step": total,
                    "gb_saved": saved,
                    "share": saved / total,
                    "gb_between_nodes": between,
                    "share_between_nodes": saved_between / between if between else None,
                }
                rows.append(row)
                share = f"{saved_between / between:8.1%}" if between else f"{'':>8}"
                print(f"{name:<36}{gpus:>5}{size:>4}{total:8.1f}{saved:8.1f}{saved / total:8.1%}{between:18.2f}{share}")
    kept = {key: environment()[key] for key in ("versions", "git_revision")}
    target = Path(__file__).resolve().parent / "results/owner_computes_share.json"
    target.write_text(json.dumps({"rows": rows, "environment": kept}, indent=1) + "\n")


if __name__ == "__main__":
    main()
