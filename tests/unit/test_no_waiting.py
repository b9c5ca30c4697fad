"""A training step asks a GPU for no value before its end: here the device is `meta`, whose values nobody can have."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor

from srde_ds.config import Config
from srde_ds.data.loader import RowStream
from srde_ds.distributed.engine import Engine
from srde_ds.distributed.processes import Topology
from srde_ds.model.adapter import SRDEModel
from srde_ds.model.attention import DOCUMENT_ATTENTION
from srde_ds.model.policy import AuxiliaryWeights, RoutingPolicy
from srde_ds.training import step
from srde_ds.training.reporting import step_metrics
from srde_ds.training.reporting.held_out import forced_experts
from tests.data_helpers import rows
from tests.helpers import tiny_llama, tiny_srde

META = torch.device("meta")
NAMES = ["red", "green", "blue"]


class PlainEngine:
    """`Engine` without DeepSpeed: the same forward, a backward, and an update by plain gradient descent."""

    def __init__(self, model: SRDEModel) -> None:
        self.model, self.deepspeed, self.device = model, self, META
        self.optimizer = torch.optim.SGD([{"params": list(model.parameters()), "peak_lr": 0.1}])

    def __call__(self, **inputs: Any) -> Any:
        return self.model(**inputs)

    forward, inputs = Engine.forward, Engine.inputs

    def backward(self, loss: Tensor) -> None:
        loss.backward()

    def step(self) -> None:
        self.optimizer.step()


class StepCurriculum:
    """A curriculum that asks for every loss at once and locks an expert."""

    def __init__(self, stream: RowStream, *, forced: bool) -> None:
        self.stream, self.forced = stream, forced
        share = torch.empty(2, 3, device=META)
        self.policy = RoutingPolicy(
            allowed_experts=torch.tensor([True, False, True]),
            auxiliary_weights=AuxiliaryWeights(load_balancing=0.1, router_z=0.1, delta_size=0.1, support_overlap=0.1),
            expert_share=share,
            target_share=share[0],
            support_temperature=1.0,
        )

    def begin_step(self, engine: object) -> RowStream:
        return self.stream

    def policy_of(self, batch: dict[str, Tensor]) -> RoutingPolicy:
        return replace(self.policy, forced_experts=forced_experts(batch, "domain")) if self.forced else self.policy


@pytest.mark.parametrize("forced", [False, True])
@pytest.mark.parametrize(
    "form", [{}, {"support_scope": "per_expert"}, {"num_atoms": 2}, {"support_strategy": "learned", "density": 0.2}]
)
def test_a_step_waits_for_the_device_at_its_end_alone(form: dict[str, Any], forced: bool) -> None:
    target = 0.05 if "support_strategy" in form else None
    model = (
        tiny_srde(base=tiny_llama(attn_implementation=DOCUMENT_ATTENTION), target_density=target, **form)
        .to(META)
        .train()
    )
    model.enable_gradient_checkpointing()
    config = Config()
    config.training.batch_size, config.training.gradient_accumulation_steps = 2, 2
    config.data.domains = NAMES
    stream = RowStream(rows(9), seed=0, global_batch_rows=4)
    state: Any = SimpleNamespace(step=0)
    topology = Topology(0, 1, META)
    waits: list[dict[str, Tensor]] = []

    def wait(sums: dict[str, Tensor]) -> dict[str, Tensor]:
        waits.append(sums)
        return sums

    with (
        patch.object(step_metrics, "all_reduce_sum", lambda tensor: tensor),
        patch.object(step, "to_host", wait),
        patch.object(torch, "is_autocast_enabled", lambda device: False),  # there is no autocast on meta
        patch.object(step, "set_step"),
    ):
        curriculum: Any = StepCurriculum(stream, forced=forced)
        engine: Any = PlainEngine(model)
        sums = step.optimizer_step(config, topology, engine, curriculum, state, lambda: False)
    assert sums is not None and len(waits) == 1 and sums is waits[0]
    assert {name: value.device for name, value in sums.items()} == dict.fromkeys(sums, META)
    assert {"loss", "label_weight", "real_tokens", "domain_tokens", "assignments", "delta_gradient_square"} <= set(sums)


def test_the_check_can_fail() -> None:
    model = tiny_srde().to(META)
    with pytest.raises(RuntimeError, match="meta"):
        model(
            torch.empty(2, 6, dtype=torch.int64, device=META), labels=torch.empty(2, 6, dtype=torch.int64, device=META)
        )
    with pytest.raises(RuntimeError, match="meta"):
        bool(torch.empty((), device=META))
