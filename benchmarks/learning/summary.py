"""From records to the numbers of the tables: means and spreads over seeds, paired differences, steps to a loss."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import isfinite
from statistics import mean, stdev
from typing import Any

from benchmarks.learning.plan import Flags, Plan, Record, Row, SweepDiverged
from srde_ds.config import DOMAINS


@dataclass(frozen=True)
class Spread:
    """Mean over seeds and standard deviation (None with one seed)."""

    mean: float
    deviation: float | None

    @staticmethod
    def of(values: Sequence[float]) -> Spread:
        return Spread(mean(values), stdev(values) if len(values) > 1 else None)

    def text(self, form: str, scale: float = 1.0) -> str:
        around = "" if self.deviation is None else f" ± {format(self.deviation * scale, form.lstrip('+'))}"
        return f"{format(self.mean * scale, form)}{around}"


@dataclass(frozen=True)
class Result:
    """A row with its reported runs.

    Attributes:
        rates: the chosen ones.
        at_edge: the chosen rate is the highest or lowest of several that were tried, so a better one may lie beyond.
        runs: by seed, those that did not diverge.
        diverged: how many did.
    """

    row: Row
    rates: Flags
    at_edge: bool
    runs: dict[int, Record]
    diverged: int

    def losses(self) -> dict[int, float]:
        """Mean over domains of the test items' loss, by seed."""
        return {seed: domain_mean(record["test_loss"]) for seed, record in self.runs.items()}

    def spread(self, key: str, domain: str | None = None) -> Spread:
        """Of a figure; of one that is kept by domain, this domain's or the mean over domains."""
        values = [record[key] for record in self.runs.values()]
        if isinstance(values[0], dict):
            values = [value[domain] if domain else domain_mean(value) for value in values]
        return Spread.of(values)

    def difference(self, other: Result) -> Spread | None:
        """Of the losses, ours - theirs, over the seeds that both have."""
        ours, theirs = self.losses(), other.losses()
        pairs = [ours[seed] - theirs[seed] for seed in ours if seed in theirs]
        return Spread.of(pairs) if pairs else None


def domain_mean(figures: dict[str, float]) -> float:
    return mean(figures[name] for name in DOMAINS)


def result_of(plan: Plan, row: Row) -> Result | None:
    """What is there of a row; None if no reported run is."""
    try:
        rates = plan.rates(row)
    except SweepDiverged:
        return None
    if rates is None:
        return None
    records = [record for run in plan.reported(row) or [] if (record := plan.find(run)) is not None]
    finished = {record["seed"]: record for record in records if "diverged" not in record}
    if not finished:
        return None
    tried = sorted(next(iter(entry.values())) for entry in plan.source(row).grid[: plan.budget.rates])
    at_edge = len(tried) > 1 and next(iter(rates.values())) in (tried[0], tried[-1])
    return Result(row, rates, at_edge, finished, len(records) - len(finished))


def sweep_of(plan: Plan, row: Row) -> list[tuple[float, float]]:
    """(rate, mean `plan.late_loss`) of the row's own sweep, by rate; those that diverged are left out."""
    points = plan.sweep_losses(row) if row.grid else []
    return sorted((next(iter(rates.values())), loss) for rates, loss in points if loss is not None and isfinite(loss))


@dataclass(frozen=True)
class Speed:
    """One optimizer against another at the other's final validation loss, over the seeds that both have.

    Attributes:
        steps: share of the other's steps that reach it; None if one seed does not reach it.
        seconds: the same in time, from the mean step times.
        step_time: of a step, as a multiple of the other's.
    """

    steps: Spread | None
    seconds: Spread | None
    step_time: Spread


def speed_of(ours: Result, theirs: Result) -> Speed | None:
    """None if they share no seed."""
    steps: list[float | None] = []
    times: list[float] = []
    for seed in ours.runs.keys() & theirs.runs.keys():
        a, b = ours.runs[seed], theirs.runs[seed]
        step = first_crossing(a["curve"], b["curve"][-1][1])
        steps.append(None if step is None else step / b["curve"][-1][0])
        times.append(_step_seconds(a) / _step_seconds(b))
    if not times:
        return None
    shares = [share for share in steps if share is not None]
    if len(shares) < len(steps):
        return Speed(None, None, Spread.of(times))
    seconds = [share * time for share, time in zip(shares, times, strict=True)]
    return Speed(Spread.of(shares), Spread.of(seconds), Spread.of(times))


def first_crossing(curve: Sequence[tuple[float, float]], target: float) -> float | None:
    """Where a curve of (step, loss) first comes down to a loss, on straight lines between its points."""
    for (step, loss), (next_step, next_loss) in pairwise(curve):
        if next_loss <= target:
            return step + (next_step - step) * max(0.0, loss - target) / max(1e-12, loss - next_loss)
    return None


def _step_seconds(record: Record) -> float:
    return float(record["training_seconds"]) / len(record["losses"])


def routing_of(result: Result) -> dict[str, Any] | None:
    """Means over seeds; None for a row that has no routing.

    Returns:
        Spreads `own` (share of tokens that reach their domain's expert) and `balance`; `chance`, what `own` would be if
        experts were drawn; `usage` `[domains][E]`; and with an expert table the losses, mean over domains, `mixture`,
        `own_alone` (each domain by its own expert) and `best_alone` (all domains by one expert, the best).
    """
    runs = [record for record in result.runs.values() if "routing" in record]
    if not runs:
        return None
    found: dict[str, Any] = {
        "own": Spread.of([mean(record["routing"]["own"].values()) for record in runs]),
        "balance": Spread.of([record["routing"]["balance"] for record in runs]),
        "usage": _mean_matrix([record["routing"]["usage"] for record in runs]),
        "chance": runs[0]["routing"]["top_k"] / len(runs[0]["routing"]["usage"][0]),
    }
    tables = [record["experts_alone"] for record in runs if "experts_alone" in record]
    if tables:
        own = [mean(experts[name] for name, experts in zip(DOMAINS, t["experts"], strict=False)) for t in tables]
        found["mixture"] = Spread.of([domain_mean(table["mixture"]) for table in tables])
        found["own_alone"] = Spread.of(own)
        found["best_alone"] = Spread.of([min(map(domain_mean, table["experts"])) for table in tables])
    return found


def _mean_matrix(matrices: Sequence[list[list[float]]]) -> list[list[float]]:
    return [[mean(cells) for cells in zip(*rows, strict=True)] for rows in zip(*matrices, strict=True)]
