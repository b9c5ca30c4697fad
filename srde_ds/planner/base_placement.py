"""Whether each process of a run can hold the whole frozen base."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from srde_ds.config import Config
from srde_ds.errors import SRDEError
from srde_ds.model.base_shape import BaseShape, base_shape
from srde_ds.planner.memory import largest_memory
from srde_ds.planner.recompute import GIB, available_memory
from srde_ds.planner.traffic import step_traffic
from srde_ds.utils.launcher import launched_rank, launched_world_size

GB = 1e9


def choose_base_placement(config: Config, shape: BaseShape, world_size: int, room: float) -> tuple[str, str]:
    """`resident` if a process that holds the whole base fits into `room` bytes, else `sharded`; the reason as text."""
    if world_size == 1:
        return "resident", "base_placement=auto: resident, since a process that is alone holds the whole base anyway"
    if shape.packing is not None:
        return "resident", "base_placement=auto: resident, since a quantised base cannot be sharded"
    total = largest_memory(with_base_placement(config, "resident"), shape, world_size).total
    chosen = "resident" if total <= room else "sharded"
    facts = compare_placements(config, shape, world_size)
    return chosen, f"base_placement=auto: {chosen}, for {room / GIB:.1f} GiB ({facts})"


def compare_placements(config: Config, shape: BaseShape, world_size: int) -> str:
    """What each placement takes, as text. A quantised base has only one."""
    if shape.packing is not None:
        return f"GiB at the peak: {largest_memory(config, shape, world_size).total / GIB:.1f}"
    sharded = with_base_placement(config, "sharded")
    peaks = [
        f"{choice} {largest_memory(with_base_placement(config, choice), shape, world_size).total / GIB:.1f}"
        for choice in ("resident", "sharded")
    ]
    traffic = step_traffic(sharded, shape, world_size)
    gathered = sum(found.received for found in traffic if found.kind == "base gathered") / GB
    return f"GiB at the peak: {', '.join(peaks)}; sharded gathers {gathered:.2f} GB of the base in a step"


def settle_base_placement(config: Config) -> Config:
    """The config with `base_placement: auto` replaced by the choice for this machine, which rank 0 prints.

    Raises:
        SRDEError: `resident` does not fit into this machine's memory, or the base or the DeepSpeed configuration
            cannot be used.
    """
    asked, world_size = config.parallel.base_placement, launched_world_size()
    if asked == "sharded":
        return config
    shape, room = base_shape(config), available_memory()
    if asked == "auto":
        chosen, why = choose_base_placement(config, shape, world_size, room)
        if launched_rank() == 0:
            print(why, flush=True)
        config = with_base_placement(config, chosen)
    if asked == "resident" or (shape.packing is not None and world_size > 1):
        refuse_too_large(config, shape, world_size, room)
    return config


def refuse_too_large(config: Config, shape: BaseShape, world_size: int, room: float) -> None:
    """Raise an SRDEError if a process does not fit into `room` bytes."""
    needed = largest_memory(config, shape, world_size)
    if needed.total > room:
        sharded = world_size > 1 and shape.packing is None
        base, elsewhere = needed.states["whole base"] / GIB, "--base_placement sharded, " if sharded else ""
        raise SRDEError(
            f"base_placement=resident: by the plan a process needs {needed.total / GIB:.1f} GiB at its peak, "
            f"{base:.1f} of them for the whole base, and there is room for {room / GIB:.1f}. Give {elsewhere}"
            "--recompute full, or a lower --batch_size or --max_length."
        )


def with_base_placement(config: Config, choice: Any) -> Config:
    """The config with another choice of `base_placement`."""
    return replace(config, parallel=replace(config.parallel, base_placement=choice))
