"""Set the routers from what enters them: sample their inputs, cluster them on rank 0 layer by layer, write the weights.

See docs/curriculum.md for what each method gives.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields
from typing import Any, cast

import datasets
import numpy as np
import torch
from torch import Tensor, nn

from srde_ds.config import Config
from srde_ds.data.loader import validation_batches
from srde_ds.data.tokenizer import load_tokenizer
from srde_ds.distributed.engine import Engine
from srde_ds.distributed.processes import Topology, broadcast_from_main, gather_to_main
from srde_ds.distributed.together import on_main_rank
from srde_ds.model.adapter import SRDEModel
from srde_ds.model.layer import SRDEFeedForward
from srde_ds.training.reporting.held_out import Batch, forced_experts
from srde_ds.training.warm_start.clustering import RouterFit, fit_router
from srde_ds.training.warm_start.token_sample import TokenSample, choose_tokens, special_token_ids


@dataclass(frozen=True)
class WarmStartReport:
    """What came out, by layer; figures are those of the sample.

    Attributes:
        samples: domain -> tokens looked at; fewer than `warm_start_samples` where a domain has no more.
        normalized_mutual_information: `[L]` between a token's best expert and its domain.
        own_domain_share: `[L]` tokens whose best expert is their domain's.
        cluster_sizes: `[L][E]` tokens by best expert.
    """

    method: str
    samples: dict[str, int]
    normalized_mutual_information: list[float]
    own_domain_share: list[float]
    cluster_sizes: list[list[int]]


def warm_start_routers(engine: Engine, config: Config, topology: Topology, rows: datasets.Dataset) -> WarmStartReport:
    """Replace all routers' weights as `warm_start_method` says; a collective of all ranks.

    Args:
        rows: training rows as written by `build_dataset`, the same on all ranks.

    Raises:
        SRDEError: on every rank: a domain without usable tokens, or inputs that do not tell the experts apart.
    """
    curriculum, domains = config.curriculum, config.data.domains
    name, revision = str(config.model.model_name), config.model.model_revision
    special = on_main_rank(lambda: special_token_ids(load_tokenizer(name, revision=revision)), topology)
    sample = choose_tokens(
        rows,
        domains=domains,
        per_domain=curriculum.warm_start_samples,
        special_ids=special,
        seed=config.training.seed,
    )
    fits = fit_layers(_own_inputs(engine, config, topology, rows, sample), sample, config, topology)
    engine.set_trainables(
        {f"layers.{layer}.router.weight": torch.from_numpy(fit.weights) for layer, fit in enumerate(fits)}
    )
    counts = np.bincount(sample.domain, minlength=len(domains)).tolist()
    return WarmStartReport(
        method=curriculum.warm_start_method,
        samples=dict(zip(domains, counts, strict=True)),
        normalized_mutual_information=[fit.normalized_mutual_information for fit in fits],
        own_domain_share=[fit.own_domain_share for fit in fits],
        cluster_sizes=[fit.cluster_sizes for fit in fits],
    )


def _own_inputs(
    engine: Engine, config: Config, topology: Topology, rows: datasets.Dataset, sample: TokenSample
) -> list[Tensor]:
    """By layer [n, D] in host memory: inputs of this rank's tokens of the sample."""
    batches = validation_batches(
        rows.select(sample.rows), config.training.batch_size, rank=topology.rank, world_size=topology.world_size
    )
    routing = engine.model.routing
    forced_before = routing.forced_experts

    def forward(batch: Batch) -> None:
        batch = {key: value.to(topology.device) for key, value in batch.items()}
        # After pretraining, each expert as it was trained; without it all deltas are zero and any routing does.
        if config.curriculum.supervised_experts:
            routing.forced_experts = forced_experts(batch, "domain")
        inputs = {key: batch[key] for key in ("input_ids", "position_ids", "token_mask")}
        engine.deepspeed(**inputs, logits_to_keep=1)

    engine.deepspeed.eval()
    try:
        with torch.no_grad():
            return capture_inputs(engine.model, forward, batches, sample)
    finally:
        routing.forced_experts = forced_before
        engine.deepspeed.train()


def capture_inputs(
    model: SRDEModel, forward: Callable[[Batch], object], batches: Iterable[Batch], sample: TokenSample
) -> list[Tensor]:
    """Run `batches` and keep what enters each layer's router for the tokens of the sample in them.

    Args:
        batches: as `validation_batches` cuts the rows of the sample; dummy rows are run, too.

    Returns:
        By layer [n, D] in host memory, in the sample's order.
    """
    chunks: list[list[Tensor]] = [[] for _ in model.layers]
    flat = torch.empty(0, dtype=torch.int64)

    def keep(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        x = args[0].flatten(0, -2)
        chunks[cast("SRDEFeedForward", module).layer].append(x.index_select(0, flat.to(x.device)).cpu())

    hooks = [layer.register_forward_pre_hook(keep) for layer in model.layers]
    try:
        for batch in batches:
            row_index, length = batch["row_index"].numpy(), batch["input_ids"].shape[1]
            token = np.isin(sample.row, row_index)
            flat = torch.from_numpy((sample.row[token] - row_index[0]) * length + sample.position[token])
            forward(batch)
    finally:
        for hook in hooks:
            hook.remove()
    return [torch.cat(chunks.pop(0)) for _ in model.layers]


def fit_layers(own: list[Tensor], sample: TokenSample, config: Config, topology: Topology) -> list[RouterFit]:
    """Cluster one layer after the other on rank 0, which holds the whole sample of one layer at a time.

    Args:
        own: by layer [n, D], this rank's tokens in the sample's order.

    Returns:
        The same on every rank.
    """
    return [_fit_layer(inputs, layer, sample, config, topology) for layer, inputs in enumerate(own)]


def _fit_layer(own: Tensor, layer: int, sample: TokenSample, config: Config, topology: Topology) -> RouterFit:
    owner = sample.owners(config.training.batch_size, topology.world_size)
    gathered = gather_to_main(own, np.bincount(owner, minlength=topology.world_size).tolist(), topology)
    inputs = np.empty((0, 0), np.float32)  # of rank 0 alone
    if gathered is not None:
        arrived = np.argsort(np.argsort(owner, kind="stable"))  # rank by rank, and in the sample's order from each
        inputs = gathered[torch.from_numpy(arrived)].float().cpu().numpy()
        del gathered

    weights = torch.empty(config.adapter.num_experts, own.shape[1])

    def fit() -> dict[str, Any]:
        found = fit_router(
            inputs,
            sample.domain,
            num_experts=config.adapter.num_experts,
            method=config.curriculum.warm_start_method,
            seed=config.training.seed,
            layer=layer,
        )
        weights.copy_(torch.from_numpy(found.weights))
        return {field.name: getattr(found, field.name) for field in fields(found) if field.name != "weights"}

    figures = on_main_rank(fit, topology, long=True)
    weights = weights.to(topology.device)
    broadcast_from_main(weights)
    return RouterFit(weights.cpu().numpy(), **figures)
