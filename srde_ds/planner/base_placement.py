"""Whether each process of a run can hold the whole frozen base."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

from srde_ds.config import Config
from srde_ds.errors import SRDEError
from srde_ds.model.base_shape import BaseShape
from srde_ds.planner.memory import largest_memory
from srde_ds.planner.recompute import GIB
from srde_ds.planner.traffic import step_traffic

GB = 1e9


def settle_base_placement(config: Config, shape: BaseShape, world_size: int, room: float) -> tuple[Config, str]:
    """Replace `base_placement: auto` by `resident` if a process then fits into `room` bytes, else by `sharded`.

    Returns:
        The config, and the reason for the choice; empty if the config leaves none.
    """
    if config.parallel.base_placement != "auto":
        return config, ""
    resident = with_base_placement(config, "resident")
    if world_size == 1:
        return resident, "base_placement=auto: resident, since a process that is alone holds the whole base anyway"
    if shape.packing is not None:
        return resident, "base_placement=auto: resident, since a quantised base cannot be sharded"
    fits = largest_memory(resident, shape, world_size).total <= room
    chosen = resident if fits else with_base_placement(config, "sharded")
    why = f"for {room / GIB:.1f} GiB ({compare_placements(config, shape, world_size)})"
    return chosen, f"base_placement=auto: {chosen.parallel.base_placement}, {why}"


def compare_placements(config: Config, shape: BaseShape, world_size: int) -> str:
    """What each placement takes, as text. A quantised base has only one."""
    if shape.packing is not None:
        return f"GiB at the peak: {largest_memory(config, shape, world_size).total / GIB:.1f}"
    resident, sharded = with_base_placement(config, "resident"), with_base_placement(config, "sharded")
    peaks = [largest_memory(placed, shape, world_size).total / GIB for placed in (resident, sharded)]
    traffic = step_traffic(sharded, shape, world_size)
    gathered = sum(found.received for found in traffic if found.kind == "base gathered") / GB
    return (
        f"GiB at the peak: resident {peaks[0]:.1f}, sharded {peaks[1]:.1f}; sharded gathers {gathered:.2f} GB of the "
        "base in a step"
    )


def refuse_too_large(config: Config, shape: BaseShape, world_size: int, room: float) -> None:
    """Raise an SRDEError if a process that holds the whole base does not fit into `room` bytes."""
    needed = largest_memory(config, shape, world_size)
    if needed.total > room:
        sharded = world_size > 1 and shape.packing is None
        base, elsewhere = needed.states["whole base"] / GIB, "--base_placement sharded, " if sharded else ""
        raise SRDEError(
            f"base_placement=resident: by the plan a process needs {needed.total / GIB:.1f} GiB at its peak, "
            f"{base:.1f} of them for the whole base, and there is room for {room / GIB:.1f}. Give {elsewhere}"
            "--recompute full, or a lower --batch_size or --max_length."
        )


def with_base_placement(config: Config, choice: Literal["resident", "sharded"]) -> Config:
    """The config with another choice of `base_placement`."""
    return replace(config, parallel=replace(config.parallel, base_placement=choice))
