"""Measured at the end of training: each feed-forward block's inputs by domain, for routers made without data.

Half of the inputs are those of the bare base, since a router meets inputs that other experts have changed: statistics
of the own expert's inputs alone send tokens astray after the first mistake (docs/combine.md).

The covariance of D dimensions is D x D numbers, too many to add up for each layer and domain. Its product with a few
random directions is enough for its largest factors (Tropp et al. 2017, "Fixed-rank approximation of a positive-semi-
definite matrix from streaming data", algorithm 3 without its shift)."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import datasets
import numpy as np
import torch
from torch import Tensor

from srde_ds.config import Config
from srde_ds.data.loader import validation_batches
from srde_ds.distributed.engine import Engine
from srde_ds.distributed.processes import Topology
from srde_ds.errors import SRDEError
from srde_ds.model.adapter import SRDEModel
from srde_ds.model.evaluated import evaluated
from srde_ds.model.policy import RoutingPolicy
from srde_ds.training.reporting.held_out import Batch, forced_experts
from srde_ds.training.reporting.step_metrics import sum_over_ranks
from srde_ds.training.signals import until_interrupted
from srde_ds.training.warm_start.from_statistics import fit_layers, router_of
from srde_ds.training.warm_start.routers import forward_of, special_tokens, visit_inputs
from srde_ds.training.warm_start.token_sample import TokenSample, all_tokens
from srde_ds.weights.origins import DomainStatistics
from srde_ds.weights.schema import FACTORS


def measure_domains(
    engine: Engine,
    config: Config,
    topology: Topology,
    rows: datasets.Dataset,
    interrupted: Callable[[], bool] = lambda: False,
) -> None:
    """Measure the statistics of each block's inputs on each domain, and keep them in the model; a collective.

    It runs `domain_statistics_rows` rows of each domain forward, once with the experts that the router chooses (with
    training_phases=by_domain: with the domain's expert) and once without experts. A domain without usable tokens is
    left out.

    Args:
        rows: training rows as written by `build_dataset`, the same on all ranks.

    Raises:
        Interrupted: `interrupted` became true; nothing has changed.
    """
    data, training = config.data, config.training
    by_domain = config.curriculum.training_phases == "by_domain"
    sample = all_tokens(
        rows,
        domains=data.domains,
        rows_a_domain=training.domain_statistics_rows,
        special_ids=special_tokens(config.model, topology),
        seed=training.seed,
    )
    counts = np.bincount(sample.domain, minlength=len(data.domains))
    if not counts.any():
        return

    def policies(batch: Batch) -> list[RoutingPolicy]:
        forced = forced_experts(batch, "domain") if by_domain else None
        return [RoutingPolicy(forced_experts=forced), RoutingPolicy(active=False)]

    batches = validation_batches(
        rows.select(sample.rows), training.batch_size, rank=topology.rank, world_size=topology.world_size
    )
    forward = forward_of(engine.model, policies, through=engine.deepspeed)
    with evaluated(engine.deepspeed):
        visited = until_interrupted(batches, interrupted)
        sums = sum_inputs(engine.model, forward, visited, sample, len(data.domains))
    tokens = {name: int(count) for name, count in zip(data.domains, counts, strict=True) if count}
    whole = (sum_over_ranks({"sums": of_layer}, topology.device)["sums"] for of_layer in sums)
    engine.model.origins.update(tokens, statistics_of(whole, counts))


def set_routers(engine: Engine, topology: Topology, *, seed: int) -> str:
    """Set all routers from the statistics of the domains, one expert each; a collective.

    Returns:
        What prevents it, for the console, and then the routers stay as they are; otherwise empty.
    """
    model, origins = engine.model, engine.model.origins
    names = model.expert_names
    unknown = [name for name in names if name not in origins.domain_tokens]
    if unknown:
        return f"there are no statistics of the domain {unknown[0]}"

    def fit(statistics: DomainStatistics, layer: int) -> tuple[Tensor, float]:
        return router_of(statistics, seed=seed, layer=layer), 0.0

    try:
        weights, _ = fit_layers(model, topology, names, fit)
    except SRDEError:
        return f"the inputs of the domains {', '.join(names)} are too similar"
    engine.set_trainables(weights)
    for layer in model.layers:
        layer.router.load_selection_bias(None)  # of earlier routers
    return ""


def sum_inputs(
    model: SRDEModel, forward: Callable[[Batch], object], batches: Iterable[Batch], sample: TokenSample, domains: int
) -> Tensor:
    """`[L, domains, 2 + S, D]` float64: sums over what enters each block on each domain, by the tokens' weights.

    They are the inputs' sum, that of their squares, and their second moment's product with S random directions. They
    are in host memory: for many domains they would not fit beside the model.

    Args:
        forward, batches: as of `visit_inputs`; `forward` runs a batch twice, with and without experts.
    """
    first = model.layers[0]
    device = first.support.device
    probes = _probes(first.hidden).to(device)
    shape = (len(model.layers), domains, 2 + probes.shape[1], first.hidden)
    sums = torch.zeros(shape, dtype=torch.float64)
    weight = np.ones(len(sample.domain)) if sample.weight is None else sample.weight

    def add(layer: int, inputs: Tensor, tokens: np.ndarray) -> None:
        inputs = inputs.to(device)
        for domain in np.unique(sample.domain[tokens]).tolist():
            own = np.flatnonzero(sample.domain[tokens] == domain)
            w_N = torch.from_numpy(weight[tokens[own]]).to(device)
            x_ND = inputs.index_select(0, torch.from_numpy(own).to(device)).double()
            moment = (x_ND @ probes).T @ (w_N[:, None] * x_ND)
            sums[layer, domain] += torch.cat([(w_N @ x_ND)[None], (w_N @ x_ND.square())[None], moment]).cpu()

    visit_inputs(model, forward, batches, sample, add)
    return sums


def statistics_of(sums: Iterable[Tensor], counts: np.ndarray) -> list[DomainStatistics]:
    """The statistics in each layer of the domains that have tokens, in host memory.

    Args:
        sums: for each layer, as `sum_inputs` gives them.
        counts: `[domains]` tokens of each in the sample, each of which was run twice.
    """
    found = []
    for of_layer in sums:
        probes = _probes(of_layer.shape[-1]).to(of_layer.device)
        own = [_of_domain(of_layer[domain] / (2 * int(counts[domain])), probes) for domain in np.flatnonzero(counts)]
        mean, spread, factors = (torch.stack(parts).float().cpu() for parts in zip(*own, strict=True))
        found.append(DomainStatistics(mean, spread, factors))
    return found


def _of_domain(averages: Tensor, probes: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Mean `[D]`, spread `[D]` and factors `[FACTORS, D]` from the averages `[2 + S, D]` over a domain's tokens."""
    mean, variance = averages[0], averages[1] - averages[0].square()
    sketch_DS = averages[2:].T - torch.outer(mean, mean @ probes)  # the covariance times the probes
    values, vectors = torch.linalg.eigh(probes.T @ sketch_DS)
    kept = values > values[-1].clamp(min=torch.finfo(torch.float32).tiny) * 1e-9
    left, lengths, _ = torch.linalg.svd(sketch_DS @ vectors[:, kept] / values[kept].sqrt(), full_matrices=False)
    factors = mean.new_zeros(FACTORS, len(mean))
    longest = (left * lengths).T[:FACTORS]
    factors[: len(longest)] = longest
    return mean, variance.clamp(min=0).sqrt(), factors


def _probes(hidden: int) -> Tensor:
    """`[D, S]` float64: random directions, the same in every process."""
    width = min(4 * FACTORS, hidden)
    return torch.randn(hidden, width, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
