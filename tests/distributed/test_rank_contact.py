"""Ranks that differ, ranks that never meet, a rank killed while they meet, and an exception on one rank."""

from __future__ import annotations

import json
import re
import time
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist

from srde_ds.data import manifest
from srde_ds.errors import SRDEError
from srde_ds.liveness.status import Reporter
from tests.distributed.harness import Ranks, free_port, run_distributed
from tests.distributed.kill_helpers import ended, ranks, train_rank, wait_until
from tests.distributed.training_helpers import Inputs, train_here


def train_otherwise(flags: dict[str, Any], rank_1: dict[str, Any], transformers: str) -> str | None:
    """`train_here`, with other options and another version of transformers on rank 1."""
    from srde_ds.training import consistency
    from srde_ds.utils.environment import package_versions

    if dist.get_rank() == 0:
        return train_here(flags)
    versions = package_versions() | ({"transformers": transformers} if transformers else {})
    with patch.object(consistency, "package_versions", lambda: versions):
        return train_here(flags | rank_1)


def test_ranks_that_differ_are_refused(inputs: Inputs, two_ranks: Ranks, tmp_path: Path) -> None:
    flags = inputs.flags(tmp_path / "run")
    for rank_1, version, text in (
        ({}, "0.0.1", "version of transformers differs: 0.0.1 on rank 1 (host "),
        ({"seed": 43}, "", "option training.seed differs: 43 on rank 1 (host "),
        ({"pretokenized_dir": inputs.other_dataset}, "", "option data.pretokenized_dir differs"),
    ):
        first, second = two_ranks(train_otherwise, flags, rank_1, version)
        assert first == second and first.startswith(text)
    assert not (tmp_path / "run").exists()


def group_timeouts() -> set[float]:
    """Seconds of all process groups after DeepSpeed has made one of its own."""
    from srde_ds.distributed import deepspeed_internals, processes

    dist.destroy_process_group()  # the harness's
    processes.start_processes(33)
    deepspeed_internals.deepspeed.utils.groups._clone_world_group()
    groups: list[Any] = list(dist.distributed_c10d._world.pg_map)
    assert len(groups) == 2
    return {group._get_backend(torch.device("cpu")).options._timeout.total_seconds() for group in groups}


def test_the_timeout_holds_for_the_groups_that_deepspeed_makes() -> None:
    assert run_distributed(group_timeouts, 1) == [{33.0}]


def counted_collectives() -> int:
    """Those of this rank's report after one in each group of all ranks, and some of rank 0 alone."""
    alone, everyone = dist.new_group([0]), dist.new_group()
    for group in (None, everyone, *[alone] * (3 if dist.get_rank() == 0 else 0)):
        dist.all_reduce(torch.ones(1), group=group)
    return Reporter(dist.get_rank()).report().collectives


def test_only_collectives_of_all_ranks_tell_who_is_late() -> None:
    """Ranks whose experts are locked have fewer with those that hold the same experts, and are not late."""
    first, second = run_distributed(counted_collectives, 2)
    assert first == second >= 2


def train_with_late_files(flags: dict[str, Any]) -> str | None:
    """`train_here`, where rank 1 does not see the rows at its first three looks."""
    from srde_ds.training import trainer

    looks: list[Path] = []

    def load_manifest(folder: Path) -> Any:
        looks.append(folder)
        if dist.get_rank() == 1 and len(looks) < 4:
            raise SRDEError("no such folder")
        return manifest.load_manifest(folder)

    with patch.object(trainer, "load_manifest", load_manifest):
        return train_here(flags)


def test_rows_that_the_other_hosts_do_not_see_yet_are_waited_for(
    inputs: Inputs, two_ranks: Ranks, tmp_path: Path
) -> None:
    flags = inputs.flags(tmp_path / "run", pretokenized_dir=None, jsonl_data=inputs.jsonl, max_steps=1, warmup_steps=0)
    assert two_ranks(train_with_late_files, flags | {"eval_steps": 0}) == [None, None]


