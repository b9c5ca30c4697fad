"""A few of the kills that benchmarks/kills.py does by the hundred; docs/checkpoints.md has its results."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from tests.distributed.kill_helpers import KEEP, SAVING, Case, killed_run, unkilled_folder
from tests.distributed.training_helpers import Inputs, latest


@pytest.mark.parametrize(("case", "kills", "seed"), [(Case(1, prunings=True), 4, 0), (Case(2), 3, 1)])
def test_a_run_that_is_killed_again_and_again_ends_as_if_it_had_not_been(
    inputs: Inputs, tmp_path: Path, case: Case, kills: int, seed: int
) -> None:
    moments = list(killed_run(inputs, tmp_path, random.Random(seed), case, most_kills=kills))
    assert 1 < len(moments) <= kills  # a quick machine may end the run before the last
    assert any(kill.phase in SAVING for kill in moments)
    assert latest(tmp_path / "killed") == latest(unkilled_folder(tmp_path, case))
    assert len(list((tmp_path / "killed").glob("checkpoint-*"))) == KEEP
