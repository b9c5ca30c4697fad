"""Learning rates as a function of the step, and functions that set them in the optimizer."""

from __future__ import annotations

import math
from typing import Literal

from torch.optim import Optimizer

from srde_ds.errors import SRDEError


def learning_rate_factor(
    step: int,
    *,
    schedule: Literal["cosine", "linear", "wsd", "constant"],
    max_steps: int,
    warmup_steps: int,
    decay_ratio: float,
    min_lr_ratio: float,
) -> float:
    """Share of the peak learning rate for the update after `step` finished updates.

    The linear warm-up gives (step + 1) / warmup_steps and reaches the peak at step warmup_steps - 1 (without warm-up:
    at step 0). From there the rate falls to `min_lr_ratio` at step max_steps - 1: as a half cosine ("cosine"), linearly
    ("linear"), or linearly over the last decay_ratio * max_steps steps ("wsd": warm-up, stable, decay). The decay never
    starts before the peak. With "constant" the rate stays at the peak.

    Raises:
        SRDEError: `step` is not one of 0 to max_steps - 1, or the warm-up leaves no step after it.
    """
    if warmup_steps >= max_steps and warmup_steps > 0:
        raise SRDEError(f"warmup_steps={warmup_steps}: must be less than max_steps={max_steps}.")
    if not 0 <= step < max_steps:
        raise SRDEError(f"step={step}: the schedule has steps 0 to {max_steps - 1}; raise max_steps={max_steps}.")
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    steps_after_peak = max_steps - 1 - max(warmup_steps - 1, 0)
    decay_steps = steps_after_peak
    if schedule == "wsd":
        decay_steps = min(round(decay_ratio * max_steps), steps_after_peak)
    steps_left = max_steps - 1 - step
    if schedule == "constant" or steps_left >= decay_steps:
        return 1.0
    height = steps_left / decay_steps
    if schedule == "cosine":
        height = 0.5 * (1 - math.cos(math.pi * height))
    return min_lr_ratio + (1 - min_lr_ratio) * height


def set_learning_rates(optimizer: Optimizer, factor: float) -> None:
    """Set each group's learning rate to `factor` times its peak."""
    for group in optimizer.param_groups:
        group["lr"] = group["peak_lr"] * factor


def set_step(optimizer: Optimizer, step: int) -> None:
    """Set the number of the coming update: finished updates + 1. With 0 the optimizer only creates its state."""
    for group in optimizer.param_groups:
        group["step"] = step
