"""How much of the activations a run must recompute in order to fit."""

from __future__ import annotations

import os
from dataclasses import replace
from typing import Any

import torch

from srde_ds.config import Config
from srde_ds.model.base_shape import BaseShape, base_shape
from srde_ds.planner.memory import largest_memory
from srde_ds.utils.launcher import launched_rank, launched_world_size

CHOICES = ("none", "selective", "full")
"""From the fastest to the one with the least memory."""
USABLE = 0.9  # share of a GPU's memory; the rest goes to the driver, NCCL and fragmentation
GIB = 2**30


def least_recompute(config: Config, shape: BaseShape, world_size: int, room: float) -> tuple[str, str]:
    """The first of CHOICES with which a process fits into `room` bytes, else the last one; and the reason as text."""
    totals = {choice: largest_memory(with_recompute(config, choice), shape, world_size).total for choice in CHOICES}
    chosen = next((choice for choice in CHOICES if totals[choice] <= room), CHOICES[-1])
    needs = ", ".join(f"{choice} {totals[choice] / GIB:.1f}" for choice in CHOICES)
    return chosen, f"recompute=auto: {chosen}, for {room / GIB:.1f} GiB (GiB at the peak: {needs})"


def settle_recompute(config: Config) -> Config:
    """The config with `recompute: auto` replaced by the choice for this machine, which rank 0 prints.

    Raises:
        SRDEError: the base or the DeepSpeed configuration cannot be used.
    """
    if config.model.recompute != "auto":
        return config
    chosen, why = least_recompute(config, base_shape(config), launched_world_size(), available_memory())
    if launched_rank() == 0:
        print(why, flush=True)
    return with_recompute(config, chosen)


def available_memory() -> float:
    """Bytes for the tensors of a process, on its GPU or as an equal share of the host's memory."""
    if torch.cuda.is_available():
        return USABLE * min(torch.cuda.get_device_properties(n).total_memory for n in range(torch.cuda.device_count()))
    whole = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return USABLE * whole / int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def with_recompute(config: Config, choice: Any) -> Config:
    """The config with another choice of `recompute`."""
    return replace(config, model=replace(config.model, recompute=choice))
