"""Learning-rate factors by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from srde_ds.config import OptimizerConfig
from srde_ds.optim.gram_muon import GramMuonAdamW
from srde_ds.optim.schedule import learning_rate_factor, set_learning_rates, set_step

# Eight steps, warm-up over four: the peak is at step 3, and four equal parts of decay lead to step 7.
WARM = [0.25, 0.5, 0.75, 1.0]


def factors(schedule: Any, max_steps: int = 8, warmup: int = 4, decay: float = 0.2, floor: float = 0.0) -> list[float]:
    config = OptimizerConfig(lr_schedule=schedule, warmup_steps=warmup, decay_ratio=decay, min_lr_ratio=floor)
    return [learning_rate_factor(step, max_steps, config) for step in range(max_steps)]


@pytest.mark.parametrize(
    ("actual", "expected"),
    [
        (factors("constant"), [*WARM, 1, 1, 1, 1]),
        (factors("linear"), [*WARM, 0.75, 0.5, 0.25, 0]),
        (factors("linear", floor=0.2), [*WARM, 0.8, 0.6, 0.4, 0.2]),
        # (1 + cos(pi * progress)) / 2 at a quarter, half and three quarters.
        (factors("cosine"), [*WARM, 0.8535533906, 0.5, 0.1464466094, 0]),
        (factors("cosine", floor=0.5), [*WARM, 0.9267766953, 0.75, 0.5732233047, 0.5]),
        (factors("wsd", max_steps=10), [*WARM, 1, 1, 1, 1, 0.5, 0]),
        (factors("wsd", max_steps=10, floor=0.5), [*WARM, 1, 1, 1, 1, 0.75, 0.5]),
        # A decay over all steps starts at the peak; one over none leaves the rate at the peak.
        (factors("wsd", decay=1.0), [*WARM, 0.75, 0.5, 0.25, 0]),
        (factors("wsd", max_steps=6, decay=0.0), [*WARM, 1, 1]),
        # Without warm-up, and with one warm-up step, the first step is the peak.
        (factors("linear", max_steps=5, warmup=0), [1, 0.75, 0.5, 0.25, 0]),
        (factors("linear", max_steps=5, warmup=1), [1, 0.75, 0.5, 0.25, 0]),
        (factors("cosine", max_steps=3, warmup=2), [0.5, 1, 0]),
        (factors("cosine", max_steps=1, warmup=0), [1]),
    ],
)
def test_factors(actual: list[float], expected: list[float]) -> None:
    assert actual == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("schedule", ["cosine", "linear", "wsd"])
def test_last_step_is_exactly_the_floor(schedule: str) -> None:
    assert factors(schedule, max_steps=1000, warmup=100, floor=0.1)[-1] == 0.1


def test_setters_reach_every_group() -> None:
    groups = [
        {"params": [nn.Parameter(torch.ones(2))], "rule": "adamw", "lr": 1.0, "peak_lr": peak} for peak in (0.02, 0.5)
    ]
    optimizer = GramMuonAdamW(groups)
    set_learning_rates(optimizer, 0.5)
    set_learning_rates(optimizer, 0.1)
    set_step(optimizer, 7)
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([0.002, 0.05])
    assert [group["step"] for group in optimizer.param_groups] == [7, 7]
