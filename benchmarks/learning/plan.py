"""What is to be run: the rows of suites.yaml, and the runs that a row needs."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import yaml

from srde_ds.config import DOMAINS
from srde_ds.errors import SRDEError

SUITES = Path(__file__).with_name("suites.yaml")
# Flags that may be given in percent of a run's steps.
STEP_FLAGS = ("warmup_steps", "expert_pretrain_steps", "density_warmup_steps", "eval_steps")
WARMUP = "10%"

Kind = Literal["base", "srde", "lora", "routed_lora", "shira", "full"]
Data = Literal["generated", "real"]
Flags = dict[str, Any]
WHOLE_NEURONS: Flags = {"neuron_parts": 1, "support_strategy": "magnitude"}
"""What the results call SRDE unless a method's flags say otherwise; rivals have as many values"""
Record = dict[str, Any]
"""A line of the results file; see run.py."""


class SweepDiverged(SRDEError):
    """No rate of a grid works."""


@dataclass(frozen=True)
class Budget:
    """How long the runs are and what they are judged on.

    Attributes:
        steps, rows_per_step, max_length: of training; each step has so many packed rows of so many tokens.
        rows_at_once: rows of a micro-step.
        train_items, validation_items, test_items: of each domain.
        text_tokens: of the text that shows what is forgotten.
        table_rows: packed test rows of each domain for the table of each expert alone.
        new_tokens: longest answer.
        eval_batch: items at once in evaluation.
        rates: entries of a grid that are swept.
        curve: steps between two points of a validation curve, in percent of all.
        sweep_seeds, seeds: of the sweep, and of the reported runs. A seed draws items, order, supports and routers.
        flags: of all SRDE runs.
        data: generated tasks, new for each seed; or the real items of `data.REAL_FOLDER`, the same test items for all
            seeds.
        bf16: bfloat16 with fp32 masters for all methods, else float32.
        short_steps: successive halving (Jamieson and Talwalkar 2016): all rates are swept at this length, and the best
            `finalists` of them at full length. None: all at full length.
    """

    name: str
    steps: int
    rows_per_step: int
    rows_at_once: int
    max_length: int
    train_items: int
    validation_items: int
    test_items: int
    text_tokens: int
    table_rows: int
    new_tokens: int
    eval_batch: int
    rates: int
    curve: str
    sweep_seeds: list[int]
    seeds: list[int]
    flags: Flags
    data: Data = "generated"
    bf16: bool = False
    short_steps: int | None = None
    finalists: int = 2

    def sizes(self) -> dict[str, Any]:
        """What a run's result depends on."""
        no_part = ("eval_batch", "rates", "curve", "sweep_seeds", "seeds", "flags", "short_steps", "finalists")
        later = {"data": "generated", "bf16": False}  # older records lack these fields
        return {
            key: value
            for key, value in asdict(self).items()
            if key not in no_part and not (key in later and value == later[key])
        }


@dataclass(frozen=True)
class Row:
    """A line of a table.

    Attributes:
        grid: rates to choose from.
        rates_of: name of the row whose rate is taken where there is no grid.
        equal_to: name of the SRDE row whose number of trainable values a baseline gets.
        expert_table: also measure each expert alone.
        curve: also measure validation loss while it trains.
        against: name of the row that the table compares it with.
        core: part of the shorter programme.
        variant: of `variants.py`, in place of an option.
    """

    name: str
    kind: Kind = "srde"
    flags: Flags = field(default_factory=dict)
    grid: list[Flags] = field(default_factory=list)
    rates_of: str = "SRDE neuron"
    equal_to: str | None = None
    expert_table: bool = False
    curve: bool = False
    against: str = "SRDE neuron"
    core: bool = False
    variant: str | None = None


