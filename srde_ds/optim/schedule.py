"""Learning rates as a function of the step, and functions that set them in the optimizer."""

from __future__ import annotations

import math

from torch.optim import Optimizer

from srde_ds.config.schema import OptimizerConfig


def learning_rate_factor(step: int, max_steps: int, config: OptimizerConfig) -> float:
    """Share of the peak learning rate for the update after `step` finished updates, of 0 to max_steps - 1.

    The linear warm-up gives (step + 1) / warmup_steps and reaches the peak at step warmup_steps - 1 (without warm-up:
    at step 0). From there the rate falls to `min_lr_ratio` at step max_steps - 1: as a half cosine ("cosine"), linearly
    ("linear"), or linearly over the last decay_ratio * max_steps steps ("wsd": warm-up, stable, decay). The decay never
    starts before the peak. With "constant" the rate stays at the peak.

        >>> config = OptimizerConfig(lr_schedule="linear", warmup_steps=2, min_lr_ratio=0.0)
        >>> [learning_rate_factor(step, 4, config) for step in range(4)]
        [0.5, 1.0, 0.5, 0.0]
    """
    if step < config.warmup_steps:
        return (step + 1) / config.warmup_steps
    steps_after_peak = max_steps - 1 - max(config.warmup_steps - 1, 0)
    decay_steps = steps_after_peak
    if config.lr_schedule == "wsd":
        decay_steps = min(round(config.decay_ratio * max_steps), steps_after_peak)
    steps_left = max_steps - 1 - step
    if config.lr_schedule == "constant" or steps_left >= decay_steps:
        return 1.0
    height = steps_left / decay_steps
    if config.lr_schedule == "cosine":
        height = 0.5 * (1 - math.cos(math.pi * height))
    return config.min_lr_ratio + (1 - config.min_lr_ratio) * height


def set_learning_rates(optimizer: Optimizer, factor: float) -> None:
    """Set each group's learning rate to `factor` times its peak."""
    for group in optimizer.param_groups:
        group["lr"] = group["peak_lr"] * factor


def set_step(optimizer: Optimizer, step: int) -> None:
    """Set the number of the coming update: finished updates + 1. With 0 the optimizer only creates its state."""
    for group in optimizer.param_groups:
        group["step"] = step
