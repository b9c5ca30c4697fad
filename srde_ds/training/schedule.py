"""What each step trains. It depends on the options and the step's number alone, so a run may stop and resume anywhere.

First comes supervised pretraining (optional), then the routers' warm start (optional), then routed training, in which
experts may be unlocked one after another and a phase may freeze kinds of trainables. Independently of all that, the
support may shrink from the first step on.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, groupby

from srde_ds.config import AdapterConfig, Config, CurriculumConfig
from srde_ds.errors import SRDEError
from srde_ds.utils.tables import aligned_table

DELTA_VALUES = frozenset({"free", "atoms", "mixing", "shared"})
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
UNLOCK_WARMUP_PERCENT = 10  # of the routed steps: with progressive_unlock=warmup, one expert until then
FINAL_TEMPERATURE_SHARE = 0.1  # of support_temperature, when a learned support is frozen


@dataclass(frozen=True)
class ScheduledStep:
    """What one step trains.

    Attributes:
        phase: the phase's name in logs and tables.
        forced: each row uses its domain's expert only, and the router is not consulted.
        only_domain: only rows of this domain are read (sequential pretraining).
        unlocked: number of experts that may be used and change; with `only_domain`, only that domain's.
        trained: the `srde_kind`s that are updated; the others keep their values and optimizer state.
        density: density of the supports.
        temperature: temperature of a support that is being learned; None: the supports are fixed.
    """

    phase: str
    forced: bool
    only_domain: int | None
    unlocked: int
    trained: frozenset[str]
    density: float
    temperature: float | None

    @property
    def learns_support(self) -> bool:
        """Whether the support is still being learned."""
        return self.temperature is not None


@dataclass(frozen=True)
class Schedule:
    """The steps of a run, numbered from 0.

    Attributes:
        support_temperature: initial temperature of a support that is learned.
        domains: names of the domains, in the order of their experts.
        max_steps: optimizer steps of the whole run.
    """

    curriculum: CurriculumConfig
    adapter: AdapterConfig
    support_temperature: float
    domains: tuple[str, ...]
    max_steps: int

    @classmethod
    def of(cls, config: Config) -> Schedule:
        """The schedule of a run."""
        domains, temperature = tuple(config.data.domains), config.support.support_temperature
        return cls(config.curriculum, config.adapter, temperature, domains, config.training.max_steps)

    def step(self, number: int) -> ScheduledStep:
        """What step `number` trains."""
        density, temperature = self.density_at(number), self._temperature(number)
        if number < self.pretraining_steps:
            trained = ALL_KINDS - ROUTERS
            if self.curriculum.pretrain_objective == "sequential":
                # The other experts are locked: momentum would move them although they get no tokens.
                only = number // self.curriculum.expert_pretrain_steps
                return ScheduledStep("pretraining", True, only, 1, trained, density, temperature)
            experts = self.adapter.num_experts
            return ScheduledStep("pretraining", True, None, experts, trained, density, temperature)
        phase, trained = self._phase(number - self.pretraining_steps)
        unlocked, forced = self._unlocked(number - self.pretraining_steps), self.trains_by_domain
        return ScheduledStep(phase, forced, None, unlocked, trained, density, temperature)

    @property
    def trains_by_domain(self) -> bool:
        """Whether each row uses its domain's expert throughout, so that the routers are set at the end."""
        return self.curriculum.training_phases == "by_domain"

    @property
    def pretraining_steps(self) -> int:
        """Number of steps of supervised pretraining: expert_pretrain_steps for each expert with a domain."""
        curriculum = self.curriculum
        return len(self.domains) * curriculum.expert_pretrain_steps if curriculum.supervised_experts else 0

    @property
    def warm_start_step(self) -> int | None:
        """The step before which the routers are set; None: never."""
        return self.pretraining_steps if self.curriculum.warm_start else None

    @cached_property
    def prunings(self) -> list[tuple[int, float]]:
        """Each pruning, in order, as (step, density from this step on); empty without `initial_density`.

        The density falls by equal factors. A learned support is pruned once, when its scores are frozen.
        """
        initial, target = self.curriculum.initial_density, self.adapter.density
        if initial is None:
            return []
        steps, ratio = self.curriculum.density_warmup_steps, target / initial
        count = 1 if self._learned else min(self.curriculum.density_prunings, steps)
        return [(i * steps // count, initial * ratio ** (i / count)) for i in range(1, count)] + [(steps, target)]

    @property
    def densities(self) -> list[tuple[int, float]]:
        """(step, density from this step on), from step 0 on."""
        return [(0, self.curriculum.initial_density or self.adapter.density), *self.prunings]

    def density_at(self, number: int) -> float:
        """Density of the supports in step `number`."""
        return next(density for first, density in reversed(self.densities) if number >= first)

    def check(self) -> None:
        """Refuse a learned support if no step trains its scores before they are frozen.

        Raises:
            SRDEError: no phase before then trains the scores.
        """
        steps = self.curriculum.density_warmup_steps
        if self._learned and not any("scores" in self.step(number).trained for number in range(steps)):
            raise SRDEError(
                f"support_strategy=learned with training_phases={self.curriculum.training_phases}: no phase of the "
                f"first density_warmup_steps={steps} steps trains the scores. Raise --density_warmup_steps beyond the "
                "warm-up."
            )

    def timeline(self) -> Iterator[tuple[int, int, ScheduledStep]]:
        """Ranges of steps that are alike but for the temperature: first step, last step, what the first one trains."""
        steps = [(number, self.step(number)) for number in range(self.max_steps)]
        for _, run in groupby(steps, key=lambda item: _without_temperature(item[1])):
            numbers, scheduled = zip(*run, strict=True)
            yield numbers[0], numbers[-1], scheduled[0]

    def describe(self) -> str:
        """The timeline as a table, for `--dry_run`."""
        lines = [("steps", "phase", "routing", "experts", "trained", "density", "")]
        for first, last, step in self.timeline():
            routing = "router"
            if step.forced:
                routing = "by domain" if step.only_domain is None else f"only {self.domains[step.only_domain]}"
            notes = []
            if first == self.warm_start_step:
                notes.append("routers warm-started before")
            if step.learns_support:
                notes.append("support being learned")
            if first and step.density != self.density_at(first - 1):
                notes.append("pruned before")
            if self.trains_by_domain and last == self.max_steps - 1:
                notes.append("routers set after")
            lines.append(
                (
                    f"{first + 1}-{last + 1}",
                    step.phase,
                    routing,
                    str(step.unlocked),
                    "all" if step.trained == ALL_KINDS else "+".join(sorted(step.trained & self._present_kinds(step))),
                    f"{step.density:.4g}",
                    ", ".join(notes),
                )
            )
        return aligned_table(lines)

    @property
    def _learned(self) -> bool:
        return self.adapter.support_strategy == "learned"

    @property
    def _routed_steps(self) -> int:
        return self.max_steps - self.pretraining_steps

    def _phase(self, routed_step: int) -> tuple[str, frozenset[str]]:
        if self.curriculum.training_phases == "joint":
            return "routed", ALL_KINDS
        if self.curriculum.training_phases == "routers":
            return "routers", ROUTERS
        if self.trains_by_domain:
            return "by domain", ALL_KINDS - ROUTERS
        ends = accumulate(percent for _, percent, _ in FOUR_PHASES[:-1])
        index = sum(100 * routed_step >= end * self._routed_steps for end in ends)
        name, _, trained = FOUR_PHASES[index]
        return name, trained

    def _unlocked(self, routed_step: int) -> int:
        experts, unlock = self.adapter.num_experts, self.curriculum.progressive_unlock
        if unlock == "linear":
            return min(experts, routed_step // max(1, self._routed_steps // experts) + 1)
        if unlock == "warmup" and 100 * routed_step < UNLOCK_WARMUP_PERCENT * self._routed_steps:
            return 1
        return experts

    def _temperature(self, number: int) -> float | None:
        """It falls geometrically to FINAL_TEMPERATURE_SHARE of its start; None once the support is fixed."""
        steps = self.curriculum.density_warmup_steps
        if not self._learned or number >= steps:
            return None
        return self.support_temperature * FINAL_TEMPERATURE_SHARE ** (number / steps)

    def _present_kinds(self, step: ScheduledStep) -> frozenset[str]:
        values = {"atoms", "mixing", "importance"} if self.adapter.num_atoms else {"free"}
        values |= {"shared"} if self.adapter.shared_expert_density else set()
        return frozenset(values | ({"scores"} if step.learns_support else set())) | ROUTERS


def _without_temperature(step: ScheduledStep) -> tuple[object, ...]:
    return step.phase, step.only_domain, step.unlocked, step.trained, step.density, step.learns_support
