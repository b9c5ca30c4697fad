"""The memory model against what autograd keeps and what the allocator hands out in a tiny run."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor

from srde_ds.config import resolve
from srde_ds.distributed.expert_traffic import choose_transport
from srde_ds.distributed.workload import Workload
from srde_ds.model.base_shape import base_shape
from srde_ds.model.policy import RoutingPolicy
from srde_ds.planner.activations import (
    checkpointed_input,
    head_activations,
    layer_activations,
    shared_activations,
)
from srde_ds.planner.memory import memory
from tests.distributed.harness import Ranks
from tests.distributed.measures import Allocated, allocated, count_saved, train_measuring
from tests.distributed.training_helpers import MAX_LENGTH, Inputs

ELEMENT = {"granularity": "element", "use_muon": False}
RESIDENT = {"base_placement": "resident"}
TOKENS = {"expert_parallel_size": 2, "expert_transport": "tokens"}


def run_flags(inputs: Inputs, folder: Path, **changes: Any) -> dict[str, Any]:
    once = {"max_steps": 2, "warmup_steps": 1, "eval_steps": 0, "save_steps": 0, "log_steps": 100}
    return inputs.flags(folder / "run", **once | {"batch_size": 2, "gradient_accumulation_steps": 1} | changes)


def saved(flags: dict[str, Any]) -> tuple[int, float]:
    """Bytes that autograd keeps of the second step's forward, and the share of labelled positions."""
    from srde_ds.distributed.engine import Engine

    forward, found = Engine.forward, []

    def counted(engine: Engine, batch: dict[str, torch.Tensor], *policy: RoutingPolicy) -> Any:
        attributes = [value for part in engine.model.modules() for value in vars(part).values()]
        frozen = [value for value in attributes if isinstance(value, Tensor)]  # of a whole base
        with count_saved([*engine.model.parameters(), *frozen]) as kept:
            output = forward(engine, batch, *policy)
        labelled = (batch["labels"][:, 1:] != -100).any(0).sum() / MAX_LENGTH
        found.append((kept(), float(labelled)))
        return output

    @contextmanager
    def watched() -> Iterator[list[tuple[int, float]]]:
        with patch.object(Engine, "forward", counted):
            yield found

    return train_measuring(flags, 2, watched)[-1]


@pytest.mark.parametrize(
    ("processes", "options", "tolerance"),
    [
        (1, {}, 0.01),
        (1, {"bf16": True}, 0.01),
        (1, {"gradient_checkpointing": True}, 0.01),
        (1, {"num_atoms": 4}, 0.01),
        (1, {"support_scope": "per_expert"}, 0.01),
        (1, {"neuron_parts": 3}, 0.01),
        (1, {"shared_expert_density": 0.1}, 0.01),
        (1, ELEMENT, 0.01),
        (2, {"num_atoms": 4}, 0.01),
        (2, {"num_atoms": 4} | RESIDENT, 0.01),
        (2, {"expert_parallel_size": 2, "expert_transport": "deltas"}, 0.01),
        # Not as many rows arrive as leave: two of the three experts are on one rank.
        (2, TOKENS, 0.1),
        # And the first layer's experts keep less: three of ten values of a row need no gradient there.
        (2, TOKENS | ELEMENT, 0.15),
    ],
)
def test_saved_activations_are_those_of_the_model(
    inputs: Inputs,
    one_rank: Ranks,
    two_ranks: Ranks,
    tmp_path: Path,
    processes: int,
    options: dict[str, Any],
    tolerance: float,
) -> None:
    flags = run_flags(inputs, tmp_path, **options)
    config = resolve({}, flags)
    work = Workload.of(config, processes)
    shape, ranks = base_shape(config), one_rank if processes == 1 else two_ranks
    for measured, labelled in ranks(saved, flags):
        transport = choose_transport(work, shape.blocks)
        checkpointing = work.recomputed == "full"
        expected = head_activations(work, shape, labelled)["head"]  # no logits are kept
        if not checkpointing:
            expected += shared_activations(work, shape.layers[0])["attention"]
        for number, layer in enumerate(shape.layers):
            if checkpointing:
                expected += checkpointed_input(work, layer)
            else:
                expected += sum(layer_activations(work, layer, transport, first=number == 0).values())
        assert measured == pytest.approx(expected, rel=tolerance)


def peak(flags: dict[str, Any]) -> Allocated:
    found: Allocated = train_measuring(flags, 2, allocated)
    return found


@pytest.mark.parametrize(("processes", "options"), [(1, {}), (1, {"gradient_checkpointing": True}), (2, RESIDENT)])
def test_peak_is_that_of_the_model(inputs: Inputs, tmp_path: Path, processes: int, options: dict[str, Any]) -> None:
    """In fresh processes; the gradient bucket is small so that it does not hide the rest."""
    (tmp_path / "ds.json").write_text('{"zero_optimization": {"stage": 3, "reduce_bucket_size": 1000}}')
    flags = run_flags(inputs, tmp_path, batch_size=8, deepspeed_config=str(tmp_path / "ds.json"), **options)
    config = resolve({}, flags)
    with Ranks(processes) as ranks:
        found = ranks(peak, flags)[0]
    predicted = memory(Workload.of(config, processes), base_shape(config), labelled=max(found.labelled))
    assert max(found.peaks.values()) == pytest.approx(predicted.total, rel=0.1)
