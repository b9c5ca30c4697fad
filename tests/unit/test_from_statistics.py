"""Routing vectors of new experts from the domains' statistics, beside trained ones."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from srde_ds.errors import SRDEError
from srde_ds.training.warm_start.clustering import TARGET_GAP
from srde_ds.training.warm_start.discriminant import statistics_of_inputs
from srde_ds.training.warm_start.from_statistics import add_routing_vectors, draw_inputs, router_of
from srde_ds.weights.origins import DomainStatistics, Origins
from srde_ds.weights.schema import FACTORS

HIDDEN = 32


def statistics(domains: int, *, distance: float = 4.0, spread: float = 0.5) -> DomainStatistics:
    generator = torch.Generator().manual_seed(0)
    common = torch.randn(HIDDEN, generator=generator)
    own = torch.nn.functional.normalize(torch.randn(domains, HIDDEN, generator=generator), dim=1)
    loud = torch.randn(domains, FACTORS, HIDDEN, generator=generator) * (torch.arange(FACTORS) == 0)[:, None]
    whole = (spread**2 + loud.square().sum(1)).sqrt()
    return DomainStatistics(common + distance * own, whole, loud)


def drawn_logits(router: Tensor, drawn: DomainStatistics) -> tuple[Tensor, Tensor]:
    inputs, domain = draw_inputs(drawn, seed=7, layer=1)
    return torch.from_numpy(inputs) @ router.T, torch.from_numpy(domain)


@pytest.mark.parametrize(("old", "scale"), [(1, 1.0), (3, 1.0), (3, 20.0), (3, 0.0)])
def test_a_new_row_draws_its_domain_and_leaves_the_others(old: int, scale: float) -> None:
    every = statistics(old + 2)
    few = every.rows(list(range(old)))
    trained = torch.full((1, HIDDEN), 0.1) if old == 1 else router_of(few, seed=3, layer=0)
    trained = scale * trained + 5.0  # what all rows have in common changes no choice
    router, share = add_routing_vectors(trained, every, seed=3, layer=0)
    assert torch.equal(router[:old], trained) and router.shape == (old + 2, HIDDEN)
    logits, domain = drawn_logits(router, every)
    best = logits.argmax(1)
    for new in (old, old + 1):
        assert (best[domain == new] == new).float().mean() > 0.95
        gap = (logits[:, new] - logits[:, :old].amax(1))[domain == new].median()
        assert float(gap) == pytest.approx(TARGET_GAP * max(1.0, scale), rel=0.15)
    drawn = (best[domain < old] >= old).float().mean()
    assert float(drawn) == pytest.approx(share, abs=0.02) and (share < 0.02 or scale == 0.0)


def test_domains_that_cannot_be_told_apart_are_refused() -> None:
    every = statistics(3)
    same = DomainStatistics.independent(every.mean[[0, 1, 1]], torch.zeros(3, HIDDEN))
    with pytest.raises(SRDEError, match="layer 4: the inputs of a new domain are too similar"):
        add_routing_vectors(torch.randn(2, HIDDEN), same, seed=0, layer=4)


def test_statistics_are_taken_by_name() -> None:
    every = statistics(3)
    origins = Origins(domain_tokens={"a": 1, "b": 1, "c": 1}, statistics=[statistics(2), every])
    chosen = origins.statistics_of(["c", "a"], layer=1)
    assert torch.equal(chosen.mean, every.mean[[2, 0]]) and torch.equal(chosen.spread, every.spread[[2, 0]])
    assert torch.equal(chosen.factors, every.factors[[2, 0]])


def test_drawn_inputs_have_the_statistics() -> None:
    every = statistics(2)
    inputs, domain = draw_inputs(every, seed=1, layer=0)
    again = statistics_of_inputs(inputs, domain)
    torch.testing.assert_close(again.mean, every.mean, rtol=0, atol=0.2)
    torch.testing.assert_close(again.spread, every.spread, rtol=0.15, atol=0)
    for row in range(2):
        first, loud = again.factors[row, 0], every.factors[row, 0]
        assert abs(float(torch.nn.functional.cosine_similarity(first, loud, dim=0))) > 0.97
