"""What the backward computes again changes its memory and nothing else."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.static import Operators
from srde_ds.model.adapter import SRDEModel
from srde_ds.model.attention import DOCUMENT_ATTENTION, Documents
from srde_ds.model.policy import AuxiliaryWeights, RoutingPolicy
from srde_ds.model.recompute import recompute_selectively
from srde_ds.model.statistics import RoutingStatistics
from tests.helpers import gradient_of, randomize, tiny_llama, tiny_srde, tokens

FORMS: list[dict[str, Any]] = [{}, {"granularity": "element"}, {"num_atoms": 2, "support_scope": "per_expert"}]


def made(recompute: str, **form: Any) -> SRDEModel:
    model = randomize(tiny_srde(base=tiny_llama(attn_implementation=DOCUMENT_ATTENTION), **form)).train()
    if recompute == "selective":
        recompute_selectively(model.base, model.routing)
    elif recompute != "none":
        model.enable_gradient_checkpointing(use_reentrant=recompute == "full, reentrant")
    return model


def step(model: SRDEModel, length: int = 16) -> tuple[Tensor, dict[str, Tensor], dict[str, Tensor], Operators]:
    """Loss, gradients, statistics and operators of a forward and backward of two packed rows."""
    positions = (torch.arange(length) % (length - 3)).repeat(2, 1)
    documents, statistics = Documents.of(positions), RoutingStatistics(2, 3)
    policy = RoutingPolicy(
        auxiliary_weights=AuxiliaryWeights(load_balancing=0.1, router_z=0.1, delta_size=0.1),
        expert_share=torch.full((2, 3), 1 / 3),
        statistics=statistics,
    )
    ids = tokens(2, length)
    inputs: dict[str, Any] = {"documents": documents, "attention_mask": documents.no_mask, "position_ids": positions}
    with Operators() as operators:
        output = model(ids, labels=ids, token_mask=torch.ones_like(ids).bool(), policy=policy, **inputs)
        assert output.loss_sum is not None
        output.loss_sum.backward()
    gradients = {name: p.grad.clone() for name, p in model.trainable_parameters() if p.grad is not None}
    return output.loss_sum.detach(), gradients, statistics.pop(), operators


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("recompute", ["selective", "full", "full, reentrant"])
def test_gradients_and_statistics_are_those_of_plain_training(recompute: str, form: dict[str, Any]) -> None:
    loss, gradients, statistics, _ = step(made("none", **form))
    same_loss, same_gradients, same_statistics, _ = step(made(recompute, **form))
    torch.testing.assert_close(same_loss, loss, rtol=1e-6, atol=0)
    assert gradients.keys() == same_gradients.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(same_gradients[name], gradient, rtol=1e-5, atol=1e-6 * float(gradient.abs().max()))
    torch.testing.assert_close(same_statistics, statistics, rtol=1e-6, atol=1e-6)


def attended(operators: Operators) -> int:
    """How often attention was computed."""
    return sum(n for name, n in operators.kernels.items() if "scaled_dot" in name and "backward" not in name)


def test_selective_keeps_attention_and_memory_falls_in_order() -> None:
    found = {recompute: step(made(recompute), 64)[3] for recompute in ("none", "selective", "full")}
    peaks = {recompute: operators.peak for recompute, operators in found.items()}
    assert peaks["none"] > peaks["selective"] > peaks["full"]
    assert attended(found["selective"]) == attended(found["none"])
    assert attended(found["full"]) == 2 * attended(found["none"])
    products = {recompute: operators.kernels["mm"] for recompute, operators in found.items()}
    assert products["none"] < products["selective"] <= products["full"]


def test_without_gradients_and_in_eval_mode_nothing_is_kept() -> None:
    plain, model = made("none").eval(), made("selective").eval()
    ids = tokens()
    assert torch.equal(model(ids).logits, plain(ids).logits)
    with torch.no_grad():
        assert torch.equal(model.train()(ids).logits, plain.train()(ids).logits)


@pytest.mark.parametrize("recompute", ["selective", "full"])
def test_dropout_draws_the_same_again(recompute: str) -> None:
    def loss_and_gradient(recompute: str) -> tuple[Tensor, Tensor]:
        base = tiny_llama(attn_implementation="eager", attention_dropout=0.5)
        model = randomize(tiny_srde(base=base)).train()
        if recompute == "selective":
            recompute_selectively(model.base, model.routing)
        elif recompute == "full":
            model.enable_gradient_checkpointing()
        torch.manual_seed(3)
        loss = model(tokens(), labels=tokens()).loss_sum
        assert loss is not None
        loss.backward()
        return loss.detach(), gradient_of(model.layers[0].router.weight)

    loss, gradient = loss_and_gradient("none")
    same_loss, same_gradient = loss_and_gradient(recompute)
    torch.testing.assert_close(same_loss, loss)
    torch.testing.assert_close(same_gradient, gradient)
