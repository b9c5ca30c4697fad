"""How much of the activations a run must recompute in order to fit."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

from srde_ds.config import Config
from srde_ds.distributed.workload import Workload
from srde_ds.model.base_shape import BaseShape
from srde_ds.planner.memory import largest_memory
from srde_ds.utils.units import GIB

CHOICES: tuple[Literal["none", "selective", "full"], ...] = ("none", "selective", "full")
"""From the fastest to the one with the least memory."""


def settle_recompute(config: Config, shape: BaseShape, world_size: int, room: float) -> tuple[Config, str]:
    """Replace `recompute: auto` by the first of CHOICES with which a process fits into `room` bytes, else the last one.

    Returns:
        The config, and the reason for the choice; empty if the config leaves none.

    Raises:
        SRDEError: a bad `deepspeed_config`.
    """
    if config.model.recompute != "auto":
        return config, ""
    work = Workload.of(config, world_size)
    totals = {choice: largest_memory(replace(work, recomputed=choice), shape).total for choice in CHOICES}
    chosen = next((choice for choice in CHOICES if totals[choice] <= room), CHOICES[-1])
    needs = ", ".join(f"{choice} {total / GIB:.1f}" for choice, total in totals.items())
    why = f"recompute=auto: {chosen}, for {room / GIB:.1f} GiB (GiB at the peak: {needs})"
    return config.with_sections(model=replace(config.model, recompute=chosen)), why
