"""Each loss and the selection bias move what they are for."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from srde_ds.model.adapter import SRDEModel
from srde_ds.model.policy import AuxiliaryWeights, RoutingPolicy
from srde_ds.model.reference import reference_forward
from srde_ds.model.statistics import RoutingStatistics
from srde_ds.training.balancing import domain_target, update_biases
from tests.helpers import gradient_of, randomize, tiny_llama, tiny_srde, tokens

EXPERTS = 4
WEIGHT = 0.2
FORMS: list[dict[str, Any]] = [
    {"granularity": granularity} | atoms
    for granularity in ("neuron", "element")
    for atoms in ({"num_atoms": 0}, {"num_atoms": 4}, {"num_atoms": 4, "atom_mixing": "softmax"})
]


def skewed_model(top_k: int) -> SRDEModel:
    """One layer whose router sends nearly all of `inputs()` to the first expert."""
    model = tiny_srde(base=tiny_llama(num_hidden_layers=1), num_experts=EXPERTS, top_k=top_k).train()
    with torch.no_grad():
        model.layers[0].router.weight[0, 0] += 0.5
    return model


def inputs() -> Tensor:
    """`[1, 400, D]` around a common mean: what all have in common lets a router shift its shares."""
    x = torch.randn(1, 400, 32, generator=torch.Generator().manual_seed(5))
    x[..., 0] += 3
    return x


def shares(statistics: RoutingStatistics) -> Tensor:
    """`[E]` of the assignments since the last call."""
    assignments = statistics.pop()["assignments"]
    return (assignments / assignments.sum()).float()[0]


def run(model: SRDEModel, policy: RoutingPolicy) -> Tensor:
    """The output of the first layer for `inputs()`."""
    with model.routing.running(policy):
        output: Tensor = model.layers[0](inputs())
    return output


@pytest.mark.parametrize("weight", [0.0, 1.0])
@pytest.mark.parametrize("target", ["uniform", "domains"])
def test_shares_approach_the_target_of_load_balancing(target: str, weight: float) -> None:
    model = skewed_model(top_k=1)
    statistics = RoutingStatistics(1, EXPERTS)
    policy = RoutingPolicy(
        auxiliary_weights=AuxiliaryWeights(load_balancing=weight), loss_scale=1 / 400, statistics=statistics
    )
    aim = torch.full((EXPERTS,), 1 / EXPERTS)
    if target == "domains":
        aim = domain_target(torch.tensor([10, 40, 30, 20]), EXPERTS, top_k=1)
        policy = replace(policy, target_share=aim)
    optimizer = torch.optim.SGD([model.layers[0].router.weight], lr=0.02)
    distance = []
    for _ in range(150):
        optimizer.zero_grad()
        (run(model, policy).sum() * 0).backward()
        optimizer.step()
        found = shares(statistics)
        policy = replace(policy, expert_share=found[None])
        distance.append(float((found - aim).abs().sum()))
    assert distance[0] > 0.8
    assert distance[-1] < 0.1 if weight else distance[-1] == distance[0]


def test_the_z_loss_keeps_logits_small() -> None:
    """Training that raises one expert's logit on all tokens: with the loss it stays near where logsumexp is zero."""
    sizes = {}
    for weight in (0.0, 0.1):
        model = skewed_model(top_k=1)
        layer = model.layers[0]
        policy = RoutingPolicy(auxiliary_weights=AuxiliaryWeights(router_z=weight), loss_scale=1 / 400)
        optimizer = torch.optim.SGD([layer.router.weight], lr=0.02)
        for _ in range(100):
            optimizer.zero_grad()
            logits = layer.router(inputs()[0])
            ((run(model, policy) * 0).sum() - logits[:, 0].mean()).backward()
            optimizer.step()
        sizes[weight] = float(layer.router(inputs()[0]).detach().logsumexp(1).abs().mean())
    assert sizes[0.1] < 0.5 * sizes[0.0]


@pytest.mark.parametrize("top_k", [1, 2])
def test_the_bias_evens_out_a_skewed_router(top_k: int) -> None:
    model = skewed_model(top_k)
    layer = model.layers[0]
    statistics = RoutingStatistics(1, EXPERTS)
    model.eval()
    before = layer.router.weight.clone()
    found = []
    with torch.no_grad():
        for _ in range(150):
            run(model, RoutingPolicy(statistics=statistics))
            assignments = statistics.pop()["assignments"]
            found.append((assignments[0] / assignments.sum()).tolist())
            update_biases(model, assignments, rate=0.02)
    assert max(found[0]) > 0.9 / top_k
    assert max(found[-1]) - min(found[-1]) < 0.1
    assert torch.equal(layer.router.weight, before)


