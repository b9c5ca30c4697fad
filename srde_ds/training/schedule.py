"""What a step trains: a pure function of the config and the step, so that a run may stop and go on anywhere.

Time line: supervised pretraining (optional), then the routers' warm start (optional), then routed training, in which
experts may be unlocked one after the other and kinds of trainables frozen by phase. The support shrinks independently
of these, from the first step on.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate, groupby

from srde_ds.config import Config
from srde_ds.errors import SRDEError

DELTA_VALUES = frozenset({"free", "atoms", "mixing"})
DELTA_MASKS = frozenset({"importance", "scores"})
ROUTERS = frozenset({"router"})
ALL_KINDS = DELTA_VALUES | DELTA_MASKS | ROUTERS
# The predecessor's four phases: name, percent of the routed steps, what trains.
FOUR_PHASES = (
    ("warm-up", 10, DELTA_VALUES | ROUTERS),
    ("mask", 20, DELTA_MASKS | ROUTERS),
    ("delta", 40, DELTA_VALUES),
    ("joint", 30, ALL_KINDS),
)
UNLOCK_WARMUP_PERCENT = 10  # of the routed steps: with progressive_unlock=warmup one expert until then
FINAL_TEMPERATURE_SHARE = 0.1  # of support_temperature, when a learned support is frozen


@dataclass(frozen=True)
class StepPlan:
    """One step.

    Attributes:
        phase: its name in logs and tables.
        forced: each row goes to its domain's expert alone; the router takes no part.
        only_domain: rows of this domain alone (sequential pretraining).
        unlocked: how many experts may be used and change; with `only_domain` that domain's alone.
        trained: the `srde_kind`s that are updated; the others keep values and optimizer state.
        density: of the supports.
        temperature: of a support that is being learned; None: the supports are fixed.
    """

    phase: str
    forced: bool
    only_domain: int | None
    unlocked: int
    trained: frozenset[str]
    density: float
    temperature: float | None


def pretrain_steps(config: Config) -> int:
    """Steps of supervised pretraining: expert_pretrain_steps' worth of tokens for each expert that has a domain."""
    curriculum = config.curriculum
    return len(config.data.domains) * curriculum.expert_pretrain_steps if curriculum.supervised_experts else 0


def plan_of_step(config: Config, step: int) -> StepPlan:
    """What step number `step` (from 0) trains."""
    experts, before = config.adapter.num_experts, pretrain_steps(config)
    density, temperature = density_at(config, step), _temperature(config, step)
    if step < before:
        trained = ALL_KINDS - ROUTERS
        if config.curriculum.pretrain_objective == "sequential":
            # The other experts are locked: momentum would move them on although they get no tokens.
            only = step // config.curriculum.expert_pretrain_steps
            return StepPlan("pretraining", True, only, 1, trained, density, temperature)
        return StepPlan("pretraining", True, None, experts, trained, density, temperature)
    phase, trained = _phase(config, step - before, config.training.max_steps - before)
    unlocked = _unlocked(config, step - before, config.training.max_steps - before)
    return StepPlan(phase, False, None, unlocked, trained, density, temperature)


def _phase(config: Config, routed_step: int, routed_steps: int) -> tuple[str, frozenset[str]]:
    if config.curriculum.training_phases == "joint":
        return "routed", ALL_KINDS
    ends = accumulate(percent for _, percent, _ in FOUR_PHASES[:-1])
    index = sum(100 * routed_step >= end * routed_steps for end in ends)
    name, _, trained = FOUR_PHASES[index]
    return name, trained


