"""GramMuon against torch.optim.Muon: time of an update, and error of the update against float64.

    python -m benchmarks.gram_muon      # prints both tables, writes benchmarks/results/gram_muon.json

Time: the quick start's delta matrices, [576, 18, 15] in 30 layers, one thread, median of nine updates, both optimizers
in turn. Error: relative, largest of eight random matrices [576, 15] with singular values spaced evenly by ratio.
"""

import json
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

from benchmarks.tables import measured_on
from srde_ds.optim.gram_muon import GramMuonAdamW
from srde_ds.optim.reference import newton_schulz

ROWS, BATCH, COLS, LAYERS, REPEATS = 576, 18, 15, 30, 9


def matrices(count: int, condition: float, seed: int = 0) -> Tensor:
    """[count, ROWS, COLS] with the given condition number."""
    generator = torch.Generator().manual_seed(seed)
    left, _ = torch.linalg.qr(torch.randn(count, ROWS, COLS, generator=generator, dtype=torch.float64))
    right, _ = torch.linalg.qr(torch.randn(count, COLS, COLS, generator=generator, dtype=torch.float64))
    values = torch.logspace(0, -1, COLS, base=condition, dtype=torch.float64)
    return (left * values) @ right.mT


def gram_optimizer(gradients: list[Tensor]) -> tuple[torch.optim.Optimizer, list[Tensor]]:
    """GramMuon without momentum or decay on one [rows, batch, cols] parameter a gradient."""
    parameters = [torch.zeros_like(g, requires_grad=True) for g in gradients]
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad = gradient
    group = {"params": parameters, "rule": "muon", "lr": 1.0, "momentum": 0.0, "step": 1}
    return GramMuonAdamW([group]), parameters


def torch_optimizer(gradients: list[Tensor]) -> tuple[torch.optim.Optimizer, list[Tensor]]:
    """The same for torch.optim.Muon, which takes matrices."""
    parameters = [torch.zeros_like(g, requires_grad=True) for g in gradients]
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad = gradient
    rate: dict[str, Any] = {"lr": 1.0, "momentum": 0.0, "weight_decay": 0.0, "adjust_lr_fn": "match_rms_adamw"}
    return torch.optim.Muon(parameters, **rate), parameters


def errors(condition: float) -> dict[str, float]:
    x = matrices(8, condition)
    exact = -0.2 * ROWS**0.5 * newton_schulz(x)
    gram, (ours,) = gram_optimizer([x.float().transpose(0, 1).contiguous()])
    gram.step()
    plain, theirs = torch_optimizer(list(x.float()))
    plain.step()

    def largest(found: Tensor) -> float:
        return float(((found.double() - exact).flatten(1).norm(dim=1) / exact.flatten(1).norm(dim=1)).max())

    return {"gram": largest(ours.detach().transpose(0, 1)), "torch": largest(torch.stack(theirs).detach())}


def seconds() -> dict[str, float]:
    gradients = [torch.randn(ROWS, BATCH, COLS) for _ in range(LAYERS)]
    optimizers = {
        "gram": gram_optimizer(gradients)[0],
        "torch": torch_optimizer([m.contiguous() for g in gradients for m in g.unbind(1)])[0],
    }
    timings: dict[str, list[float]] = {name: [] for name in optimizers}
    for _ in range(REPEATS + 1):
        for name, optimizer in optimizers.items():
            started = time.perf_counter()
            optimizer.step()
            timings[name].append(time.perf_counter() - started)
    return {name: median(values[1:]) for name, values in timings.items()}  # the first one warms up


def main() -> None:
    torch.set_num_threads(1)
    times = seconds()
    print(f"update: gram {1e3 * times['gram']:.0f} ms, torch {1e3 * times['torch']:.0f} ms")
    table = {f"1e{power}": errors(10.0**power) for power in range(7)}
    for condition, row in table.items():
        print(f"condition {condition}: gram {row['gram']:.1e}, torch {row['torch']:.1e}")
    kept = measured_on()
    record = {"seconds": times, "torch_over_gram": times["torch"] / times["gram"], "error": table, "environment": kept}
    target = Path(__file__).resolve().parent / "results/gram_muon.json"
    target.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
