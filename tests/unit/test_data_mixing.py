"""Domains take turns by their shares, in an order that needs no history."""

from __future__ import annotations

import time
from collections import Counter

import numpy as np
import pytest

from srde_ds.data.loader import RowStream
from srde_ds.data.mixing import CYCLE, MixingPeriod, Mixture, mixing_periods, parse_domain_weights
from srde_ds.errors import SRDEError
from tests.data_helpers import rows, step_rows

DOMAINS = ["math", "logic", "code"]


def mixture(periods: list[MixingPeriod], sizes: tuple[int, ...] = (30, 20, 10), rows_per_step: int = 8) -> Mixture:
    starts = np.cumsum([0, *sizes])
    places = [np.arange(a, b) for a, b in zip(starts, starts[1:], strict=False)]
    return Mixture(periods, places, seed=1, rows_per_step=rows_per_step)


def drawn(mix: Mixture, start: int, stop: int) -> list[int]:
    return [mix.row(position) for position in range(start, stop)]


def domain(row: int) -> int:
    return 0 if row < 30 else 1 if row < 50 else 2


def test_each_cycle_has_exactly_its_shares() -> None:
    mix = mixture([MixingPeriod(0, (5.0, 3.0, 2.0))])
    counts = Counter(map(domain, drawn(mix, 0, CYCLE)))
    assert counts == {0: 5000, 1: 3000, 2: 2000}
    assert mix.draws(CYCLE).tolist() == [5000, 3000, 2000]
    early = Counter(map(domain, drawn(mix, 0, 500)))
    assert early[0] == pytest.approx(250, abs=50) and mix.draws(500).tolist() == [early[d] for d in range(3)]


def test_each_domain_has_epochs_of_its_own() -> None:
    order = drawn(mixture([MixingPeriod(0, (1.0, 1.0, 1.0))]), 0, 2 * CYCLE + 100)
    for number, size in ((0, 30), (1, 20), (2, 10)):
        mine = [row for row in order if domain(row) == number]
        epochs = [mine[i : i + size] for i in range(0, len(mine) - size, size)]
        assert all(len(set(epoch)) == size for epoch in epochs) and len(set(map(tuple, epochs))) > len(epochs) * 0.9


def test_any_position_is_found_without_history() -> None:
    periods = [
        MixingPeriod(0, (1.0, 1.0, 0.0)),
        MixingPeriod(300, (0.0, 1.0, 3.0)),
        MixingPeriod(4000, (1.0, 1.0, 1.0)),
    ]
    order = drawn(mixture(periods), 0, 40_000)
    fresh = mixture(periods)
    for position in (39_999, 2400, 2399, 31_999, 32_000, 0):
        assert fresh.row(position) == order[position]
    assert {domain(row) for row in order[:2400]} == {0, 1} and {domain(row) for row in order[2400:32_000]} == {1, 2}
    for position in (0, 100, 2400, 2500, 32_000, 40_000):
        counts = Counter(map(domain, order[:position]))
        assert fresh.draws(position).tolist() == [counts[number] for number in range(3)]
    # A domain goes on where it was when the shares change.
    logic = [row for row in order if domain(row) == 1]
    assert all(len(set(logic[i : i + 20])) == 20 for i in range(0, len(logic) - 20, 20))


def test_small_shares_come_up_and_zero_ones_do_not() -> None:
    mix = mixture([MixingPeriod(0, (1e6, 1e-3, 0.0))])
    assert mix.counts.tolist() == [[CYCLE - 1, 1, 0]]
    assert mixture([MixingPeriod(0, (1.0, 1.0, 1.0))]).counts.sum() == CYCLE


def test_options_become_phases() -> None:
    assert mixing_periods(None, 1.0, DOMAINS, [9, 4, 1]) is None
    (period,) = mixing_periods(None, 2.0, DOMAINS, [9, 4, 1]) or []
    assert period.shares == pytest.approx((3, 2, 1))
    assert mixing_periods("math=2, code=.5", 1.0, DOMAINS, [9, 4, 1]) == [MixingPeriod(0, (2.0, 0.0, 0.5))]
    later = mixing_periods("logic=1; 500: math=1,code=1;900:code=1", 1.0, DOMAINS, [9, 4, 1])
    assert later == [MixingPeriod(0, (0, 1, 0)), MixingPeriod(500, (1, 0, 1)), MixingPeriod(900, (0, 0, 1))]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("maths=1", "unknown domain 'maths'. Did you mean 'math'?"),
        ("math", "'math' must be a domain, '=' and a number"),
        ("math=much", "'math=much' must be a domain"),
        ("math=-1", "math=-1 must be 0 or a positive number"),
        ("math=inf", "must be 0 or a positive number"),
        ("math=0,code=0", "at least one domain needs a weight above 0"),
        ("5: math=1", "the step of each later change"),
        ("math=1; code=1", "the step of each later change"),
        ("math=1; x: code=1", "the step of each later change"),
        ("math=1; 0: code=1", "steps must increase, but 0 does not"),
        ("math=1; 9: code=1; 5: math=1", "steps must increase, but 5 does not"),
    ],
)
def test_weights_of_another_form_are_refused(text: str, message: str) -> None:
    with pytest.raises(SRDEError) as caught:
        parse_domain_weights(text, DOMAINS)
    assert message in str(caught.value) and f"domain_weights={text}" in str(caught.value)


def test_options_that_do_not_fit_the_data_are_refused() -> None:
    with pytest.raises(SRDEError, match="the dataset has no rows of 'logic'"):
        mixing_periods("math=1,logic=1", 1.0, DOMAINS, [5, 0, 5])
    with pytest.raises(SRDEError, match="mixing_temperature=2.0: give one of them"):
        mixing_periods("math=1", 2.0, DOMAINS, [5, 5, 5])
    assert mixing_periods(None, 2.0, DOMAINS, [4, 0, 4]) == [MixingPeriod(0, (2.0, 0.0, 2.0))]


@pytest.mark.parametrize(("world", "batch", "accumulation"), [(1, 4, 2), (2, 2, 2), (4, 1, 2), (8, 1, 1)])
def test_ranks_cut_one_mixed_order(world: int, batch: int, accumulation: int) -> None:
    periods = [MixingPeriod(0, (3.0, 1.0)), MixingPeriod(2, (0.0, 1.0))]
    stream = RowStream(rows(21), seed=3, global_batch_rows=8, periods=periods)
    for step in range(4):
        assert step_rows(stream, step, world, batch, accumulation) == stream.rows_of_step(step)
    part = stream.micro_batch(3, 0, rank=0, world_size=world, batch_size=batch)
    assert part["domain"].tolist() == [1] * batch


def test_epochs_are_told() -> None:
    mixed = RowStream(rows(21), seed=3, global_batch_rows=8, periods=[MixingPeriod(0, (0.0, 1.0))])
    assert mixed.epochs(5) == [0.0, 4.0]
    assert RowStream(rows(20), seed=3, global_batch_rows=8).epochs(5) == [2.0]


def test_a_late_step_of_a_large_dataset_is_found_at_once() -> None:
    sizes = (300_000, 90_000, 10_000)
    starts = np.cumsum([0, *sizes])
    places = [np.arange(a, b) for a, b in zip(starts, starts[1:], strict=False)]
    started = time.process_time()
    mix = Mixture(
        [MixingPeriod(0, (1.0, 2.0, 3.0)), MixingPeriod(10**6, (1.0, 1.0, 1.0))], places, seed=0, rows_per_step=256
    )
    found = [mix.row(256 * 3 * 10**6 + i) for i in range(256)]
    assert time.process_time() - started < 10 and len(set(found)) > 200