def _unlocked(config: Config, routed_step: int, routed_steps: int) -> int:
    experts, unlock = config.adapter.num_experts, config.curriculum.progressive_unlock
    if unlock == "linear":
        return min(experts, routed_step // max(1, routed_steps // experts) + 1)
    if unlock == "warmup" and 100 * routed_step < UNLOCK_WARMUP_PERCENT * routed_steps:
        return 1
    return experts


def prunings(config: Config) -> list[tuple[int, float]]:
    """(step, density from this step on) of each pruning, in order; empty without `initial_density`.

    The density falls by equal factors. A learned support is pruned once, when its scores are frozen.
    """
    curriculum, target = config.curriculum, config.adapter.density
    if curriculum.initial_density is None or curriculum.initial_density == target:
        return []
    steps = curriculum.density_warmup_steps
    count = 1 if config.adapter.support_strategy == "learned" else min(curriculum.density_prunings, steps)
    ratio = target / curriculum.initial_density
    last = [(steps, target)]
    return [(i * steps // count, curriculum.initial_density * ratio ** (i / count)) for i in range(1, count)] + last


def density_at(config: Config, step: int) -> float:
    """Density of the supports in step `step`."""
    density = config.curriculum.initial_density or config.adapter.density
    for first, pruned in prunings(config):
        if step >= first:
            density = pruned
    return density


def _temperature(config: Config, step: int) -> float | None:
    """Falls geometrically to FINAL_TEMPERATURE_SHARE of its start; None once the support is fixed."""
    steps = config.curriculum.density_warmup_steps
    if config.adapter.support_strategy != "learned" or step >= steps:
        return None
    return config.support.support_temperature * FINAL_TEMPERATURE_SHARE ** (step / steps)


def check_schedule(config: Config) -> None:
    """Refuse a learned support whose scores are never trained, because all phases until it is fixed freeze them.

    Raises:
        SRDEError: then.
    """
    steps = config.curriculum.density_warmup_steps
    plans = (plan_of_step(config, step) for step in range(steps))
    if config.adapter.support_strategy == "learned" and not any("scores" in plan.trained for plan in plans):
        raise SRDEError(
            f"support_strategy=learned with training_phases={config.curriculum.training_phases}: no phase of the first "
            f"density_warmup_steps={steps} steps trains the scores. Raise --density_warmup_steps beyond the warm-up."
        )


def warm_start_step(config: Config) -> int | None:
    """The routers are set before this step; None: never."""
    return pretrain_steps(config) if config.curriculum.warm_start else None


def timeline(config: Config) -> Iterator[tuple[int, int, StepPlan]]:
    """Runs of steps with the same plan but for the temperature: first step, last step, plan of the first."""
    plans = [(step, plan_of_step(config, step)) for step in range(config.training.max_steps)]
    for _, run in groupby(plans, key=lambda item: _without_temperature(item[1])):
        steps = list(run)
        yield steps[0][0], steps[-1][0], steps[0][1]


def _without_temperature(plan: StepPlan) -> tuple[object, ...]:
    learning = plan.temperature is not None
    return plan.phase, plan.only_domain, plan.unlocked, plan.trained, plan.density, learning


def describe_timeline(config: Config) -> str:
    """The schedule as a table, for `--dry_run`."""
    warm_start = warm_start_step(config)
    rows = [("steps", "phase", "routing", "experts", "trained", "density", "")]
    for first, last, plan in timeline(config):
        routing = "router"
        if plan.forced:
            routing = "by domain" if plan.only_domain is None else f"only {config.data.domains[plan.only_domain]}"
        notes = []
        if warm_start is not None and first <= warm_start <= last and warm_start == first:
            notes.append("routers warm-started before")
        if plan.temperature is not None:
            notes.append("support being learned")
        if first and plan.density != density_at(config, first - 1):
            notes.append("pruned before")
        rows.append(
            (
                f"{first + 1}-{last + 1}",
                plan.phase,
                routing,
                str(plan.unlocked),
                "all" if plan.trained == ALL_KINDS else "+".join(sorted(plan.trained & _used_kinds(config, plan))),
                f"{plan.density:.4g}",
                ", ".join(notes),
            )
        )
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    )


def _used_kinds(config: Config, plan: StepPlan) -> frozenset[str]:
    values = {"atoms", "mixing", "importance"} if config.adapter.num_atoms else {"free"}
    scores = set() if plan.temperature is None else {"scores"}
    return frozenset(values | scores) | ROUTERS
