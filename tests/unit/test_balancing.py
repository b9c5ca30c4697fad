"""Targets of load balancing and the arithmetic of the selection biases."""

from __future__ import annotations

import pytest
import torch

from srde_ds.config import resolve
from srde_ds.model.policy import AuxiliaryWeights
from srde_ds.training.balancing import auxiliary_weights, domain_target, update_biases
from tests.helpers import tiny_srde


@pytest.mark.parametrize(
    ("tokens", "experts", "top_k", "locked", "expected"),
    [
        ([10, 40, 30, 20], 4, 1, [], [0.1, 0.4, 0.3, 0.2]),
        ([10, 40, 30, 20], 4, 2, [], [0.1, 0.4, 0.3, 0.2]),
        # More than half of two assignments a token: the rest goes to the others in proportion.
        ([60, 30, 10, 0], 4, 2, [], [0.5, 0.375, 0.125, 0.0]),
        ([60, 30, 10, 0], 4, 3, [], [1 / 3, 1 / 3, 1 / 3, 0.0]),
        ([7, 0, 0, 0], 4, 2, [], [0.5, 1 / 6, 1 / 6, 1 / 6]),
        # Two experts of four have no domain, or two domains have no expert.
        ([30, 10], 4, 1, [], [0.375, 0.125, 0.25, 0.25]),
        ([30, 10, 500, 500], 2, 1, [], [0.75, 0.25]),
        # Locked experts: the others are scaled up; two that may be used by two assignments share them alike.
        ([10, 40, 30, 20], 4, 1, [1], [1 / 6, 0, 0.5, 1 / 3]),
        ([10, 40, 30, 20], 4, 2, [0, 3], [0, 0.5, 0.5, 0]),
        ([10, 40, 30, 20], 4, 2, [0, 1, 3], [0, 0, 1, 0]),
        ([0, 40, 0, 0], 4, 1, [1], [1 / 3, 0, 1 / 3, 1 / 3]),
        ([0, 0, 0], 3, 1, [], [1 / 3, 1 / 3, 1 / 3]),
    ],
)
def test_target_shares(tokens: list[float], experts: int, top_k: int, locked: list[int], expected: list[float]) -> None:
    allowed = torch.tensor([e not in locked for e in range(experts)])
    found = domain_target(torch.tensor(tokens), experts, top_k, allowed if locked else None)
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float32))


def test_biases_move_by_the_rate_towards_the_target() -> None:
    model = tiny_srde()
    counts = torch.tensor([[10, 20, 30], [20, 20, 20]])
    update_biases(model, counts, rate=0.5)
    found = [layer.router.selection_bias.tolist() for layer in model.layers]
    assert found == [[0.5, 0.0, -0.5], [0.0, 0.0, 0.0]]
    update_biases(model, counts, rate=0.25, target=torch.tensor([0.6, 0.4, 0.0]))
    assert model.layers[0].router.selection_bias.tolist() == [0.75, 0.25, -0.75]
    update_biases(model, counts, rate=0.25, allowed=torch.tensor([True, True, False]))
    assert model.layers[0].router.selection_bias.tolist() == [1.0, 0.5, -0.75]


def test_the_micro_steps_share_the_delta_size() -> None:
    losses = resolve({}, {"delta_size_weight": 2.0, "load_balancing_weight": 0.5, "router_z_weight": 0.25}).losses
    found = auxiliary_weights(losses, micro_steps=4)
    assert found == AuxiliaryWeights(load_balancing=0.5, router_z=0.25, delta_size=0.5)
