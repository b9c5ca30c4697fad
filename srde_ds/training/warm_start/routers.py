"""Sets the routers: sample their inputs, cluster them on rank 0 layer by layer, write the weights.

docs/curriculum.md shows what each method gives.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields
from typing import Any, cast

import datasets
import numpy as np
import torch
from torch import Tensor, nn

from srde_ds.config import Config, ModelConfig
from srde_ds.data.loader import validation_batches
from srde_ds.data.tokenizer import load_tokenizer
from srde_ds.distributed.engine import Engine
from srde_ds.distributed.processes import Topology, broadcast_from_main, gather_to_main
from srde_ds.model.adapter import SRDEModel
from srde_ds.model.attention import inputs_of
from srde_ds.model.evaluated import evaluated
from srde_ds.model.layer import SRDEFeedForward
from srde_ds.model.policy import RoutingPolicy
from srde_ds.training.reporting.held_out import Batch, forced_experts
from srde_ds.training.signals import until_interrupted
from srde_ds.training.warm_start.clustering import RouterFit, fit_router
from srde_ds.training.warm_start.token_sample import TokenSample, choose_tokens, special_token_ids
from srde_ds.utils.together import on_main_rank


@dataclass(frozen=True)
class WarmStartReport:
    """The result of the warm start, by layer, on the sample.

    Attributes:
        method: see `warm_start_method`.
        samples: domain -> number of tokens in the sample; fewer than asked for if the domain has no more.
        normalized_mutual_information: `[L]`, that of a token's best expert and its domain.
        own_domain_share: `[L]` share of the tokens whose best expert is their domain's.
        cluster_sizes: `[L][E]` number of tokens by best expert.
    """

    method: str
    samples: dict[str, int]
    normalized_mutual_information: list[float]
    own_domain_share: list[float]
    cluster_sizes: list[list[int]]


def warm_start_routers(
    engine: Engine,
    config: Config,
    topology: Topology,
    rows: datasets.Dataset,
    interrupted: Callable[[], bool] = lambda: False,
) -> WarmStartReport:
    """Replace the weights of all routers; a collective of all ranks.

    Args:
        rows: training rows as written by `build_dataset`, the same on all ranks.

    Raises:
        SRDEError: on every rank: a domain has no usable tokens, or the inputs do not tell the experts apart.
        Interrupted: `interrupted` became true; nothing has changed.
    """
    sample = choose_tokens(
        rows,
        domains=config.data.domains,
        per_domain=config.curriculum.warm_start_samples,
        special_ids=special_tokens(config.model, topology),
        seed=config.training.seed,
    )
    batches = validation_batches(
        rows.select(sample.rows), config.training.batch_size, rank=topology.rank, world_size=topology.world_size
    )
    own = _own_inputs(engine, config, until_interrupted(batches, interrupted), sample)
    fits = cluster_layers(until_interrupted(own, interrupted), sample, config, topology)
    engine.set_trainables(
        {f"layers.{layer}.router.weight": torch.from_numpy(fit.weights) for layer, fit in enumerate(fits)}
    )
    for layer in engine.model.layers:
        layer.router.load_selection_bias(None)  # of earlier routers
    counts = np.bincount(sample.domain, minlength=len(config.data.domains)).tolist()
    return WarmStartReport(
        method=config.curriculum.warm_start_method,
        samples=dict(zip(config.data.domains, counts, strict=True)),
        normalized_mutual_information=[fit.normalized_mutual_information for fit in fits],
        own_domain_share=[fit.own_domain_share for fit in fits],
        cluster_sizes=[fit.cluster_sizes for fit in fits],
    )


def special_tokens(base: ModelConfig, topology: Topology) -> list[int]:
    """The special tokens of a base's tokenizer, which rank 0 reads."""
    return on_main_rank(
        lambda: special_token_ids(load_tokenizer(str(base.model_name), revision=base.model_revision)), topology
    )


