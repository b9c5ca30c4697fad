"""Auxiliary losses and statistics: right, counted once under activation checkpointing, blind to padding."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn

from srde_ds.model.adapter import SRDEModel
from srde_ds.model.policy import AuxiliaryWeights, RoutingPolicy
from srde_ds.model.statistics import RoutingStatistics
from tests.helpers import gradient_of, randomize, tiny_srde, tokens

SCALE, BALANCE, Z = 0.37, 0.5, 0.3
SHARE = torch.tensor([[0.6, 0.3, 0.1], [0.2, 0.2, 0.6]])


WITH_LOSSES = RoutingPolicy(
    auxiliary_weights=AuxiliaryWeights(load_balancing=BALANCE, router_z=Z), loss_scale=SCALE, expert_share=SHARE
)


def trained_model(**overrides: Any) -> SRDEModel:
    return randomize(tiny_srde(dtype=torch.float64, **overrides)).train()


def with_statistics(policy: RoutingPolicy = WITH_LOSSES) -> tuple[RoutingPolicy, RoutingStatistics]:
    statistics = RoutingStatistics(2, 3)
    return replace(policy, statistics=statistics), statistics


def gradients(model: SRDEModel) -> dict[str, Tensor]:
    found = {name: gradient_of(p).clone() for name, p in model.trainable_parameters()}
    model.zero_grad()
    return found


def assert_same(a: dict[str, Tensor], b: dict[str, Tensor], tolerance: float = 1e-10) -> None:
    assert set(a) == set(b)
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=tolerance, atol=tolerance, msg=partial("{}: {}".format, name))


def explicit_losses(model: SRDEModel, mask: Tensor, target: Tensor | None, **inputs: Tensor) -> Tensor:
    """The language loss plus the auxiliary losses, written down; the model's own are left out."""
    entering: list[Tensor] = []
    hooks = [m.register_forward_pre_hook(lambda _, args: entering.append(args[0])) for m in model.layers]
    total = model(**inputs, token_mask=mask).loss_sum.double()
    for hook in hooks:
        hook.remove()
    for layer, x, share in zip(model.layers, entering, SHARE.double(), strict=True):
        logits = (x @ layer.router.weight.T)[mask]
        if target is not None:
            share = share - target
        balancing = 3 * (share * logits.softmax(-1)).sum()
        total = total + SCALE * (BALANCE * balancing + Z * logits.exp().sum(-1).log().square().sum())
    return total


@pytest.mark.parametrize("target", [None, torch.tensor([0.0, 0.5, 0.5])])
def test_the_auxiliary_gradient_is_the_gradient_of_the_written_losses(target: Tensor | None) -> None:
    model, ids = trained_model(), tokens()
    policy = replace(WITH_LOSSES, target_share=target)
    mask = torch.ones(2, 16, dtype=torch.bool)
    mask[1, 10:] = False
    model(ids, labels=ids, token_mask=mask, policy=policy).loss_sum.backward()
    ours = gradients(model)
    explicit_losses(model, mask, target, input_ids=ids, labels=ids).backward()
    assert_same(ours, gradients(model))
    model(ids, labels=ids, token_mask=mask, policy=replace(policy, loss_scale=0.0)).loss_sum.backward()
    without = gradients(model)["layers.0.router.weight"]
    assert (ours["layers.0.router.weight"] - without).abs().max() > 1e-2  # the losses do something here


@pytest.mark.parametrize("granularity", ["neuron", "element"])
@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpointing_changes_nothing(use_reentrant: bool, granularity: str) -> None:
    results = []
    for checkpointing in (False, True):
        model, ids = trained_model(granularity=granularity, num_atoms=4), tokens()
        policy, statistics = with_statistics()
        calls: list[int] = []
        gate = cast("nn.Module", model.layers[1].block.gate_proj)  # recomputation may stop before down
        gate.register_forward_hook(lambda *_, calls=calls: calls.append(1))
        if checkpointing:
            model.enable_gradient_checkpointing(use_reentrant=use_reentrant)
        losses = []
        for _ in range(2):  # two micro-batches of one step
            loss = model(ids, labels=ids, policy=policy).loss_sum
            loss.backward()
            losses.append(loss.detach())
        assert len(calls) == (4 if checkpointing else 2)  # it did recompute
        results.append(({"loss": torch.stack(losses)} | gradients(model), statistics.pop()))
    (plain, plain_sums), (recomputed, sums) = results
    assert_same(plain, recomputed)
    assert_same(plain_sums, sums)
    assert sums["tokens"].tolist() == [64, 64]
    assert sums["assignments"].sum(1).tolist() == [128, 128]


@pytest.mark.parametrize("how", ["token_mask", "attention_mask"])
def test_padding_takes_no_part(how: str) -> None:
    model, ids = trained_model(), tokens(2, 12)
    policy, statistics = with_statistics()
    loss = model(ids, labels=ids, policy=policy).loss_sum
    loss.backward()
    expected, expected_sums = gradients(model), statistics.pop()
    padded = torch.cat([ids, torch.zeros(2, 5, dtype=torch.long)], dim=1)
    labels = torch.cat([ids, torch.full((2, 5), -100)], dim=1)
    mask = torch.arange(17).expand(2, 17) < 12
    given = {how: mask if how == "token_mask" else mask.long()}
    padded_loss = model(padded, labels=labels, policy=policy, **given).loss_sum
    padded_loss.backward()
    torch.testing.assert_close(padded_loss, loss, rtol=1e-6, atol=0)
    assert_same(gradients(model), expected)
    assert_same(statistics.pop(), expected_sums)


def test_the_losses_do_not_depend_on_the_cut_into_micro_batches() -> None:
    model, ids = trained_model(), tokens(4, 8)
    policy, statistics = with_statistics()
    model(ids, labels=ids, policy=policy).loss_sum.backward()
    whole, whole_sums = gradients(model), statistics.pop()
    for part in ids.split(1):
        model(part, labels=part, policy=policy).loss_sum.backward()
    # The language loss is summed in fp32, hence the tolerance.
    assert_same(gradients(model), whole, tolerance=1e-6)
    parts = statistics.pop()
    for name in ("assignments", "probability_sum", "entropy_sum", "z_sum", "tokens"):
        torch.testing.assert_close(parts[name], whole_sums[name], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("granularity", ["neuron", "element"])
def test_delta_gradients_are_counted_by_expert(granularity: str) -> None:
    model, ids = randomize(tiny_srde(granularity=granularity)), tokens()
    policy, statistics = with_statistics(RoutingPolicy())
    model(ids, labels=ids, policy=policy).loss_sum.backward()
    expected = []
    for layer in model.layers:
        grad = gradient_of(layer.deltas.free)
        per_expert = grad.unflatten(1, (3, 3)).transpose(0, 1) if granularity == "neuron" else grad
        expected.append(per_expert.flatten(1).double().square().sum(1))
    actual = statistics.pop()["delta_gradient_square"]
    torch.testing.assert_close(actual, torch.stack(expected), rtol=1e-5, atol=0)


def test_without_shares_only_the_z_loss_acts() -> None:
    model, ids = trained_model(), tokens()
    policy = replace(
        WITH_LOSSES,
        target_share=torch.tensor([0.0, 0.5, 0.5]),
        expert_share=None,
        auxiliary_weights=AuxiliaryWeights(load_balancing=BALANCE),
    )
    model(ids, labels=ids, policy=policy).loss_sum.backward()
    uniform = gradients(model)
    model(ids, labels=ids, policy=replace(policy, loss_scale=0.0)).loss_sum.backward()
    assert_same(uniform, gradients(model))
