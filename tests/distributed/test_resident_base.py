"""A base that each process holds whole, against one that is sharded: the same training, nothing gathered."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch

from srde_ds.checkpoint.layout import RUN_STATE, read_json
from srde_ds.config.schema import ParallelConfig
from srde_ds.model.base import load_base
from tests.distributed.harness import Ranks
from tests.distributed.test_few_hooks import Run, trained
from tests.distributed.training_helpers import Inputs, assert_same_training, train_here

RESIDENT = {"base_placement": "resident"}


def trained_in_shards(flags: dict[str, Any]) -> Run:
    """`trained` with a base that ZeRO holds, although this process is alone."""
    with patch.object(ParallelConfig, "whole_base", lambda *_: False):
        return trained(flags, True)


@pytest.mark.parametrize(
    ("processes", "options"),
    [
        (1, {}),
        (2, {}),
        (2, {"gradient_checkpointing": True, "bf16": True}),
        (2, {"num_atoms": 4}),
        (2, {"expert_parallel_size": 2}),
        (2, {"granularity": "element", "use_muon": False, "recompute": "selective"}),
    ],
)
def test_the_same_training_bit_for_bit(
    inputs: Inputs, one_rank: Ranks, two_ranks: Ranks, tmp_path: Path, processes: int, options: dict[str, Any]
) -> None:
    ranks = {1: one_rank, 2: two_ranks}[processes]
    flags = inputs.flags(tmp_path, gradient_accumulation_steps=1, **options)
    sharded: list[Run] = ranks(trained_in_shards, flags)
    resident: list[Run] = ranks(trained, flags | RESIDENT, True)
    for (losses, values, many), (same_losses, same_values, few) in zip(sharded, resident, strict=True):
        assert losses == same_losses and len(losses) == 2
        assert values.keys() == same_values.keys()
        for name, value in values.items():
            assert torch.equal(value, same_values[name]), name
        assert few == (1 if processes == 1 else many)


def test_a_run_goes_on_with_the_other_placement(
    inputs: Inputs, two_ranks: Ranks, reference: Path, tmp_path: Path
) -> None:
    first = inputs.flags(tmp_path / "first", max_steps=6) | RESIDENT
    assert two_ranks(train_here, first) == [None, None]
    assert_same_training(tmp_path / "first", reference, same_cut=True, tolerance=0)
    for source, placement in ((tmp_path / "first", "sharded"), (reference, "resident")):
        flags = inputs.flags(tmp_path / placement, resume_from=str(source / "checkpoint-3"), base_placement=placement)
        assert two_ranks(train_here, flags) == [None, None]
        assert_same_training(tmp_path / placement, reference, first_step=4, same_cut=True, tolerance=0)


def train_on_unlike_hosts(flags: dict[str, Any]) -> None:
    """`srde_ds.train` where rank 1 has no room for anything, and rank 0 has enough."""
    from srde_ds import api
    from srde_ds.planner import settle

    room = 0.0 if os.environ["RANK"] == "1" else 2.0**60
    with patch.object(settle, "available_memory", lambda: room), patch.object(api, "stop_processes", lambda: None):
        api.train(**flags)


def test_hosts_with_unlike_memory_agree_on_what_fits_all(inputs: Inputs, two_ranks: Ranks, tmp_path: Path) -> None:
    auto = {"base_placement": "auto", "recompute": "auto"}
    once = {"max_steps": 1, "warmup_steps": 0, "save_steps": 0, "eval_steps": 0}
    two_ranks(train_on_unlike_hosts, inputs.flags(tmp_path, **auto, **once))
    options = read_json(tmp_path / "checkpoint-1" / RUN_STATE)["config"]
    assert (options["parallel"]["base_placement"], options["model"]["recompute"]) == ("sharded", "full")


def with_another_weight(flags: dict[str, Any]) -> str | None:
    """`train_here`, but rank 1 reads another base."""
    from srde_ds.distributed import engine

    def changed(*arguments: Any, **options: Any) -> Any:
        base = load_base(*arguments, **options)
        if torch.distributed.get_rank() == 1:
            base.get_input_embeddings().weight.mul_(2)  # type: ignore[operator]
        return base

    with patch.object(engine, "load_base", changed):
        return train_here(flags)


def test_ranks_that_read_other_weights_are_refused(inputs: Inputs, two_ranks: Ranks, tmp_path: Path) -> None:
    for error in two_ranks(with_another_weight, inputs.flags(tmp_path / "run") | RESIDENT):
        assert error is not None and "hash of the base's weights differs" in error and "on rank 1" in error
    assert not (tmp_path / "run").exists()
