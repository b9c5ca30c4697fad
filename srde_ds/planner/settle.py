"""Settles the options of a run that depend on the memory at hand."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import torch

from srde_ds.config import Config
from srde_ds.distributed.workload import Workload
from srde_ds.model.base_shape import base_shape
from srde_ds.planner.base_placement import refuse_too_large, settle_base_placement
from srde_ds.planner.recompute import settle_recompute
from srde_ds.utils.launcher import launched_on_host, launched_rank, launched_world_size
from srde_ds.utils.together import Ranks

USABLE = 0.9  # share of a GPU's memory; the rest goes to the driver, NCCL and fragmentation


def settle(config: Config) -> Config:
    """The config with the choice for this machine in place of each `auto`; rank 0 prints the reasons.

    First comes `recompute`, so that holding the whole base never costs computation.

    Raises:
        SRDEError: `base_placement: resident` does not fit, or the base or the DeepSpeed configuration cannot be used.
    """
    settled, reasons = _settle(config, available_memory)
    if launched_rank() == 0:
        _tell(reasons)
    return settled


def settle_together(config: Config, ranks: Ranks) -> Config:
    """`settle` by the least memory of all ranks, so that hosts with unlike GPUs choose the same; a collective.

    Rank 0 prints the reasons if it has chosen otherwise before.
    """
    own = available_memory()
    least = min(ranks.gather(own))
    agreed, reasons = _settle(config, lambda: least)
    if ranks.rank == 0 and agreed != _settle(config, lambda: own)[0]:
        _tell(reasons)
    return agreed


def _tell(reasons: list[str]) -> None:
    for reason in reasons:
        print(reason, flush=True)


def _settle(config: Config, memory: Callable[[], float]) -> tuple[Config, list[str]]:
    asked, world_size = config.parallel.base_placement, launched_world_size()
    if config.model.recompute != "auto" and asked == "sharded":
        return config, []
    shape, room = base_shape(config), memory()
    config, recompute_reason = settle_recompute(config, shape, world_size, room)
    config, placement_reason = settle_base_placement(config, shape, world_size, room)
    if asked == "resident" or (asked == "auto" and shape.packing is not None and world_size > 1):
        refuse_too_large(Workload.of(config, world_size), shape, room)
    return config, list(filter(None, (recompute_reason, placement_reason)))


def available_memory() -> float:
    """Bytes for the tensors of a process, on the smallest GPU that the run uses on this host, or as an equal share of
    the host's memory, or of what its container or batch job may use of it."""
    if torch.cuda.is_available():  # a process takes the GPU with its LOCAL_RANK; others may drive a display
        used = range(min(torch.cuda.device_count(), launched_on_host()))
        return USABLE * min(torch.cuda.get_device_properties(number).total_memory for number in used)
    whole = min(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"), control_group_limit())
    return USABLE * whole / launched_on_host()


def control_group_limit(mounted: Path = Path("/sys/fs/cgroup"), own: Path = Path("/proc/self/cgroup")) -> float:
    """Bytes of memory that the container or batch job of this process may use; infinite without a limit.

    Args:
        mounted: where the control groups are.
        own: the groups of this process: lines of number, controllers (none in version 2) and path.
    """
    limits = [math.inf]
    for line in own.read_text().splitlines() if own.is_file() else ():
        _, controllers, path = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        root, name = (mounted / "memory", "memory.limit_in_bytes") if controllers else (mounted, "memory.max")
        inside = Path(path.lstrip("/"))
        # A container sees its own group as the root, and may be told a path outside of it.
        for group in (root, *(root / part for part in (inside, *inside.parents) if ".." not in part.parts)):
            with suppress(OSError, ValueError):  # no such file, or "max"
                limits.append(float(int((group / name).read_text())))
    return min(limits)
