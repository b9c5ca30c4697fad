"""A few of the kills that benchmarks/kills.py does by the hundred; docs/checkpoints.md has its results."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from tests.distributed.kill_helpers import KEEP, SAVING, killed_run
from tests.distributed.training_helpers import Inputs, latest


@pytest.mark.parametrize(("world_size", "kills", "seed"), [(1, 4, 0), (2, 3, 1)])
def test_a_run_that_is_killed_again_and_again_ends_as_if_it_had_not_been(
    inputs: Inputs, tmp_path: Path, world_size: int, kills: int, seed: int
) -> None:
    moments = list(
        killed_run(inputs, tmp_path, random.Random(seed), world_size=world_size, in_background=True, most_kills=kills)
    )
    assert 1 < len(moments) <= kills  # a quick machine may end the run before the last
    assert any(kill.phase in SAVING for kill in moments)
    assert latest(tmp_path / "killed") == latest(tmp_path / f"unkilled-{world_size}")
    assert len(list((tmp_path / "killed").glob("checkpoint-*"))) == KEEP