def test_a_rank_that_is_alone_says_whom_it_waits_for(inputs: Inputs, tmp_path: Path) -> None:
    log = tmp_path / "log"
    flags = inputs.flags(tmp_path / "run", start_timeout=10)
    for rank, text in (
        (0, "error: rank 1 did not start within 10 s; there are processes on "),
        (1, "LostContact: rank 0 did not answer at 127.0.0.1:"),
    ):
        with ranks(flags, 2, log) as processes:
            processes[1 - rank].kill()
            assert ended(processes)[rank] == 1
        assert text in log.read_text()


def test_a_rank_killed_while_the_ranks_meet_ends_the_other(inputs: Inputs, tmp_path: Path) -> None:
    """Before it opens the store, and in between: never longer than the limit, as it once was."""
    flags = inputs.flags(tmp_path / "run", max_steps=10_000, warmup_steps=0, collective_timeout=30, start_timeout=15)
    for victim, seconds in ((0, 1.5), (1, 2.5), (1, 4.0)):
        with ranks(flags, 2, tmp_path / "log") as processes:
            time.sleep(seconds)
            processes[victim].kill()
            assert ended(processes) == ([-9, 1] if victim == 0 else [1, -9])


def train_out_of_luck(flags: dict[str, Any], environment: dict[str, str], log: Path) -> None:
    """`train_rank`; on rank 1 the first forward after a checkpoint raises."""
    from srde_ds.model.adapter import SRDEModel

    forward = SRDEModel.forward

    def unlucky(*args: Any, **kwargs: Any) -> Any:
        if (Path(flags["output_dir"]) / "latest").exists():
            raise RuntimeError("out of luck")
        return forward(*args, **kwargs)

    with patch.object(SRDEModel, "forward", unlucky if environment["RANK"] == "1" else forward):
        train_rank(flags, environment, log)


def test_an_exception_on_one_rank_ends_all_and_is_named(inputs: Inputs, tmp_path: Path) -> None:
    run, log = tmp_path / "run", tmp_path / "log"
    flags = inputs.flags(run, save_steps=1, eval_steps=0)
    with ranks(flags, 2, log, target=train_out_of_luck) as processes:
        assert ended(processes) == [1, 1]
    heartbeat = json.loads((run / "heartbeat.json").read_text())
    assert heartbeat["state"] == "failed"
    assert re.search(r"rank 1 \(host .*, process \d+\) failed: RuntimeError: out of luck", heartbeat["reason"])
    saved = (run / "latest").read_text().strip().removeprefix("checkpoint-")
    with ranks(flags | {"resume_from": "latest"}, 2, log) as processes:
        assert ended(processes) == [0, 0], log.read_text()
    assert f"Resumed at step {saved}" in log.read_text() and (run / "completed.json").exists()


def test_a_second_run_on_the_port_fails_at_once_and_the_first_lives_on(inputs: Inputs, tmp_path: Path) -> None:
    """With a folder of its own, and with the first one's: neither may reach the first run."""
    first, port = tmp_path / "first", free_port()
    flags = inputs.flags(first, max_steps=60, save_steps=1, eval_steps=0, warmup_steps=0, start_timeout=600)
    with ranks(flags, 2, tmp_path / "log", port=port) as processes:
        wait_until(lambda: (first / "latest").exists(), processes, tmp_path / "log")
        for name in ("second", "first"):
            log = tmp_path / f"{name}-again"
            with ranks(flags | {"output_dir": str(tmp_path / name)}, 2, log, port=port) as newcomers:
                assert ended(newcomers) == [1, 1]
            found = log.read_text()
            assert f"LostContact: port {port} cannot be opened" in found
            assert f"LostContact: port {port} of 127.0.0.1 belongs to another run" in found or name == "first"
            full = f"LostContact: rank 0 answers at 127.0.0.1:{port}, but not at its port"
            assert (full in found and "the run there has all its ranks" in found) or name == "second"
        assert not (tmp_path / "second").exists()
        assert ended(processes) == [0, 0], (tmp_path / "log").read_text()
    assert len((first / "metrics.jsonl").read_text().splitlines()) == 60
    assert not list(tmp_path.glob(".srde-ds-*"))
