"""A plan, and the output of `--dry_run`, as aligned text."""

from __future__ import annotations

from collections import Counter

from srde_ds.config import Config
from srde_ds.distributed.workload import Workload
from srde_ds.model.base_shape import BaseShape
from srde_ds.planner.memory import memory
from srde_ds.planner.plan import Plan
from srde_ds.planner.trainables import trainable_values
from srde_ds.utils.tables import aligned_table
from srde_ds.utils.units import GB, GIB


def describe_plan(plan: Plan) -> str:
    """The plan as aligned text."""
    config, machines, shape = plan.config, plan.machines, plan.shape
    training, gpus = config.training, plan.machines.gpus
    lines = [
        f"{config.model.model_name}: {shape.parameters:,} frozen values, "
        f"{sum(trainable_values(config.adapter, shape).values()):,} trained",
        f"{machines.nodes} x {gpus} GPUs, {training.batch_size} x {training.gradient_accumulation_steps} rows of "
        f"{config.data.max_length} tokens per process: {plan.tokens_per_step:,} tokens per step",
        "",
        *(reason for reason in (plan.recompute_reason, plan.placement_reason) if reason),
        *_memory_lines(plan),
        "",
    ]
    received: Counter[str] = Counter()
    between: Counter[str] = Counter()
    for t in plan.traffic:
        for kind in (t.kind, "sum"):
            received[kind] += t.received  # type: ignore[assignment]
            between[kind] += t.between_nodes(gpus)  # type: ignore[assignment]
    kinds = sorted(received, key=lambda kind: (kind == "sum", -received[kind]))
    rows = [[kind, f"{received[kind] / GB:.2f}", f"{between[kind] / GB:.2f}"] for kind in kinds]
    lines.append(aligned_table([["received by a GPU per step, GB", "all", "from other nodes"], *rows], right=1))
    if plan.moved:
        moved = ", ".join(f"{name} {bytes_ / GB:.2f} GB" for name, bytes_ in plan.moved.items())
        why = "fewest bytes" if config.parallel.expert_transport == "auto" else "as asked"
        lines.append(f"expert transport: {plan.transport} ({why}; {moved})")
    times = plan.times
    assumed = f" (H100 SXM, {plan.dtype})" if machines.peak_tflops is None else ""
    rows = [
        ["seconds per step, lower bounds", "overlapped", "waited for"],
        ["computation", "", f"{times.computation:.3f}"],
    ]
    rows += [[link, f"{times.overlapped[link]:.3f}", f"{times.exposed[link]:.3f}"] for link in times.overlapped]
    lines += [
        "",
        aligned_table(rows, right=1),
        f"step: {times.step:.3f} s, bound by {times.bound}; {times.step_in_turn:.3f} s if nothing overlaps",
        f"tokens per day: {plan.tokens_per_day:,.0f} at {machines.utilisation:.0%} of {plan.peak_tflops:g} "
        f"TFLOP/s{assumed}; {training.max_steps} steps: {plan.days:.2f} days",
    ]
    price = plan.price_per_day
    if price is not None:
        lines.append(f"price: {price:,.2f} per day, {price * plan.days:,.2f} for {training.max_steps} steps")
    return "\n".join(lines)


def _memory_lines(plan: Plan) -> list[str]:
    peak, machines, config, shape = plan.memory, plan.machines, plan.config, plan.shape
    lines = [f"GiB of a GPU at its peak ({peak.peak_moment})"]
    rows = [[kind, f"{size / GIB:.2f}", ""] for kind, size in peak.peak.items() if size]
    rows.append(["sum", f"{peak.total / GIB:.2f}", f"of {machines.gpu_memory_gib:g}"])
    for first, density, memory_then in plan.densities:
        rows.append([f"sum from step {first + 1} on, density {density:.3g}", f"{memory_then.total / GIB:.2f}", ""])
    lines.append(aligned_table(rows, right=1))
    if plan.largest_micro_batch:
        lines.append(f"largest micro-batch that fits: {plan.largest_micro_batch} rows")
    else:
        resident = config.parallel.base_placement == "resident" and shape.packing is None
        sharded = "--base_placement sharded, " if resident else ""
        lines.append(
            f"no micro-batch fits: give more GPUs, {sharded}--recompute full, a lower --max_length or another --density"
        )
    return lines


def describe_run(config: Config, shape: BaseShape, world_size: int) -> str:
    """The resolved config with the parameter and memory tables, for `--dry_run`."""
    values = trainable_values(config.adapter, shape)
    values["all trainables"] = sum(values.values())
    lines = [config.to_yaml()]
    rows = [[name, f"{count:,}", f"{count / shape.parameters:.3%}"] for name, count in values.items()]
    frozen = ["frozen base", f"{shape.parameters:,}", ""]
    lines.append(aligned_table([["parameters", "values", "of base"], *rows, frozen], right=1))
    peak = memory(Workload.of(config, world_size), shape)
    table = peak.peak | {"sum": peak.total}
    processes = f"{world_size} process{'es' if world_size > 1 else ''}"
    lines.append(f"\nGiB per process with {processes}, at its peak ({peak.peak_moment}), every position labelled")
    lines.append(aligned_table([[kind, f"{size / GIB:.3f}"] for kind, size in table.items() if size], right=1))
    return "\n".join(lines)
