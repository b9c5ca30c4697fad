"""Inputs and processes that all training tests share."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.distributed.harness import Ranks
from tests.distributed.training_helpers import Inputs, make_inputs, train_here


@pytest.fixture(scope="session")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Inputs:
    return make_inputs(tmp_path_factory.mktemp("inputs"))


@pytest.fixture(scope="session")
def two_ranks() -> Iterator[Ranks]:
    with Ranks(2) as ranks:
        yield ranks


@pytest.fixture(scope="session")
def one_rank() -> Iterator[Ranks]:
    with Ranks(1) as ranks:
        yield ranks


@pytest.fixture(scope="session")
def four_ranks() -> Iterator[Ranks]:
    with Ranks(4) as ranks:
        yield ranks


@pytest.fixture(scope="module")
def ranks(one_rank: Ranks, two_ranks: Ranks, four_ranks: Ranks) -> Iterator[dict[int, Ranks]]:
    """By their number; three and six only as long as a module needs them."""
    with Ranks(3) as three, Ranks(6) as six:
        yield {1: one_rank, 2: two_ranks, 3: three, 4: four_ranks, 6: six}


@pytest.fixture(scope="session")
def reference(inputs: Inputs, two_ranks: Ranks, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run folder of six uninterrupted steps on two processes, four micro-steps each."""
    folder = tmp_path_factory.mktemp("reference") / "run"
    assert two_ranks(train_here, inputs.flags(folder)) == [None, None]
    return folder
