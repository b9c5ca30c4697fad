"""Router rows of new experts from the domains' statistics, beside rows that are trained."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from srde_ds.errors import SRDEError
from srde_ds.training.warm_start.clustering import TARGET_GAP
from srde_ds.training.warm_start.from_statistics import add_rows, draw_inputs, of_domains, router_of
from srde_ds.weights.origins import DomainStatistics

HIDDEN = 32


def statistics(domains: int, *, distance: float = 4.0, spread: float = 0.5) -> DomainStatistics:
    generator = torch.Generator().manual_seed(0)
    common = torch.randn(HIDDEN, generator=generator)
    own = torch.nn.functional.normalize(torch.randn(domains, HIDDEN, generator=generator), dim=1)
    return DomainStatistics(common + distance * own, torch.full((domains, HIDDEN), spread))


def drawn_logits(router: Tensor, drawn: DomainStatistics) -> tuple[Tensor, Tensor]:
    inputs, domain = draw_inputs(drawn, seed=7, layer=1)
    return torch.from_numpy(inputs) @ router.T, torch.from_numpy(domain)


@pytest.mark.parametrize(("old", "scale"), [(1, 1.0), (3, 1.0), (3, 20.0), (3, 0.0)])
def test_a_new_row_draws_its_domain_and_leaves_the_others(old: int, scale: float) -> None:
    every = statistics(old + 2)
    few = DomainStatistics(every.mean[:old], every.spread[:old])
    trained = torch.full((1, HIDDEN), 0.1) if old == 1 else router_of(few, seed=3, layer=0)
    trained = scale * trained + 5.0  # what all rows have in common changes no choice
    router, share = add_rows(trained, every, seed=3, layer=0)
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
    same = DomainStatistics(every.mean[[0, 1, 1]], torch.zeros(3, HIDDEN))
    with pytest.raises(SRDEError, match="layer 4: the inputs of a new domain are too similar"):
        add_rows(torch.randn(2, HIDDEN), same, seed=0, layer=4)


def test_statistics_are_taken_by_name() -> None:
    every = statistics(3)
    chosen = of_domains(every, ["a", "b", "c"], ["c", "a"])
    assert torch.equal(chosen.mean, every.mean[[2, 0]]) and torch.equal(chosen.spread, every.spread[[2, 0]])
