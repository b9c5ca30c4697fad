"""Whether each process of a run can hold the whole frozen base."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

from srde_ds.config import Config
from srde_ds.distributed.workload import Workload
from srde_ds.errors import SRDEError
from srde_ds.model.base_shape import BaseShape
from srde_ds.planner.memory import largest_memory
from srde_ds.planner.traffic import step_traffic
from srde_ds.utils.units import GB, GIB


def settle_base_placement(config: Config, shape: BaseShape, world_size: int, room: float) -> tuple[Config, str]:
    """Replace `base_placement: auto` by `resident` if a process then fits into `room` bytes, else by `sharded`.

    Returns:
        The config, and the reason for the choice; empty if the config leaves none.

    Raises:
        SRDEError: a bad `deepspeed_config`.
    """
    if config.parallel.base_placement != "auto":
        return config, ""
    chosen: Literal["resident", "sharded"] = "resident"
    if world_size == 1:
        why = "since a process that is alone holds the whole base anyway"
    elif shape.packing is not None:
        why = "since a quantised base cannot be sharded"
    else:
        work = Workload.of(config, world_size)
        if largest_memory(replace(work, whole_base=True), shape).total > room:
            chosen = "sharded"
        why = f"for {room / GIB:.1f} GiB ({compare_placements(work, shape)})"
    settled = config.with_sections(parallel=replace(config.parallel, base_placement=chosen))
    return settled, f"base_placement=auto: {chosen}, {why}"


def compare_placements(work: Workload, shape: BaseShape) -> str:
    """What each placement takes, as text. A quantised base has only one."""
    if shape.packing is not None:
        return f"GiB at the peak: {largest_memory(work, shape).total / GIB:.1f}"
    resident, sharded = replace(work, whole_base=True), replace(work, whole_base=False)
    peaks = [largest_memory(placed, shape).total / GIB for placed in (resident, sharded)]
    gathered = sum(found.received for found in step_traffic(sharded, shape) if found.kind == "base gathered") / GB
    return (
        f"GiB at the peak: resident {peaks[0]:.1f}, sharded {peaks[1]:.1f}; sharded gathers {gathered:.2f} GB of the "
        "base in a step"
    )


def refuse_too_large(work: Workload, shape: BaseShape, room: float) -> None:
    """Raise an SRDEError if a process that holds the whole base does not fit into `room` bytes."""
    needed = largest_memory(work, shape)
    if needed.total > room:
        sharded = work.world_size > 1 and shape.packing is None
        base, elsewhere = needed.states["whole base"] / GIB, "--base_placement sharded, " if sharded else ""
        raise SRDEError(
            f"base_placement=resident: by the plan a process needs {needed.total / GIB:.1f} GiB at its peak, "
            f"{base:.1f} of them for the whole base, and there is room for {room / GIB:.1f}. Give {elsewhere}"
            "--recompute full, or a lower --batch_size or --max_length."
        )
