"""Trainables that are cut over other ranks, or in other places, than the optimizer believes are found at start."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch.distributed as dist

from srde_ds.config import resolve
from srde_ds.errors import SRDEError
from srde_ds.model.adapter import add_experts
from srde_ds.model.base import Sharding
from tests.distributed.harness import Ranks
from tests.distributed.training_helpers import Inputs, train_here


def misplacements(flags: dict[str, Any]) -> dict[str, str]:
    """The message of `verify_placement` for each thing that can be wrong; "" where it finds nothing."""
    from srde_ds.distributed.engine import build_engine, build_model
    from srde_ds.distributed.processes import start_processes
    from srde_ds.distributed.zero_placement import verify_placement

    config = resolve({}, flags)
    topology = start_processes(60)
    model = build_model(config, topology)
    built = build_engine(model, config, topology)
    engine = built.deepspeed
    name, parameter = next(model.trainable_parameters())
    alone = [dist.new_group([rank]) for rank in range(topology.world_size)][topology.rank]

    def message() -> str:
        try:
            verify_placement(engine, model)
        except SRDEError as error:
            return str(error)
        return ""

    found = {"nothing": message()}
    with patch.object(parameter, "ds_process_group", alone):
        found["alone"] = message()
    with patch.object(parameter, "ds_process_group", dist.group.WORLD):
        found["everyone"] = message()
    with patch.object(parameter, "partition_numel", lambda: 7):
        found["size"] = message()
    with patch.object(engine.optimizer, "fp16_groups", engine.optimizer.fp16_groups[1:]):
        found["no master"] = message()
    return {key: text.replace(name, "NAME") for key, text in found.items()}


def test_a_trainable_in_the_wrong_place_is_named(inputs: Inputs, two_ranks: Ranks, tmp_path: Path) -> None:
    for rank, found in enumerate(two_ranks(misplacements, inputs.flags(tmp_path))):
        assert found["nothing"] == ""
        assert found["alone"] == f"placement: rank {rank}: 'NAME' is cut over ranks [{rank}], expected [0, 1]."
        assert found["everyone"] == ""
        assert found["size"].startswith(f"placement: rank {rank}: 'NAME' holds 7 values, expected ")
        assert found["no master"] == f"placement: rank {rank}: 'NAME' is trainable but has no fp32 master."


def test_an_expert_in_the_wrong_place_is_named(inputs: Inputs, two_ranks: Ranks, tmp_path: Path) -> None:
    """With two ranks that share the experts, each rank's are its own alone."""
    for rank, found in enumerate(two_ranks(misplacements, inputs.flags(tmp_path, expert_parallel_size=2))):
        assert found["nothing"] == found["alone"] == ""
        assert found["everyone"] == f"placement: rank {rank}: 'NAME' is cut over ranks [0, 1], expected [{rank}]."
        assert found["size"].startswith(f"placement: rank {rank}: 'NAME' holds 7 values, expected ")


def train_without_padding(flags: dict[str, Any]) -> str | None:
    from srde_ds.distributed import engine

    def unpadded(*args: Any, sharding: Sharding, **kwargs: Any) -> Any:
        return add_experts(*args, sharding=Sharding(sharding.gather), **kwargs)

    with patch.object(engine, "add_experts", unpadded):
        return train_here(flags)


def test_rows_that_ranks_do_not_divide_must_be_padded(inputs: Inputs, four_ranks: Ranks, tmp_path: Path) -> None:
    """D 30 on four ranks; with padding it trains as on one: test_training_equivalence."""
    for error in four_ranks(train_without_padding, inputs.flags(tmp_path / "run")):
        assert error is not None and "layers.0.deltas.free" in error and "not whole rows" in error
