"""Routing vectors from the domains' statistics alone: of all experts, or of new ones beside trained vectors."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from srde_ds.config import CurriculumConfig
from srde_ds.distributed.processes import Topology, broadcast_from_main
from srde_ds.errors import SRDEError
from srde_ds.model.adapter import SRDEModel
from srde_ds.training.warm_start.clustering import TARGET_GAP, scaled
from srde_ds.training.warm_start.discriminant import discriminant
from srde_ds.utils.together import on_main_rank
from srde_ds.weights.origins import DomainStatistics

# Number of tokens drawn for each domain from its mean and spread; the warm start uses as many.
DRAWN_TOKENS = CurriculumConfig.warm_start_samples


def draw_inputs(statistics: DomainStatistics, *, seed: int, layer: int) -> tuple[np.ndarray, np.ndarray]:
    """Draw `DRAWN_TOKENS` inputs of each domain: `[N, D]` fp32, and `[N]` the row of its statistics."""
    generator = np.random.default_rng([seed, layer])
    mean, spread, factors = (part.numpy() for part in (statistics.mean, statistics.spread, statistics.factors))
    own = np.sqrt(np.maximum(spread**2 - np.square(factors).sum(1), 0))
    noise = generator.standard_normal((len(mean), DRAWN_TOKENS, mean.shape[-1]), dtype=np.float32)
    along = generator.standard_normal((len(mean), DRAWN_TOKENS, factors.shape[1]), dtype=np.float32)
    inputs = mean[:, None] + own[:, None] * noise + along @ factors
    return inputs.reshape(-1, mean.shape[-1]), np.repeat(np.arange(len(mean)), DRAWN_TOKENS)


def router_of(statistics: DomainStatistics, *, seed: int, layer: int) -> Tensor:
    """`[E, D]` fp32: the discriminant's router, scaled by drawn inputs. Expert e belongs to domain e.

    Raises:
        SRDEError: the domains are too similar.
    """
    inputs, domain = draw_inputs(statistics, seed=seed, layer=layer)
    return torch.from_numpy(scaled(discriminant(statistics).numpy(), inputs, domain, layer=layer).weights)


def add_routing_vectors(router: Tensor, statistics: DomainStatistics, *, seed: int, layer: int) -> tuple[Tensor, float]:
    """Add routing vectors for new domains to a trained router, whose own do not change.

    A new vector points from the other domains to its own, as in `router_of`. Its length lets the new expert's median
    token prefer it by as much as tokens of the other domains prefer their best expert, and at least as after a warm
    start.

    Args:
        router: `[E, D]` fp32.
        statistics: of the domains of the router's E experts, in their order, and of the new domains after them.

    Returns:
        `[E + new, D]` fp32, and the share of the tokens drawn from the E domains whose best expert is a new one.

    Raises:
        SRDEError: a new domain is too similar to another one.
    """
    old = len(router)
    inputs, domain = draw_inputs(statistics, seed=seed, layer=layer)
    similar = f"layer {layer}: the inputs of a new domain are too similar to those of another domain."
    try:
        fitted = torch.from_numpy(scaled(discriminant(statistics).numpy(), inputs, domain, layer=layer).weights)
    except SRDEError:
        raise SRDEError(similar) from None
    common, x_ND = router.mean(0), torch.from_numpy(inputs)
    # All logits without what the old experts' have in common, which no choice depends on.
    vectors = [router - common]
    logits, of_old = x_ND @ vectors[0].T, torch.from_numpy(domain < old)
    best_old, gap = logits.amax(1), TARGET_GAP
    if old > 1:
        first, second = logits[of_old].topk(2).values.unbind(1)
        gap = max(gap, float((first - second).median()))
    for number, vector in enumerate(fitted[old:], old):
        direction = vector - fitted[:old].mean(0)
        own = torch.from_numpy(domain == number)
        rise = x_ND[own] @ direction
        needed = torch.where(rise > 0, (gap + best_old[own]) / rise, torch.inf).median()
        if not needed.isfinite():
            raise SRDEError(similar)
        vectors.append(direction[None] * needed)
    logits = x_ND @ torch.cat(vectors).T
    drawn = (logits[of_old].argmax(1) >= old).float().mean()
    return torch.cat([router, *(vector + common for vector in vectors[1:])]), float(drawn)


def fit_layers(
    model: SRDEModel,
    topology: Topology,
    domains: Sequence[str],
    fit: Callable[[DomainStatistics, int], tuple[Tensor, float]],
) -> tuple[dict[str, Tensor], list[float]]:
    """Fit the routers layer by layer on rank 0, from the model's statistics; a collective.

    Args:
        domains: those of the experts, in their order.
        fit: from a layer's statistics and its number, its router `[E, D]` and a figure.

    Returns:
        The routers by name, and the figures, the same on every rank.

    Raises:
        SRDEError: on every rank: what `fit` raises.
    """
    origins = model.origins
    weights, figures = {}, []
    for layer, own in enumerate(model.layers):
        router = torch.empty(len(domains), own.hidden)

        def fit_here(layer: int = layer, router: Tensor = router) -> float:
            found, figure = fit(origins.statistics_of(domains, layer), layer)
            router.copy_(found)
            return figure

        figures.append(on_main_rank(fit_here, topology, long=True))
        router = router.to(topology.device)
        broadcast_from_main(router)
        weights[f"layers.{layer}.router.weight"] = router.cpu()
    return weights, figures
