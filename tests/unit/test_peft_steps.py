"""The router's losses and load balancing of a model of PEFT are those of the project's own training."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from srde_ds.model.policy import AuxiliaryWeights, RoutingPolicy
from srde_ds.model.statistics import RoutingStatistics
from tests.helpers import gradient_of, randomize, tiny_srde, tokens
from tests.peft_helpers import peft_config, tiny_peft

WEIGHTS = AuxiliaryWeights(load_balancing=0.5, router_z=0.25)
OPTIONS: dict[str, Any] = {"load_balancing_weight": 0.5, "router_z_weight": 0.25}


def mask_of(lengths: list[int]) -> torch.Tensor:
    return (torch.arange(16) < torch.tensor(lengths)[:, None]).long()


def routers(model: Any) -> list[torch.Tensor]:
    """Gradients of the routers of an SRDEModel."""
    return [gradient_of(layer.router.weight) for layer in model.layers]


def own_gradients(batches: list[tuple[torch.Tensor, torch.Tensor]], share: torch.Tensor | None) -> list[torch.Tensor]:
    """Of one optimizer step of the project's own form, as `training.step` scales its losses; rows of equal length."""
    own = randomize(tiny_srde()).train()
    real = sum(float(mask.sum()) for _, mask in batches)
    for ids, mask in batches:
        policy = RoutingPolicy(auxiliary_weights=WEIGHTS, loss_scale=1 / real, expert_share=share)
        output = own(ids, attention_mask=mask, labels=ids.masked_fill(mask == 0, -100), policy=policy)
        assert output.loss_sum is not None and output.label_count is not None
        (output.loss_sum / (len(batches) * output.label_count)).backward()
    return routers(own)


@pytest.mark.parametrize("share", [None, torch.tensor([[0.5, 0.25, 0.25], [0.125, 0.75, 0.125]])])
def test_accumulated_micro_batches_are_one_step_of_the_own_training(share: torch.Tensor | None) -> None:
    batches = [(tokens(seed=seed), mask_of([16, 9])) for seed in (1, 2)]
    model = tiny_peft(**OPTIONS).train()
    model.training_steps.micro_steps = 2
    model.training_steps.expert_share = share
    for ids, mask in batches:
        loss = model(input_ids=ids, attention_mask=mask, labels=ids.masked_fill(mask == 0, -100)).loss
        (loss / 2).backward()
    for found, expected in zip(routers(model.srde_model()), own_gradients(batches, share), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)
    without = tiny_peft(load_balancing_weight=0.0, router_z_weight=0.0).train()
    for ids, mask in batches:
        (without(input_ids=ids, attention_mask=mask, labels=ids.masked_fill(mask == 0, -100)).loss / 2).backward()
    assert not torch.allclose(routers(without.srde_model())[0], routers(model.srde_model())[0], rtol=1e-2, atol=1e-4)


def test_a_trainer_that_takes_only_logits_trains_the_router_too() -> None:
    model = tiny_peft(load_balancing_weight=0.0, router_z_weight=1.0, top_k=3).train()
    (model(tokens()).logits * 0).sum().backward()
    assert all(gradient.abs().sum() > 0 for gradient in routers(model.srde_model()))


@pytest.mark.parametrize("fused", [False, True])
def test_load_balancing_follows_the_step_before(fused: bool) -> None:
    model = tiny_peft(**OPTIONS).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3, fused=fused)
    steps, counted = model.training_steps, RoutingStatistics(2, 3)
    for seed in (1, 2):  # the micro-batches of a step
        model(input_ids=tokens(seed=seed)).logits.sum().backward()
        assert steps.expert_share is None
    with torch.no_grad():
        for seed in (1, 2):
            model.eval().srde_model()(tokens(seed=seed), policy=RoutingPolicy(statistics=counted))
    assignments = counted.pop()["assignments"]
    optimizer.step()
    optimizer.zero_grad()
    model.train()(input_ids=tokens())
    assert torch.equal(steps.expert_share, (assignments / assignments.sum(1, keepdim=True)).float())
    model.add_adapter("other", peft_config())
    model.set_adapter("other")  # each adapter has its own
    assert model.training_steps.expert_share is None
    model.set_adapter("default")
    assert model.training_steps is steps


def test_finishing_a_step_gives_its_statistics() -> None:
    model = tiny_peft(**OPTIONS).train()
    mask = mask_of([16, 9])
    model(input_ids=tokens(), attention_mask=mask).logits.sum().backward()
    sums = model.training_steps.finish()
    assert sums["tokens"].tolist() == [25, 25] and sums["assignments"].sum() == 2 * 2 * 25
    assert (sums["delta_gradient_square"] > 0).all()
    share = model.training_steps.expert_share
    torch.testing.assert_close(share.sum(1), torch.ones(2))
    assert not model.training_steps.finish()["tokens"].any()
    assert torch.equal(model.training_steps.expert_share, share)  # nothing was routed since
    model(input_ids=tokens(seed=3)).logits.sum().backward()
    model.zero_grad()
    model(input_ids=tokens())
    assert torch.equal(model.training_steps.expert_share, share)  # only `finish` ends a step now


def test_evaluation_is_counted_in_no_step() -> None:
    model = tiny_peft(**OPTIONS)
    model(input_ids=tokens())
    with torch.no_grad():
        model.train()(input_ids=tokens())
    assert not model.training_steps.finish()["tokens"].any()
