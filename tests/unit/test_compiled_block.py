"""torch.compile takes a block with experts whole, losses and statistics too, and once for all layers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from srde_ds.model.policy import AuxiliaryWeights, RoutingPolicy
from srde_ds.model.statistics import RoutingStatistics
from tests.helpers import gradient_of, randomize, tiny_llama, tiny_srde, tokens

LAYERS = 10  # more than torch._dynamo.config.recompile_limit


@pytest.mark.parametrize(
    "form", [{}, {"support_scope": "per_expert", "num_atoms": 2}, {"num_experts": 64}, {"neuron_parts": 8}]
)
def test_blocks_compile_whole_and_share_what_is_compiled(form: dict[str, Any]) -> None:
    model = randomize(tiny_srde(base=tiny_llama(num_hidden_layers=LAYERS), **form)).train()
    experts, ids = model.config.num_experts, tokens()
    statistics = RoutingStatistics(LAYERS, experts)
    policy = RoutingPolicy(
        auxiliary_weights=AuxiliaryWeights(load_balancing=0.1, router_z=0.1, delta_size=0.1),
        loss_scale=torch.tensor(1.0),
        expert_share=torch.full((LAYERS, experts), 1 / experts),
        token_mask=torch.ones(2, 16, dtype=torch.bool),
        statistics=statistics,
    )

    def step() -> dict[str, Tensor]:
        model.zero_grad()
        model(ids, labels=ids, policy=policy).loss_sum.backward()
        return {name: gradient_of(p).clone() for name, p in model.trainable_parameters()} | statistics.pop()

    expected, counter = step(), CompileCounterWithBackend("eager")
    torch._dynamo.reset()
    for layer in model.layers:
        layer.compile(backend=counter, fullgraph=True)
    found = step()
    assert counter.frame_count == 2  # the first layer's input needs no gradient
    assert expected["assignments"].sum() == LAYERS * 32 * 2 and expected["delta_gradient_square"].any(1).all()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value)
