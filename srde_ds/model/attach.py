"""Puts experts into a base: replaces every feed-forward block by one that carries them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel

from srde_ds.config import AdapterConfig
from srde_ds.config.checks import check_neuron_parts
from srde_ds.errors import SRDEError
from srde_ds.model.base import WHOLE, Gather, Sharding
from srde_ds.model.base_files import identity_before_quantization
from srde_ds.model.deltas import Storage, build_deltas
from srde_ds.model.feed_forward import FeedForward, find_feed_forward
from srde_ds.model.layer import SRDEFeedForward
from srde_ds.model.policy import PolicyControl
from srde_ds.model.router import Router
from srde_ds.model.shared_expert import build_shared_expert
from srde_ds.model.supports.selection import (
    kept_size,
    select_support,
    shared_expert_neurons,
    support_shape,
    support_size,
)


class Neurons(NamedTuple):
    """What the experts of a layer may change: the routed ones' support, and the neurons of the shared one.

    `shared` is None if there is no shared expert, or if its neurons are loaded later.
    """

    support: Tensor
    shared: Tensor | None = None


SupportChooser = Callable[[int, FeedForward], Neurons]
"""Chooses what a layer's experts may change, given its number and block."""


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
        What gives the layers their policy, and the identity of the base before the change.

    Raises:
        SRDEError: the names do not fit the config, or the base has no fitting blocks or already carries experts.
    """
    check_experts(config, expert_names)
    blocks = find_feed_forward(base, gather=sharding.gather)
    identity = identity_before_quantization(base, gather=sharding.gather)
    routing = PolicyControl()
    base.requires_grad_(False)
    dtype = dtype or base.dtype
    for number, block in enumerate(blocks):
        storage = Storage(dtype, block.device, sharding.pad_to)
        neurons = choose_support(number, block)
        layer = block_with_experts(
            block, number, config, neurons, control=routing, seed=seed, storage=storage, target_density=target_density
        )
        setattr(block.owner, block.name, layer.train(base.training))
    return routing, identity


def check_experts(config: AdapterConfig, expert_names: Sequence[str]) -> None:
    """Raise an SRDEError unless each expert has a name, and there are enough experts and neurons."""
    if len(expert_names) != config.num_experts:
        raise SRDEError(
            f"num_experts={config.num_experts}, but {len(expert_names)} expert names ({', '.join(expert_names)}); "
            "give one name for each expert."
        )
    if config.top_k > config.num_experts:
        raise SRDEError(f"top_k={config.top_k}: must not exceed num_experts={config.num_experts}.")
    check_neuron_parts(config)


def block_with_experts(
    block: FeedForward,
    layer: int,
    config: AdapterConfig,
    neurons: Neurons,
    *,
    control: PolicyControl,
    seed: int,
    storage: Storage,
    target_density: float | None = None,
) -> SRDEFeedForward:
    """A block with new experts whose deltas are zero. The base is not changed.

    Args:
        layer: number of the decoder layer.
        control: gives the layers of a model their policy.
        seed, target_density: see `adapter.add_experts`.
    """
    deltas = build_deltas(
        config,
        hidden=block.hidden,
        size=support_size(config, block.hidden, block.intermediate),
        seed=seed,
        layer=layer,
        storage=storage,
        keep=kept_size(config, target_density, block.hidden, block.intermediate),
    )
    router = Router(block.hidden, config.num_experts, config.top_k, seed=seed, layer=layer, storage=storage)
    return SRDEFeedForward(
        block,
        deltas,
        router,
        neurons.support.to(storage.device),
        shared_expert=build_shared_expert(
            config,
            hidden=block.hidden,
            intermediate=block.intermediate,
            neurons=neurons.shared,
            storage=storage,
        ),
        granularity=config.granularity,
        layer=layer,
        control=control,
    )


def support_chooser(
    config: AdapterConfig, supports: Sequence[Tensor] | None, *, seed: int, gather: Gather
) -> SupportChooser:
    """A chooser that takes the given supports, one for each layer, or else chooses as the config says.

    With given supports, the neurons of shared experts are loaded later.
    """

    def choose(layer: int, block: FeedForward) -> Neurons:
        if supports is not None:
            given = supports[layer] if layer < len(supports) else torch.empty(0)
            shape = support_shape(config, block.hidden, block.intermediate)
            if tuple(given.shape) != shape:
                raise SRDEError(
                    f"support of layer {layer}: its shape is {list(given.shape)}, but this base and these options "
                    f"need {list(shape)}. Use the base and the adapter options that the supports were chosen with."
                )
            return Neurons(given)
        weights = block.weights()
        with gather(list(weights)):  # type: ignore[arg-type]
            shapes = [(block.intermediate, block.hidden)] * 2 + [(block.hidden, block.intermediate)]
            plain = [tuple(w.shape) for w in weights] == shapes and all(w.is_floating_point() for w in weights)
            if config.support_strategy != "random" and not plain:
                raise SRDEError(
                    f"support_strategy={config.support_strategy}: layer {layer} of the base has no plain weights of "
                    f"shapes {shapes} (quantised?); use support_strategy=random."
                )
            options: dict[str, int] = {"hidden": block.hidden, "intermediate": block.intermediate}
            options |= {"seed": seed, "layer": layer}
            support = select_support(config, weights, **options)
            if not config.shared_expert_density:
                return Neurons(support)
            return Neurons(support, shared_expert_neurons(config, weights, support, **options))

    return choose
