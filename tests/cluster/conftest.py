"""Hosts for the tests of launchers and faults: made once, brought back to their first state after each test."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cluster.hosts import Hosts, missing
from tests.cluster.training import small_run
from tests.distributed.harness import Ranks
from tests.distributed.training_helpers import Inputs, make_inputs, train_here


@pytest.fixture(scope="session")
def all_hosts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hosts]:
    if reason := missing():
        pytest.skip(f"hosts: {reason}")
    with Hosts(3, tmp_path_factory.mktemp("hosts")) as hosts:
        yield hosts


@pytest.fixture
def hosts(all_hosts: Hosts) -> Iterator[Hosts]:
    """node1, node2 and node3, up and connected, with nothing running on them."""
    yield all_hosts
    all_hosts.clear()


@pytest.fixture(scope="session")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Inputs:
    return make_inputs(tmp_path_factory.mktemp("inputs"))


@pytest.fixture(scope="session")
def two_processes(inputs: Inputs, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the small run on two processes of this machine, without a launcher."""
    folder = tmp_path_factory.mktemp("two_processes") / "run"
    with Ranks(2) as ranks:
        assert ranks(train_here, small_run(inputs, folder, processes=2)) == [None, None]
    return folder
