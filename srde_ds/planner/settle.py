"""Settles the options of a run that depend on the memory at hand."""

from __future__ import annotations

import os

import torch

from srde_ds.config import Config
from srde_ds.distributed.workload import Workload
from srde_ds.model.base_shape import base_shape
from srde_ds.planner.base_placement import refuse_too_large, settle_base_placement
from srde_ds.planner.recompute import settle_recompute
from srde_ds.utils.launcher import launched_rank, launched_world_size

USABLE = 0.9  # share of a GPU's memory; the rest goes to the driver, NCCL and fragmentation


def settle(config: Config) -> Config:
    """The config with the choice for this machine in place of each `auto`; rank 0 prints the reasons.

    First comes `recompute`, so that holding the whole base never costs computation.

    Raises:
        SRDEError: `base_placement: resident` does not fit, or the base or the DeepSpeed configuration cannot be used.
    """
    asked, world_size = config.parallel.base_placement, launched_world_size()
    if config.model.recompute != "auto" and asked == "sharded":
        return config
    shape, room = base_shape(config), available_memory()
    config, recompute_reason = settle_recompute(config, shape, world_size, room)
    config, placement_reason = settle_base_placement(config, shape, world_size, room)
    for reason in filter(None, (recompute_reason, placement_reason)):
        if launched_rank() == 0:
            print(reason, flush=True)
    if asked == "resident" or (asked == "auto" and shape.packing is not None and world_size > 1):
        refuse_too_large(Workload.of(config, world_size), shape, room)
    return config


def available_memory() -> float:
    """Bytes for the tensors of a process, on its GPU or as an equal share of the host's memory."""
    if torch.cuda.is_available():
        return USABLE * min(torch.cuda.get_device_properties(n).total_memory for n in range(torch.cuda.device_count()))
    whole = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return USABLE * whole / int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
