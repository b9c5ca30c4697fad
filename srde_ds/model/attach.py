"""Putting experts into a base: every feed-forward block is replaced by one that carries them."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from srde_ds.config import AdapterConfig
from srde_ds.errors import SRDEError
from srde_ds.model.base import WHOLE, FeedForward, Gather, Sharding, base_identity, find_feed_forward
from srde_ds.model.deltas import Storage, build_deltas
from srde_ds.model.layer import SRDEFeedForward
from srde_ds.model.policy import PolicyControl
from srde_ds.model.router import Router
from srde_ds.model.supports.selection import kept_size, select_support, support_shape, support_size

SupportChooser = Callable[[int, FeedForward], Tensor]
"""Gives a layer's support from its number and its block."""


def attach_experts(
    base: PreTrainedModel,
    config: AdapterConfig,
    expert_names: Sequence[str],
    choose_support: SupportChooser,
    *,
    seed: int,
    dtype: torch.dtype | None,
    sharding: Sharding = WHOLE,
    target_density: float | None = None,
) -> tuple[PolicyControl, dict[str, str | int]]:
    """Replace the base's feed-forward blocks in place and freeze the base; see `adapter.add_experts`.

    Returns:
        What tells the layers their policy, and the base's identity as it was before.

    Raises:
        SRDEError: the names do not fit the config, or the base has no fitting blocks or carries experts already.
    """
    if len(expert_names) != config.num_experts:
        raise SRDEError(
            f"num_experts={config.num_experts}, but {len(expert_names)} expert names ({', '.join(expert_names)}); "
            "give one name for each expert."
        )
    if config.top_k > config.num_experts:
        raise SRDEError(f"top_k={config.top_k}: must not exceed num_experts={config.num_experts}.")
    blocks = find_feed_forward(base, gather=sharding.gather)
    identity = base_identity(base, gather=sharding.gather)
    routing = PolicyControl()
    base.requires_grad_(False)
    dtype = dtype or base.dtype
    for number, block in enumerate(blocks):
        support = choose_support(number, block)
        device = block.weights()[0].device
        deltas = build_deltas(
            config,
            hidden=block.hidden,
            size=support_size(config, block.hidden, block.intermediate),
            seed=seed,
            layer=number,
            storage=Storage(dtype, device, sharding.pad_to),
            keep=kept_size(config, target_density, block.hidden, block.intermediate),
        )
        router = Router(
            block.hidden, config.num_experts, config.top_k, seed=seed, layer=number, dtype=dtype, device=device
        )
        layer = SRDEFeedForward(
            block, deltas, router, support.to(device), granularity=config.granularity, layer=number, control=routing
        )
        setattr(block.owner, block.name, layer.train(base.training))
    return routing, identity


def support_chooser(
    config: AdapterConfig, supports: Sequence[Tensor] | None, *, seed: int, gather: Gather
) -> SupportChooser:
    """Takes the given supports, one for each layer; without them it chooses as the config says."""

    def choose(layer: int, block: FeedForward) -> Tensor:
        if supports is not None:
            given = supports[layer] if layer < len(supports) else torch.empty(0)
            shape = support_shape(config, block.hidden, block.intermediate)
            if tuple(given.shape) != shape:
                raise SRDEError(
                    f"support of layer {layer}: shape {list(given.shape)} is stored, this base and these options "
                    f"need {list(shape)}. Use the base and the adapter options that the supports were chosen with."
                )
            return given
        weights = block.weights()
        with gather(list(weights)):  # type: ignore[arg-type]
            shapes = [(block.intermediate, block.hidden)] * 2 + [(block.hidden, block.intermediate)]
            if config.support_strategy != "random" and [tuple(w.shape) for w in weights] != shapes:
                raise SRDEError(
                    f"support_strategy={config.support_strategy}: layer {layer} of the base has no plain weights of "
                    f"shapes {shapes} (quantised?); use support_strategy=random."
                )
            return select_support(
                config, weights, hidden=block.hidden, intermediate=block.intermediate, seed=seed, layer=layer
            )

    return choose
