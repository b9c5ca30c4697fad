"""Routing of single tokens, statistics."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from srde_ds.model.deltas import Storage
from srde_ds.model.policy import RoutingPolicy
from srde_ds.model.router import Router, Routing, route
from srde_ds.model.statistics import RoutingStatistics, Softmax, add_routing
from tests.helpers import gradient_of, randomize, tiny_srde, tokens


def make(*, top_k: int = 2, dtype: torch.dtype = torch.float32) -> tuple[Router, Tensor]:
    router = Router(16, 4, top_k, seed=0, layer=0, storage=Storage(dtype, torch.device("cpu")))
    x = torch.randn(10, 16, generator=torch.Generator().manual_seed(0)).to(dtype)
    return router, x


def routed(router: Router, x: Tensor, **policy: Any) -> Routing:
    return route(router(x), router.selection_bias, router.top_k, RoutingPolicy(**policy))


def test_weights_are_the_softmax_over_the_chosen() -> None:
    router, x = make()
    routing = routed(router, x)
    logits = x @ router.weight.T
    for token in range(10):
        best = logits[token].argsort(descending=True)[:2]
        assert routing.choices_TK[token].tolist() == best.tolist()
        torch.testing.assert_close(routing.weights_TE[token, best], logits[token, best].softmax(0))
    assert ((routing.weights_TE > 0).sum(1) == 2).all()


def test_initial_weights_depend_on_seed_and_layer_alone() -> None:
    storage = Storage(torch.float32, torch.device("cpu"))
    weights = [Router(16, 4, 2, seed=s, layer=n, storage=storage).weight for s, n in ((0, 0), (0, 1), (1, 0))]
    assert torch.equal(weights[0], make()[0].weight)
    assert not torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])
    assert 0.01 < weights[0].std() < 0.03


def test_logits_are_fp32_also_under_autocast() -> None:
    router, x = make(dtype=torch.bfloat16)
    expected = x.float() @ router.weight.float().T
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = routed(router, x).logits_TE
    assert logits.dtype == torch.float32 and torch.equal(logits, expected)


def test_locked_experts_get_nothing_and_k_shrinks() -> None:
    router, x = make(top_k=3)
    routing = routed(router, x, allowed_experts=torch.tensor([True, False, True, False]))
    assert routing.choices_TK.sort(dim=1).values.tolist() == [[-1, 0, 2]] * 10
    expected = (x @ router.weight[[0, 2]].T).softmax(1)
    torch.testing.assert_close(routing.weights_TE[:, [0, 2]], expected)
    choices = routing.choices_TK
    assert (choices[:, 2] == -1).all() and set(choices[:, :2].flatten().tolist()) == {0, 2}
    routing.weights_TE.square().sum().backward()
    assert router.weight.grad is not None and router.weight.grad.isfinite().all()
    assert (router.weight.grad[[1, 3]] == 0).all() and (router.weight.grad[[0, 2]] != 0).any()


def test_forced_tokens_go_to_their_expert_with_weight_one() -> None:
    router, x = make()
    routing = routed(router, x, forced_experts=torch.arange(10).view(2, 5) % 4)
    assert torch.equal(routing.weights_TE, torch.nn.functional.one_hot(torch.arange(10) % 4, 4).float())
    assert routing.choices_TK.flatten().tolist() == (torch.arange(10) % 4).tolist()


def test_statistics_are_sums_over_real_tokens() -> None:
    router, x = make()
    routing = routed(router, x)
    mask = torch.arange(10) < 7
    statistics = RoutingStatistics(1, 4)
    for _ in range(2):
        all_experts, chosen = Softmax.of(routing.logits_TE.detach(), mask), (routing.index_TK, routing.used_TK)
        add_routing(statistics.sums(mask.device), torch.tensor([0]), all_experts, *chosen, mask)
    sums = statistics.pop()
    logits = (x @ router.weight.T).detach().double()[:7]
    p = logits.softmax(1)
    expected = {
        "assignments": routing.choices_TK[:7].flatten().bincount(minlength=4).double(),
        "probability_sum": p.sum(0),
        "entropy_sum": -(p * p.log()).sum(),
        "z_sum": p.new_tensor([(row.exp().sum().log() ** 2).item() for row in logits]).sum(),
        "tokens": torch.tensor(7.0, dtype=torch.float64),
    }
    for name, value in expected.items():
        torch.testing.assert_close(sums[name][0], 2 * value, rtol=1e-5, atol=1e-6)
    assert all((value == 0).all() for value in statistics.pop().values())


@pytest.mark.parametrize("allowed", [None, [True, False, True, False]])
def test_recorded_weights_have_the_gradient_of_the_softmax_and_count_the_unlocked(
    allowed: list[bool] | None,
) -> None:
    """All losses have a weight of zero here, so the gradient is that of the weights alone."""
    router, x = make(top_k=3)
    router.selection_bias.copy_(torch.tensor([0.0, 0.3, -0.2, 0.1]))
    statistics = RoutingStatistics(2, 4)
    policy = RoutingPolicy(allowed_experts=None if allowed is None else torch.tensor(allowed), statistics=statistics)
    found = []
    for layer in (None, torch.tensor([1])):
        router.zero_grad()
        routing = route(router(x), router.selection_bias, router.top_k, policy, layer)
        routing.weights_TE.sin().sum().backward()
        found.append((routing.weights_TK, gradient_of(router.weight)))
    assert torch.equal(found[0][0], found[1][0])
    torch.testing.assert_close(found[1][1], found[0][1])
    counted = statistics.pop()["assignments"]
    choices = routing.choices_TK[routing.choices_TK >= 0]
    assert not counted[0].any() and counted[1].tolist() == choices.bincount(minlength=4).tolist()


@pytest.mark.parametrize("training", [True, False])
def test_forwards_without_gradient_are_recorded_on_request_in_eval_mode(training: bool) -> None:
    model = randomize(tiny_srde()).train(training)
    with torch.no_grad():
        statistics = RoutingStatistics(2, 3)
        model(tokens())
        assert statistics.pop()["tokens"].sum() == 0
        model(tokens(), policy=RoutingPolicy(statistics=statistics))
    # In train mode a reentrant checkpoint runs the forward without gradient first: it must not count.
    assert statistics.pop()["tokens"].tolist() == ([0, 0] if training else [32, 32])


def test_choices_of_the_last_forward() -> None:
    model = randomize(tiny_srde())
    choices: dict[int, Tensor] = {}
    model(tokens(), policy=RoutingPolicy(choices=choices))
    assert sorted(choices) == [0, 1]
    assert all(c.shape == (32, 2) and (c >= 0).all() and (c < 3).all() for c in choices.values())
