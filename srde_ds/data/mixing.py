"""How often each domain's rows are drawn in training: shares that may change with the step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from srde_ds.errors import SRDEError, nearest

CYCLE = 10_000
"""number of draws after which every domain has had its share, to one part in CYCLE"""


@dataclass(frozen=True)
class MixingPeriod:
    """The shares of the domains from a step on. They need not add up to 1."""

    first_step: int
    shares: tuple[float, ...]


def mixing_periods(
    domain_weights: str | None, mixing_temperature: float, domains: Sequence[str], rows: Sequence[int]
) -> list[MixingPeriod] | None:
    """The periods that the options describe; None if they are not set and each epoch simply covers each row once.

    Args:
        domain_weights: text for `parse_domain_weights`.
        mixing_temperature: T in shares proportional to rows ** (1 / T).
        rows: number of rows of each domain.

    Raises:
        SRDEError: the weights are wrong, both options are given, or a domain has a share but no rows.
    """
    if domain_weights is None and mixing_temperature == 1.0:
        return None
    if domain_weights is None:
        periods = [MixingPeriod(0, tuple(float(count) ** (1 / mixing_temperature) if count else 0.0 for count in rows))]
    else:
        periods = parse_domain_weights(domain_weights, domains)
        if mixing_temperature != 1.0:
            raise SRDEError(
                f"domain_weights={domain_weights} with mixing_temperature={mixing_temperature}: give one of them."
            )
    for period in periods:
        for domain, share, count in zip(domains, period.shares, rows, strict=True):
            if share and not count:
                raise SRDEError(f"domain_weights={domain_weights}: the dataset has no rows of '{domain}'.")
    return periods


def parse_domain_weights(text: str, domains: Sequence[str]) -> list[MixingPeriod]:
    """Read `math=2,code=1`, or with later changes `math=2,code=1; 500: math=1,code=1`. Other domains get no share.

    Raises:
        SRDEError: the form is wrong, a domain is unknown, all weights are 0, or steps are out of order.
    """
    periods: list[MixingPeriod] = []
    for number, part in enumerate(text.split(";")):
        step, colon, weights = part.rpartition(":")
        if not colon:
            step = "0"
        if not step.strip().isdigit() or bool(colon) != (number > 0):
            raise SRDEError(
                f"domain_weights={text}: must be like 'math=2,code=1', or with the step of each later change like "
                "'math=2,code=1; 500: math=1,code=1'."
            )
        given = _weights(weights, text, domains)
        if periods and int(step) <= periods[-1].first_step:
            raise SRDEError(f"domain_weights={text}: steps must increase, but {int(step)} does not.")
        periods.append(MixingPeriod(int(step), tuple(given.get(domain, 0.0) for domain in domains)))
    return periods


def _weights(part: str, text: str, domains: Sequence[str]) -> dict[str, float]:
    given: dict[str, float] = {}
    for entry in part.split(","):
        name, _, value = (piece.strip() for piece in entry.partition("="))
        if name not in domains:
            raise SRDEError(f"domain_weights={text}: unknown domain '{name}'.{nearest(name, domains)}")
        try:
            given[name] = float(value)
        except ValueError:
            raise SRDEError(f"domain_weights={text}: '{entry.strip()}' must be a domain, '=' and a number.") from None
        if not 0 <= given[name] < float("inf"):
            raise SRDEError(f"domain_weights={text}: {name}={value} must be 0 or a positive number.")
    if not any(given.values()):
        raise SRDEError(f"domain_weights={text}: at least one domain needs a weight above 0.")
    return given


class Mixture:
    """The order in which domains take turns, which depends only on (seed, position).

    Each period consists of cycles of CYCLE draws. In a cycle each domain is drawn as often as its share says, in an
    order fixed by (seed, period, cycle). Each domain's rows are drawn in epochs, once per epoch.
    """

    def __init__(
        self, periods: Sequence[MixingPeriod], rows_of_domain: Sequence[np.ndarray], *, seed: int, rows_per_step: int
    ) -> None:
        self.seed = seed
        self.rows_of_domain = rows_of_domain
        self.counts = np.array([_cut(period.shares) for period in periods])
        """[period, domain]: number of draws in a cycle"""
        self.starts = np.array([period.first_step * rows_per_step for period in periods])
        """position of each period's first draw"""
        self._cycle = lru_cache(maxsize=4)(self._make_cycle)
        self._order = lru_cache(maxsize=2 * len(rows_of_domain))(self._make_order)
        self._before = np.zeros_like(self.counts)
        """[period, domain]: number of draws before the period"""
        for number in range(1, len(periods)):
            self._before[number] = self.draws(int(self.starts[number]), number - 1)

    def draws(self, position: int, period: int | None = None) -> np.ndarray:
        """The number of rows of each domain before `position`, which is in `period` or at its end."""
        period = self._period(position) if period is None else period
        cycles, rest = divmod(position - int(self.starts[period]), CYCLE)
        slots, _ = self._cycle(period, cycles)
        started = np.bincount(slots[:rest], minlength=self.counts.shape[1])
        return np.asarray(self._before[period] + cycles * self.counts[period] + started)

    def row(self, position: int) -> int:
        """The row of the dataset at `position`."""
        period = self._period(position)
        cycle, place = divmod(position - int(self.starts[period]), CYCLE)
        slots, turns = self._cycle(period, cycle)
        domain = int(slots[place])
        draw = int(self._before[period, domain] + cycle * self.counts[period, domain] + turns[place])
        epoch, index = divmod(draw, len(self.rows_of_domain[domain]))
        return int(self._order(domain, epoch)[index])

    def _period(self, position: int) -> int:
        return int(np.searchsorted(self.starts, position, side="right")) - 1

    def _make_cycle(self, period: int, cycle: int) -> tuple[np.ndarray, np.ndarray]:
        """The domain of each draw in a cycle, and the number of earlier draws of the same domain in it."""
        slots = np.repeat(np.arange(self.counts.shape[1]), self.counts[period])
        slots = np.random.default_rng([self.seed, period, cycle, 1]).permutation(slots)
        turns = np.empty(CYCLE, np.int64)
        for domain, count in enumerate(self.counts[period]):
            turns[slots == domain] = np.arange(count)
        return slots, turns

    def _make_order(self, domain: int, epoch: int) -> np.ndarray:
        return np.random.default_rng([self.seed, domain, epoch, 2]).permutation(self.rows_of_domain[domain])


def _cut(shares: Sequence[float]) -> list[int]:
    """Divide CYCLE draws by shares, at least one for each share above 0."""
    total = sum(shares)
    ideal = [CYCLE * share / total for share in shares]
    counts = [max(1, int(value)) if value else 0 for value in ideal]
    # By largest remainder. The largest share pays for small ones that were rounded up.
    for index in sorted(range(len(ideal)), key=lambda i: counts[i] - ideal[i])[: max(0, CYCLE - sum(counts))]:
        counts[index] += 1
    counts[counts.index(max(counts))] += CYCLE - sum(counts)
    return counts