def _own_inputs(engine: Engine, config: Config, batches: Iterable[Batch], sample: TokenSample) -> list[Tensor]:
    """For each layer, `[n, D]` in host memory: the inputs of this rank's tokens of the sample."""
    # Each row goes through its domain's expert if these were trained on their domains. Otherwise all deltas are zero,
    # and any routing gives the same inputs, except with start_from, whose routers choose.
    forced = config.curriculum.supervised_experts

    def policies(batch: Batch) -> list[RoutingPolicy]:
        return [RoutingPolicy(forced_experts=forced_experts(batch, "domain") if forced else None)]

    with evaluated(engine.deepspeed):
        forward = forward_of(engine.model, policies, through=engine.deepspeed)
        return capture_inputs(engine.model, forward, batches, sample)


def forward_of(
    model: SRDEModel,
    policies: Callable[[Batch], Iterable[RoutingPolicy]] = lambda _: [RoutingPolicy()],
    *,
    through: Callable[..., object] | None = None,
) -> Callable[[Batch], object]:
    """A function that runs a batch of `validation_batches` through a model, for what hooks see of it.

    Args:
        policies: gets the batch on the device; the model runs once with each.
        through: what wraps the model and is to be called instead, such as DeepSpeed's engine.
    """
    device, run = model.layers[0].support.device, through or model

    def forward(batch: Batch) -> None:
        inputs = inputs_of(model.base, batch, device)
        for policy in policies({key: value.to(device) for key, value in batch.items()}):
            run(**inputs, logits_to_keep=1, policy=policy)

    return forward


def capture_inputs(
    model: SRDEModel, forward: Callable[[Batch], object], batches: Iterable[Batch], sample: TokenSample
) -> list[Tensor]:
    """Run `batches` and keep each router's inputs for the tokens that are in the sample.

    Returns:
        For each layer, `[n, D]` in host memory, in the sample's order.
    """
    chunks: list[list[Tensor]] = [[] for _ in model.layers]
    visit_inputs(model, forward, batches, sample, lambda layer, x, _: chunks[layer].append(x.cpu()))
    return [torch.cat(chunks.pop(0)) for _ in model.layers]


def visit_inputs(
    model: SRDEModel,
    forward: Callable[[Batch], object],
    batches: Iterable[Batch],
    sample: TokenSample,
    visit: Callable[[int, Tensor, np.ndarray], None],
) -> None:
    """Run `batches`, and hand over each router's inputs for the tokens that are in the sample.

    Args:
        batches: the sample's rows as `validation_batches` cuts them; dummy rows are run as well.
        visit: gets a layer's number, `[n, D]` on the model's device, and the tokens' indices in the sample.
    """
    flat, token = torch.empty(0, dtype=torch.int64), np.empty(0, dtype=bool)

    def hand_over(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        x = args[0].flatten(0, -2)
        visit(cast("SRDEFeedForward", module).layer, x.index_select(0, flat.to(x.device)), np.flatnonzero(token))

    hooks = [layer.register_forward_pre_hook(hand_over) for layer in model.layers]
    try:
        for batch in batches:
            row_index, length = batch["row_index"].numpy(), batch["input_ids"].shape[1]
            token = np.isin(sample.row, row_index)
            flat = torch.from_numpy((sample.row[token] - row_index[0]) * length + sample.position[token])
            forward(batch)
    finally:
        for hook in hooks:
            hook.remove()


def cluster_layers(own: Iterable[Tensor], sample: TokenSample, config: Config, topology: Topology) -> list[RouterFit]:
    """Cluster layer after layer on rank 0, which holds the whole sample of one layer at a time.

    Args:
        own: for each layer `[n, D]`, this rank's tokens in the sample's order.

    Returns:
        One fit for each layer, the same on every rank.
    """
    return [_cluster_layer(inputs, layer, sample, config, topology) for layer, inputs in enumerate(own)]


def _cluster_layer(own: Tensor, layer: int, sample: TokenSample, config: Config, topology: Topology) -> RouterFit:
    owner = sample.owners(config.training.batch_size, topology.world_size)
    gathered = gather_to_main(own, np.bincount(owner, minlength=topology.world_size).tolist(), topology)
    inputs = np.empty((0, 0), np.float32)  # only rank 0 gets inputs
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
