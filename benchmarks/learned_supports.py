"""Learned supports on a problem with a known answer: how much of what can be gained do the kept candidates hold?

    python -m benchmarks.learned_supports      # prints the table, writes benchmarks/results/learned_supports.json

A regression on the deltas themselves: two experts, 40 candidate neurons each, of which 8 stay. Every candidate is worth
something: its target is a random vector of a length spaced evenly from 0.1 to 1. 300 steps, deltas by AdamW at 0.02,
temperature from 1 to 0.1, gradients with noise. The table gives the squared target of the kept candidates over that of
the best eight, mean over the seeds: for the two gradients that a score could get (`RelaxedTopK`), for pruning by the
size of deltas that were trained without a mask, and on average for a random choice.
"""

import json
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from benchmarks.tables import measured_on
from srde_ds.config import AdapterConfig
from srde_ds.model.deltas import DeltaBank, Storage, build_deltas
from srde_ds.model.supports import learned
from srde_ds.model.supports.learned import RelaxedTopK
from srde_ds.model.supports.pruning import kept_positions

HIDDEN, EXPERTS, CANDIDATES, KEEP, STEPS, SEEDS = 8, 2, 40, 8, 300, 8
CONFIG = AdapterConfig(num_experts=EXPERTS, support_scope="per_expert")


class ConstantThreshold:
    """The relaxation without what moves the threshold."""

    @staticmethod
    def apply(scores: Tensor, threshold: Tensor, temperature: float) -> Tensor:
        return ((scores - threshold) / temperature).sigmoid()


def trained(keep: int | None, target: Tensor, score_lr: float, noise: float, generator: torch.Generator) -> DeltaBank:
    storage = Storage(torch.float32, torch.device("cpu"))
    bank = build_deltas(CONFIG, hidden=HIDDEN, size=CANDIDATES, seed=0, layer=0, storage=storage, keep=keep)
    parameters = dict(bank.named_parameters())
    groups: list[dict[str, Any]] = [{"params": [parameters["free"]], "lr": 0.02}]
    if keep is not None:
        groups.append({"params": [parameters["scores"]], "lr": score_lr})
    optimizer = torch.optim.AdamW(groups, weight_decay=0.0)
    for step in range(STEPS):
        optimizer.zero_grad()
        deltas = bank(temperature=0.1 ** (step / STEPS), step=step)
        error = deltas - target - noise * torch.randn(target.shape, generator=generator)
        error.square().sum().backward()
        optimizer.step()
    return bank


def share(method: str, score_lr: float, noise: float, seed: int) -> float:
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.stack(
        [torch.linspace(0.1, 1, CANDIDATES)[torch.randperm(CANDIDATES, generator=generator)] for _ in range(EXPERTS)]
    )
    target = torch.randn(HIDDEN, EXPERTS, 3, CANDIDATES, generator=generator) * lengths[None, :, None]
    worth = target.square().sum((0, 2))
    best = worth.topk(KEEP).values.sum()
    if method == "at random":
        return float(worth.mean(1).sum() * KEEP / best)
    relaxation = ConstantThreshold if method == "constant threshold" else RelaxedTopK
    with patch.object(learned, "RelaxedTopK", relaxation):
        bank = trained(None if method == "pruned by size" else KEEP, target, score_lr, noise, generator)
    values = {name: parameter.detach() for name, parameter in bank.named_parameters()}
    kept = kept_positions(CONFIG, values, CANDIDATES, KEEP)
    return float(worth.gather(1, kept).sum() / best)


def main() -> None:
    torch.set_num_threads(1)
    rows = []
    for noise in (0.5, 3.0):
        for method in ("constant threshold", "moving threshold", "pruned by size", "at random"):
            for score_lr in (0.001, 0.005, 0.02) if method.endswith("threshold") else (0.0,):
                found = torch.tensor([share(method, score_lr, noise, seed) for seed in range(SEEDS)])
                row = {"noise": noise, "method": method, "score_lr": score_lr}
                row |= {"share": float(found.mean()), "standard_deviation": float(found.std())}
                rows.append(row)
                print(
                    f"noise {noise}  {method:20}{score_lr:7.3f}{row['share']:8.3f} +- {row['standard_deviation']:.3f}"
                )
    kept = measured_on()
    record = {"seeds": SEEDS, "rows": rows, "environment": kept}
    target = Path(__file__).resolve().parent / "results/learned_supports.json"
    target.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