@dataclass(frozen=True)
class Run:
    """One training with its measurements.

    Attributes:
        row: the name of a row that needs it, for people; other rows may share it.
        flags: as `srde-ds train` knows them, rates included; of a baseline also `values_of`, the flags of the SRDE
            model that it gets as many trainable values as, and of a row with a variant also `variant`.
        report: measure test items and text, too.
    """

    row: str
    kind: Kind
    flags: Flags
    seed: int
    report: bool
    expert_table: bool
    budget: Budget

    def identity(self, machine: str) -> dict[str, Any]:
        settings = {"kind": self.kind, "flags": self.flags, "seed": self.seed, "machine": machine}
        return settings | {"report": self.report, "expert_table": self.expert_table, "budget": self.budget.sizes()}

    def key(self, machine: str) -> str:
        text = json.dumps(self.identity(machine), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]


class Plan:
    """The suites with one budget, and what is known so far.

    Args:
        find: the record of a run, None if it was not run yet.
    """

    def __init__(self, budget: str, find: Callable[[Run], Record | None]) -> None:
        content = yaml.safe_load(SUITES.read_text())
        if budget not in content["budgets"]:
            raise SRDEError(f"budget={budget}: must be one of {', '.join(content['budgets'])}.")
        self.budget = Budget(name=budget, **content["budgets"][budget])
        self.find = find
        entries = [entry for suite in content["suites"].values() for entry in suite]
        self.rows = {entry["name"]: Row(**entry) for entry in entries if not isinstance(entry, str)}
        self.suites = {
            name: [self.rows[entry if isinstance(entry, str) else entry["name"]] for entry in suite]
            for name, suite in content["suites"].items()
        }

    def select(self, suites: Sequence[str], *, core: bool = False, only: Sequence[str] | None = None) -> list[Row]:
        """The rows of these suites, each once; with `core` those marked so, with `only` those named.

        Raises:
            SRDEError: an unknown suite, or a name that is not in them.
        """
        unknown = set(suites) - self.suites.keys()
        if unknown:
            raise SRDEError(f"suite={min(unknown)}: must be one of {', '.join(self.suites)}.")
        rows = {row.name: row for suite in suites for row in self.suites[suite]}
        strangers = set(only or ()) - rows.keys()
        if strangers:
            raise SRDEError(f"rows={min(strangers)}: not in {', '.join(suites)}, which have: {'; '.join(rows)}.")
        return [row for row in rows.values() if (row.core or not core) and (only is None or row.name in only)]

    def sweep(self, row: Row) -> list[Run]:
        """The runs that choose the row's rate, as far as they are known."""
        source, budget = self.source(row), self.budget
        grid = source.grid[: budget.rates]
        if budget.short_steps is None:
            return [run for rates in grid for run in self._at_rate(source, rates, budget)]
        short = replace(budget, steps=budget.short_steps)
        runs = [run for rates in grid for run in self._at_rate(source, rates, short)]
        finalists = self._finalists(source) or []
        return runs + [run for rates in finalists for run in self._at_rate(source, rates, budget)]

    def _at_rate(self, source: Row, rates: Flags, budget: Budget) -> list[Run]:
        return [self._run(source, rates, seed, budget, report=False) for seed in self.budget.sweep_seeds]

    def _finalists(self, source: Row) -> list[Flags] | None:
        """The rates that are swept at full length; None as long as the short sweep is not done."""
        budget = self.budget
        if budget.short_steps is None:
            return source.grid[: budget.rates]
        points = self._losses(source, source.grid[: budget.rates], replace(budget, steps=budget.short_steps))
        if any(loss is None for _, loss in points):
            return None
        finite = [point for point in points if point[1] != float("inf")]
        return [rates for rates, _ in sorted(finite, key=lambda point: point[1] or 0.0)[: budget.finalists]]

    def source(self, row: Row) -> Row:
        """The row whose grid its rate comes from: itself or another one; the base needs none."""
        return row if row.grid or row.kind == "base" else self.rows[row.rates_of]

    def rates(self, row: Row) -> Flags | None:
        """The rates of lowest mean loss over the sweep's seeds; None as long as the sweep is not done.

        Raises:
            SweepDiverged: every rate does.
        """
        if not self.source(row).grid:
            return {}
        swept = self.sweep_losses(row)
        if not swept:
            return None if self._finalists(self.source(row)) is None else self._diverged(row)
        if any(loss is None for _, loss in swept):
            return None
        rates, loss = min(swept, key=lambda point: point[1] or 0.0)
        return self._diverged(row) if loss == float("inf") else rates

    def _diverged(self, row: Row) -> Flags:
        raise SweepDiverged(f"{row.name}: every rate of its sweep diverges: lower those of its grid.")

    def sweep_losses(self, row: Row) -> list[tuple[Flags, float | None]]:
        """Rates with their mean `late_loss` over the sweep's seeds: infinite where one diverged, None as long as one
        was not run. With successive halving those of the finalists, once they are known."""
        source = self.source(row)
        return self._losses(source, self._finalists(source) or [], self.budget)

    def _losses(self, source: Row, grid: Sequence[Flags], budget: Budget) -> list[tuple[Flags, float | None]]:
        points: list[tuple[Flags, float | None]] = []
        for rates in grid:
            found = [self.find(run) for run in self._at_rate(source, rates, budget)]
            losses = [late_loss(record) for record in found if record is not None]
            points.append((rates, sum(losses) / len(losses) if len(losses) == len(found) else None))
        return points

    def reported(self, row: Row) -> list[Run] | None:
        """The runs that the table shows; None as long as their rate is not known."""
        rates = self.rates(row)
        if rates is None:
            return None
        return [self._run(row, rates, seed, self.budget, report=True) for seed in self.budget.seeds]

    def example(self, row: Row) -> Run:
        """A run of the row as it would be with the first rate of its grid."""
        return self._run(row, (self.source(row).grid or [{}])[0], self.budget.sweep_seeds[0], self.budget, report=True)

    def missing(self, rows: Sequence[Row]) -> tuple[list[Run], int]:
        """The runs that can be started now, sweeps first, and how many more will follow from them.

        A row whose whole sweep diverged needs no more.
        """
        ready: list[Run] = []
        later = 0
        for row in rows:
            ready += [run for run in self.sweep(row) if self.find(run) is None]
        for row in rows:
            try:
                reported = self.reported(row)
            except SweepDiverged:
                continue
            later += len(self.budget.seeds) if reported is None else 0
            ready += [run for run in reported or [] if self.find(run) is None]
        return list({run.key(""): run for run in ready}.values()), later

    def _run(self, row: Row, rates: Flags, seed: int, budget: Budget, *, report: bool) -> Run:
        flags = row.flags | rates
        if row.kind == "srde":
            flags = budget.flags | flags
        if row.curve and report:
            flags = flags | {"eval_steps": budget.curve}
        flags = in_steps(flags, budget.steps)
        if row.equal_to:
            flags["values_of"] = self.rows[row.equal_to].flags
        if row.variant:
            flags["variant"] = row.variant
        table = row.expert_table and report
        return Run(row.name, row.kind, flags, seed, report, table, budget)


def late_loss(record: Record) -> float:
    """Mean training loss of the second half of a run's steps, each before its update; infinite where it diverged.

    No item is trained on twice, so each step scores items that are new to the model: more of them than validation has,
    and a rate that is good at the last step by chance does not win.
    """
    losses = record.get("losses", [float("inf")])
    late = losses[len(losses) // 2 :]
    return float(sum(late) / len(late))


def in_steps(flags: Flags, steps: int) -> Flags:
    """The flags with steps for percentages: `max_steps` in percent of `steps`, the others in percent of it.

    `expert_pretrain_steps` in percent are those of all experts together.
    """
    given: Flags = {"max_steps": steps, "warmup_steps": WARMUP} | flags
    given["max_steps"] = _share(given["max_steps"], steps)
    for name in STEP_FLAGS:
        if name in given:
            given[name] = _share(given[name], given["max_steps"])
    if given.get("supervised_experts"):
        given["expert_pretrain_steps"] = max(1, given["expert_pretrain_steps"] // len(DOMAINS))
    else:
        given.pop("expert_pretrain_steps", None)
    return given


def _share(value: Any, steps: int) -> int:
    return max(1, round(float(value[:-1]) / 100 * steps)) if isinstance(value, str) else int(value)
