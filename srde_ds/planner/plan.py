"""Plans a run on given machines before anything is loaded."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from srde_ds.config import Config
from srde_ds.config.checks import check_groups
from srde_ds.distributed.expert_traffic import Traffic, choose_transport, transport_bytes
from srde_ds.distributed.workload import Workload
from srde_ds.errors import SRDEError
from srde_ds.model.base_shape import BaseShape, base_shape, check_whole
from srde_ds.planner.base_placement import compare_placements, settle_base_placement
from srde_ds.planner.flops import step_flops
from srde_ds.planner.machines import Machines
from srde_ds.planner.memory import Memory, memory
from srde_ds.planner.recompute import settle_recompute
from srde_ds.planner.traffic import step_traffic
from srde_ds.planner.trainables import trainable_values
from srde_ds.utils.files import output
from srde_ds.utils.units import GB, GIB

DAY = 86_400  # seconds
# They run on their own stream beside the computation, which waits for all other collectives.
OVERLAPPED = ("base gathered", "trainables gathered", "gradients")
MOST_ROWS = 4096  # the search for the largest micro-batch ends there


@dataclass(frozen=True)
class Times:
    """The time of an optimizer step, in seconds.

    Attributes:
        computation: time without any transfer.
        overlapped, exposed: time by part, for what runs beside the computation and for what it waits for.
    """

    computation: float
    overlapped: dict[str, float]
    exposed: dict[str, float]

    @property
    def step(self) -> float:
        """Seconds if transfers overlap with the computation as far as possible: a lower bound."""
        return max(self.computation, *self.overlapped.values()) + sum(self.exposed.values())

    @property
    def step_in_turn(self) -> float:
        """Seconds if nothing overlaps."""
        return self.computation + sum(self.overlapped.values()) + sum(self.exposed.values())

    @property
    def bound(self) -> str:
        """The slowest of the overlapped parts."""
        times = {"computation": self.computation} | self.overlapped
        return max(times, key=lambda name: times[name])


@dataclass(frozen=True)
class Plan:
    """The plan of a run on given machines.

    Attributes:
        densities: for a run with prunings, first step (from 0), density and memory of each part; else empty.
        traffic: traffic of a process in an optimizer step.
        moved: bytes that each transport would move; empty without expert parallelism.
        largest_micro_batch: number of rows that fit; 0: not even one.
        recompute_reason: the choice of `recompute: auto` and its reason; else empty.
        placement_reason: the base's placement, and what each one takes; empty with one process.
    """

    config: Config
    shape: BaseShape
    machines: Machines
    memory: Memory
    densities: list[tuple[int, float, Memory]]
    traffic: list[Traffic]
    transport: str
    moved: dict[str, float]
    flops: dict[str, float]
    times: Times
    largest_micro_batch: int
    recompute_reason: str = ""
    placement_reason: str = ""

    @property
    def tokens_per_step(self) -> int:
        """Number of tokens in an optimizer step on all processes, padding included."""
        training = self.config.training
        rows = training.batch_size * training.gradient_accumulation_steps * self.machines.processes
        return rows * self.config.data.max_length

    @property
    def dtype(self) -> str:
        """The training dtype, "bf16" or "fp32"."""
        return _dtype(self.config)

    @property
    def peak_tflops(self) -> float:
        """Dense TFLOP/s of a GPU in the training dtype."""
        return self.machines.peak(self.dtype)

    @property
    def tokens_per_day(self) -> float:
        """Number of tokens in 24 hours of training."""
        return self.tokens_per_step / self.times.step * DAY

    @property
    def days(self) -> float:
        """Days for all steps."""
        return self.times.step * self.config.training.max_steps / DAY

    @property
    def price_per_day(self) -> float | None:
        """Price of 24 hours of all GPUs; None if no price is given."""
        price = self.machines.hourly_price
        return None if price is None else price * 24 * self.machines.processes

    def links(self) -> dict[str, float]:
        """Bytes that a process receives in an optimizer step over each link."""
        between = sum(t.between_nodes(self.machines.gpus) for t in self.traffic)
        return {"within a node": sum(t.received for t in self.traffic) - between, "between nodes": between}

    def to_dict(self) -> dict[str, Any]:
        """The plan for JSON, in bytes, seconds and operations."""
        machines, gpus = self.machines, self.machines.gpus
        by_kind: dict[str, dict[str, float]] = {}
        for t in self.traffic:
            row = by_kind.setdefault(t.kind, {"received": 0.0, "between_nodes": 0.0})
            row["received"] += t.received
            row["between_nodes"] += t.between_nodes(gpus)
        price = self.price_per_day
        return {
            "config": self.config.to_dict(),
            "machines": asdict(machines) | {"peak_tflops": self.peak_tflops, "processes": machines.processes},
            "base_parameters": self.shape.parameters,
            "trainable_values": trainable_values(self.config.adapter, self.shape),
            "memory_bytes": {
                "states": self.memory.states,
                "moments": self.memory.moments,
                "peak_moment": self.memory.peak_moment,
                "peak": self.memory.total,
                "peak_by_density": [
                    {"first_step": first + 1, "density": density, "peak": of.total}
                    for first, density, of in self.densities
                ],
            },
            "largest_micro_batch": self.largest_micro_batch,
            "traffic_bytes_per_step": by_kind,
            "link_bytes_per_step": self.links(),
            "transport": self.transport,
            "transport_bytes_per_step": self.moved,
            "flops_per_step": self.flops,
            "seconds_per_step": {
                "compute": self.times.computation,
                "overlapped": self.times.overlapped,
                "exposed": self.times.exposed,
                "lower_bound": self.times.step,
                "nothing_overlapped": self.times.step_in_turn,
                "bound": self.times.bound,
            },
            "tokens_per_step": self.tokens_per_step,
            "tokens_per_day": self.tokens_per_day,
            "days": self.days,
            "price_per_day": price,
            "price": None if price is None else price * self.days,
        }


def make_plan(config: Config, machines: Machines, prunings: Sequence[tuple[int, float]] = ()) -> Plan:
    """Plan a run.

    Args:
        prunings: for a run with `initial_density`, each pruning's step and the density from then on.

    Raises:
        SRDEError: the base cannot be used, or the expert-parallel size does not divide the number of processes.
    """
    shape, processes, room = base_shape(config), machines.processes, machines.gpu_memory_gib * GIB
    check_whole(config.parallel, shape, processes)
    config, why = settle_recompute(config, shape, processes, room)
    config, placement = settle_base_placement(config, shape, processes, room)
    check_groups(config.parallel, processes)
    grouped = config.parallel.expert_parallel_size > 1
    work = Workload.of(config, processes)
    if not placement and processes > 1:
        placement = f"base_placement={config.parallel.base_placement} ({compare_placements(work, shape)})"
    traffic = step_traffic(work, shape)
    labelled = machines.labelled_share
    flops = step_flops(work, shape, labelled=labelled)
    starts = [(0, work.largest_density), *prunings] if prunings else []
    return Plan(
        config=config,
        shape=shape,
        machines=machines,
        memory=memory(work, shape, labelled=labelled),
        densities=[(first, density, memory(work.at(density), shape, labelled=labelled)) for first, density in starts],
        traffic=traffic,
        transport=choose_transport(work, shape.blocks) if grouped else "",
        moved=transport_bytes(work, shape.blocks) if grouped else {},
        flops=flops,
        times=step_times(machines, traffic, sum(flops.values()), _dtype(config)),
        largest_micro_batch=largest_micro_batch(work.at(work.largest_density), shape, machines),
        recompute_reason=why,
        placement_reason=placement,
    )


def _dtype(config: Config) -> str:
    return "bf16" if config.model.bf16 else "fp32"


def step_times(machines: Machines, traffic: list[Traffic], flops: float, dtype: str) -> Times:
    """Lower bounds of the times of a step's parts, with computation in `dtype`, see `Machines.peak`."""
    overlapped = {"links within a node": 0.0, "links between nodes": 0.0}
    exposed = dict(overlapped)
    for t in traffic:
        between = t.between_nodes(machines.gpus)
        times = overlapped if t.kind in OVERLAPPED else exposed
        times["links within a node"] += (t.received - between) / (machines.intra_node_gb_s * GB)
        # The processes of a node share its network.
        times["links between nodes"] += between * machines.gpus / (machines.inter_node_gbit_s * GB / 8)
    return Times(flops / (machines.peak(dtype) * 1e12 * machines.utilisation), overlapped, exposed)


def largest_micro_batch(work: Workload, shape: BaseShape, machines: Machines) -> int:
    """Number of rows of `max_length` tokens that fit into `gpu_memory_gib`; 0: not even one."""
    most = 1 if work.flash_attention else MOST_ROWS  # flash-attn keeps documents apart only in single rows

    def fits(rows: int) -> bool:
        total = memory(replace(work, batch_size=rows), shape, labelled=machines.labelled_share).total
        return total <= machines.gpu_memory_gib * GIB

    low, high = 0, 1
    while high <= most and fits(high):
        low, high = high, 2 * high
    high = min(high, most + 1)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def write_plan(plan: Plan, path: str | Path) -> None:
    """Write `Plan.to_dict` as JSON.

    Raises:
        SRDEError: the file cannot be written.
    """
    try:
        with output(Path(path)) as partial:
            partial.write_text(json.dumps(plan.to_dict(), indent=1) + "\n")
    except OSError as error:
        raise SRDEError(f"output_file={path}: cannot be written: {error.strerror}. Give a path in a folder.") from None
