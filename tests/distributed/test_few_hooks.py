"""A decoder layer is one module to DeepSpeed: fewer hooks, and nothing else changes."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import pytest
from torch import Tensor

from srde_ds.config import resolve
from tests.distributed.harness import Ranks
from tests.distributed.training_helpers import Inputs, assert_close

Run = tuple[list[float], dict[str, Tensor], int]


def trained(flags: dict[str, Any], hooked_as_one: bool) -> Run:
    """Losses of two steps on this rank, masters and moments after them, and how many modules DeepSpeed has hooked."""
    from srde_ds.distributed import deepspeed_internals as internals
    from srde_ds.distributed.engine import Engine, build_engine, build_model
    from srde_ds.distributed.processes import start_processes
    from tests.distributed.engine_helpers import run_steps, state

    config, topology = resolve({}, flags), start_processes(60)
    losses: list[float] = []
    forward = Engine.forward

    def noted(engine: Engine, *arguments: Any) -> Any:
        result = forward(engine, *arguments)
        losses.append(float(result[0]))
        return result

    with patch.object(internals, "hooked_as_one", internals.hooked_as_one if hooked_as_one else nullcontext):
        engine = build_engine(build_model(config, topology), config, topology)
    with patch.object(Engine, "forward", noted):
        run_steps(engine, config, topology, steps=2)
    values = {f"{part.name} {part.kind}": part.data.clone() for part in state(engine)}
    hooked = sum(hasattr(module, "ds_id") for module in engine.model.modules())
    engine.close()
    return losses, values, hooked


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("expert_parallel_size", [1, 2])
def test_the_same_training_with_fewer_hooks(
    inputs: Inputs, two_ranks: Ranks, tmp_path: Path, expert_parallel_size: int, checkpointing: bool
) -> None:
    flags = inputs.flags(
        tmp_path,
        gradient_checkpointing=checkpointing,
        expert_parallel_size=expert_parallel_size,
        gradient_accumulation_steps=1,
        max_grad_norm=0.0,  # it would hide gradients that are too large
    )
    each: list[Run] = two_ranks(trained, flags, False)
    as_one: list[Run] = two_ranks(trained, flags, True)
    for (losses, values, many), (same_losses, same_values, few) in zip(each, as_one, strict=True):
        assert losses == pytest.approx(same_losses, rel=1e-6)  # sums of gradients in another order
        assert values.keys() == same_values.keys() and len(values) > 8
        for name, value in values.items():
            assert_close(value, same_values[name], 1e-3, name)
        assert few < many / 2


def test_selective_recomputation_trains_the_same(inputs: Inputs, two_ranks: Ranks, tmp_path: Path) -> None:
    flags = inputs.flags(tmp_path, gradient_accumulation_steps=1, max_grad_norm=0.0)
    plain: list[Run] = two_ranks(trained, flags, True)
    selective: list[Run] = two_ranks(trained, flags | {"recompute": "selective"}, True)
    for (losses, values, _), (same_losses, same_values, _) in zip(plain, selective, strict=True):
        assert losses == pytest.approx(same_losses, rel=1e-6)
        for name, value in values.items():
            assert_close(value, same_values[name], 1e-3, name)


def test_groups_are_gathered_in_one_order() -> None:
    from srde_ds.distributed import deepspeed_internals as internals

    asked: list[list[int]] = []

    class Coordinator:
        def _PartitionedParameterCoordinator__all_gather_params_(self, parameters: Any, forward: bool) -> None:
            asked.append([parameter.ds_id for parameter in parameters])

    with patch.object(internals, "PartitionedParameterCoordinator", Coordinator):
        internals.gather_in_one_order()
        internals.gather_in_one_order()  # of the next engine
        gather = Coordinator()._PartitionedParameterCoordinator__all_gather_params_
        gather([SimpleNamespace(ds_id=number) for number in (3, 1, 2)], True)
    assert asked == [[1, 2, 3]]
