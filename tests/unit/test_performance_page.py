"""docs/performance.md says what the records say."""

from __future__ import annotations

from benchmarks import performance
from benchmarks.tables import ROOT, markers


def between(name: str) -> str:
    begin, end = markers(name)
    return (ROOT / "docs" / performance.PAGE).read_text().split(begin)[1].split(end)[0].strip()


def test_the_page_is_made_from_the_records() -> None:
    how = "run `python -m benchmarks.performance`"
    assert between("goals") == performance.goals_table().strip(), how
    assert between("side by side") == performance.side_by_side().strip(), how


def test_a_goal_is_reached_or_not() -> None:
    assert performance.at_most(1.05, 1.05).reached and not performance.at_most(1.06, 1.05).reached
    assert performance.at_least(1.4, 1.4).reached and not performance.at_least(1.39, 1.4).reached
    assert performance.median_ratio([2, 4, 9], [1, 2, 3]) == 2
    assert performance.median_ratio([2, 6], [1, 2]) == 2.5