def test_the_bias_changes_who_is_chosen_and_not_what_a_choice_weighs() -> None:
    model = randomize(tiny_srde(num_experts=EXPERTS))
    layer, x = model.layers[0], torch.randn(1, 300, 32, generator=torch.Generator().manual_seed(6))
    chosen, weights = [], []
    for bias in (torch.zeros(EXPERTS), torch.tensor([0.0, 1.0, 0.0, -0.5])):
        layer.router.load_selection_bias(bias)
        logits = layer.router(x[0])
        choices: dict[int, Tensor] = {}
        with model.routing.running(RoutingPolicy(choices=choices)):
            layer(x)
        chosen.append(choices[0].sort(dim=1).values)
        weights.append(logits.gather(1, chosen[-1]).softmax(1))
        best = (logits + bias).topk(2).indices.sort(dim=1).values
        assert torch.equal(chosen[-1], best)
    same = (chosen[0] == chosen[1]).all(dim=1)
    assert 0.2 < same.float().mean() < 0.9
    assert torch.equal(weights[0][same], weights[1][same])
    expected = reference_forward(layer, x[0], top_k=2).float()
    torch.testing.assert_close(layer(x)[0], expected, rtol=1e-4, atol=1e-4)


def gradients(model: SRDEModel) -> dict[str, Tensor]:
    found = {name: gradient_of(p).clone() for name, p in model.trainable_parameters()}
    model.zero_grad()
    return found


@pytest.mark.parametrize("use_reentrant", [None, True, False])
@pytest.mark.parametrize("form", FORMS)
def test_the_gradient_of_the_delta_size(form: dict[str, Any], use_reentrant: bool | None) -> None:
    model, ids = randomize(tiny_srde(dtype=torch.float64, **form)).train(), tokens()
    statistics = RoutingStatistics(2, 3)
    model(ids, labels=ids, policy=RoutingPolicy(statistics=statistics)).loss_sum.backward()
    (WEIGHT * sum(layer.deltas().square().sum() for layer in model.layers)).backward()
    expected, of_the_loss = gradients(model), statistics.pop()["delta_gradient_square"]
    if use_reentrant is not None:
        model.enable_gradient_checkpointing(use_reentrant=use_reentrant)
    policy = RoutingPolicy(auxiliary_weights=AuxiliaryWeights(delta_size=WEIGHT), statistics=statistics)
    model(ids, labels=ids, policy=policy).loss_sum.backward()
    for name, gradient in gradients(model).items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-9, atol=1e-9, msg=name)
    torch.testing.assert_close(statistics.pop()["delta_gradient_square"], of_the_loss)


@pytest.mark.parametrize("locked", [None, 2])
@pytest.mark.parametrize("form", FORMS)
def test_locked_experts_and_empty_slots_have_no_size(form: dict[str, Any], locked: int | None) -> None:
    """A rank that holds experts 1 and 2 of 3, and an empty slot."""
    model = randomize(tiny_srde(**form)).train()
    layer = model.layers[0]
    layer.deltas.first_expert = 1
    allowed = torch.arange(3) != locked if locked else None
    policy = RoutingPolicy(auxiliary_weights=AuxiliaryWeights(delta_size=WEIGHT), allowed_experts=allowed)
    deltas = layer.deltas()
    parameters = list(layer.deltas.parameters())
    counted = deltas.transpose(0, layer.deltas.expert_axis)[: 1 if locked else 2]
    expected = torch.autograd.grad(WEIGHT * counted.square().sum(), parameters)
    (run(model, policy).sum() * 0).backward()
    for parameter, gradient in zip(parameters, expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient)


def test_delta_norms_shrink_with_their_loss() -> None:
    norms = {}
    for weight in (0.0, 0.01, 0.1):
        model, ids = tiny_srde().train(), tokens(4, 16)
        policy = RoutingPolicy(auxiliary_weights=AuxiliaryWeights(delta_size=weight))
        optimizer = torch.optim.AdamW([p for _, p in model.trainable_parameters()], lr=0.01, weight_decay=0.0)
        for _ in range(50):
            optimizer.zero_grad()
            (model(ids, labels=ids, policy=policy).loss_sum / 64).backward()
            optimizer.step()
        norms[weight] = float(model.delta_norms().norm())
    assert norms[0.1] < 0.7 * norms[0.01] < 0.7 * norms[0.0]
