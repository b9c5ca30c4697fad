"""Measured at the end of training: each feed-forward block's inputs by domain, for routers made without data."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import datasets
import numpy as np
import torch
from torch import Tensor

from srde_ds.config import Config
from srde_ds.data.loader import validation_batches
from srde_ds.data.tokenizer import load_tokenizer
from srde_ds.distributed.engine import Engine
from srde_ds.distributed.processes import Topology
from srde_ds.distributed.together import on_main_rank
from srde_ds.model.adapter import SRDEModel
from srde_ds.model.policy import RoutingPolicy
from srde_ds.training.reporting.held_out import Batch
from srde_ds.training.reporting.step_metrics import sum_over_ranks
from srde_ds.training.warm_start.routers import visit_inputs
from srde_ds.training.warm_start.token_sample import TokenSample, all_tokens, special_token_ids
from srde_ds.weights.origins import DomainStatistics


def measure_domains(engine: Engine, config: Config, topology: Topology, rows: datasets.Dataset) -> None:
    """Measure the mean and spread of each block's input on each domain, and keep them in the model; a collective.

    It runs `domain_statistics_rows` rows of each domain forward, with the experts that the router chooses. A domain
    without usable tokens is left out.

    Args:
        rows: training rows as written by `build_dataset`, the same on all ranks.
    """
    base, data, training = config.model, config.data, config.training
    special = on_main_rank(
        lambda: special_token_ids(load_tokenizer(str(base.model_name), revision=base.model_revision)), topology
    )
    sample = all_tokens(
        rows,
        domains=data.domains,
        rows_a_domain=training.domain_statistics_rows,
        special_ids=special,
        seed=training.seed,
    )
    counts = np.bincount(sample.domain, minlength=len(data.domains))
    if not counts.any():
        return

    def forward(batch: Batch) -> None:
        batch = {key: value.to(topology.device) for key, value in batch.items()}
        inputs = {key: batch[key] for key in ("input_ids", "position_ids", "token_mask")}
        engine.deepspeed(**inputs, logits_to_keep=1, policy=RoutingPolicy())

    batches = validation_batches(
        rows.select(sample.rows), training.batch_size, rank=topology.rank, world_size=topology.world_size
    )
    engine.deepspeed.eval()
    try:
        sums = sum_inputs(engine.model, forward, batches, sample, len(data.domains))
    finally:
        engine.deepspeed.train()
    tokens = {name: int(count) for name, count in zip(data.domains, counts, strict=True) if count}
    engine.model.origins.update(tokens, statistics_of(sum_over_ranks({"sums": sums}, topology.device)["sums"], counts))


def sum_inputs(
    model: SRDEModel, forward: Callable[[Batch], object], batches: Iterable[Batch], sample: TokenSample, domains: int
) -> Tensor:
    """`[L, 2, domains, D]` float64: sums of what enters each block on each domain, and of its squares.

    Args:
        forward, batches: as of `visit_inputs`.
    """
    first = model.layers[0]
    shape = (len(model.layers), 2, domains, first.hidden)
    sums = torch.zeros(shape, dtype=torch.float64, device=first.support.device)

    def add(layer: int, inputs: Tensor, tokens: np.ndarray) -> None:
        domain, inputs = torch.from_numpy(sample.domain[tokens]).to(inputs.device), inputs.double()
        sums[layer, 0].index_add_(0, domain, inputs)
        sums[layer, 1].index_add_(0, domain, inputs.square())

    with torch.no_grad():
        visit_inputs(model, forward, batches, sample, add)
    return sums


def statistics_of(sums: Tensor, counts: np.ndarray) -> list[DomainStatistics]:
    """Mean and spread in each layer of the domains that have tokens, in host memory.

    Args:
        sums: as `sum_inputs` gives them.
        counts: `[domains]` tokens of each.
    """
    total, found = torch.from_numpy(counts).to(sums.device), torch.from_numpy(counts > 0).to(sums.device)
    averages = sums[:, :, found] / total[found, None]
    mean, spread = averages[:, 0], (averages[:, 1] - averages[:, 0].square()).clamp(min=0).sqrt()
    return [DomainStatistics(m, s) for m, s in zip(mean.float().cpu(), spread.float().cpu(), strict=True)]
