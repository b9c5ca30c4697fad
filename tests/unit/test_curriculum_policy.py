"""What the curriculum tells a step's forwards."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from srde_ds.config import resolve
from srde_ds.distributed.processes import Topology
from srde_ds.training.curriculum import Curriculum

SHARES = torch.tensor([0.5, 0.3, 0.2])


def begun(step: int = 0, **flags: Any) -> Curriculum:
    config = resolve({}, {"domains": "a,b,c", "max_steps": 30, "warmup_steps": 0, "batch_size": 2} | flags)
    state = SimpleNamespace(step=step, expert_share=SHARES[None], target_share=SHARES, unlock_order=[2, 0, 1])
    topology = Topology(0, 1, torch.device("cpu"))
    curriculum = Curriculum(config, topology, cast("Any", SimpleNamespace()), cast("Any", state))
    curriculum.begin_step(cast("Any", SimpleNamespace(restrict=lambda trained, locked: None)))
    return curriculum


@pytest.mark.parametrize(("target", "expected"), [("domains", SHARES), ("uniform", None)])
def test_a_stored_target_is_forgotten_when_balancing_aims_at_equal_shares(
    target: str, expected: torch.Tensor | None
) -> None:
    assert begun(load_balancing_target=target).policy.target_share is expected


def test_the_policy_of_a_routed_step() -> None:
    curriculum = begun(step=12, progressive_unlock="linear", delta_size_weight=0.4, gradient_accumulation_steps=4)
    policy = curriculum.policy_of({})
    assert policy.allowed_experts is not None and policy.allowed_experts.tolist() == [True, False, True]
    assert policy.forced_experts is None and policy.noise_step == 12
    assert policy.auxiliary_weights.delta_size == pytest.approx(0.1)
    assert policy.expert_share is curriculum.state.expert_share


def test_the_policy_of_a_pretraining_step_forces_each_row_to_its_domain() -> None:
    curriculum = begun(supervised_experts=True, expert_pretrain_steps=5)
    batch = {"domain": torch.tensor([2, 0]), "input_ids": torch.zeros(2, 4, dtype=torch.long)}
    policy = curriculum.policy_of(batch)
    assert policy.allowed_experts is None and policy.forced_experts is not None
    assert policy.forced_experts.tolist() == [[2] * 4, [0] * 4]
