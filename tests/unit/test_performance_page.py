"""docs/performance.md says what the records say."""

from __future__ import annotations

import pytest

from benchmarks import performance
from benchmarks.quantized_base import comparison, table
from benchmarks.tables import ROOT, markers


def between(name: str) -> str:
    begin, end = markers(name)
    return (ROOT / "docs" / performance.PAGE).read_text().split(begin)[1].split(end)[0].strip()


def test_the_page_is_made_from_the_records() -> None:
    how = "run `python -m benchmarks.performance`"
    assert between("goals") == performance.goals_table().strip(), how
    assert between("side by side") == performance.side_by_side().strip(), how


def test_a_quantised_base_is_compared_seed_by_seed() -> None:
    runs = [
        {
            "quantization": kind,
            "seed": seed,
            "held_out_at_start": 2.0 + extra,
            "held_out": 1.0 + end,
            "losses": [3, 3, end, 2 * end],
        }
        for kind, seed, extra, end in (("none", 0, 0, 0.0), ("none", 1, 0, 0.5), ("nf4", 0, 0.25, 0.125))
    ]
    found = comparison(runs, "nf4")
    assert found.pop("late_interval") == pytest.approx(12.706 * 0.125 / 2, rel=1e-4)  # of two differences, 0.125 apart
    assert found == {"seeds": 1, "at_start": 0.25, "held_out": 0.125, "late": 0.1875}
    assert "| 4 bits | 0 | 2.2500 | 1.1250 | 0.1875 |" in table([run | {"seconds": 1} for run in runs])


def test_a_goal_is_reached_or_not() -> None:
    assert performance.at_most(1.05, 1.05).reached and not performance.at_most(1.06, 1.05).reached
    assert performance.at_least(1.4, 1.4).reached and not performance.at_least(1.39, 1.4).reached
    assert performance.median_ratio([2, 4, 9], [1, 2, 3]) == 2
    assert performance.median_ratio([2, 6], [1, 2]) == 2.5
