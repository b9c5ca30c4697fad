"""Changes of SRDE that are no options of it, tried by the suites `causes` and `routing`.

Each is a patch under which a run trains and is measured. What wins becomes an option or a default; what does not stays
here, so that anyone can measure it again. All are for free deltas of whole neurons on one process, and keep the number
of trainable values.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import replace
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from srde_ds.config import AdapterConfig
from srde_ds.errors import SRDEError
from srde_ds.model import attach
from srde_ds.model.base import Gather
from srde_ds.model.deltas import DeltaBank, FreeNeuronDeltas, build_deltas
from srde_ds.model.feed_forward import FeedForward
from srde_ds.model.router import Router
from srde_ds.model.seeding import seeded_generator
from srde_ds.model.supports.selection import select_support
from srde_ds.optim import gram_muon
from srde_ds.optim.shards import MatrixShard
from srde_ds.training.engine_rebuild import Engines

Patch = AbstractContextManager[Any]
LAYERS = 30  # of SmolLM2-135M


def neurons_by_depth(sizes: Sequence[int]) -> Patch:
    """Each layer its own number of neurons, in place of the one that follows from `density`.

    Raises (while it trains):
        SRDEError: a base with another number of layers.
    """

    def size_of(layer: int) -> int:
        if layer >= len(sizes):
            raise SRDEError(f"layer {layer}: this variant is made for a base of {len(sizes)} layers.")
        return sizes[layer]

    def chooser(
        config: AdapterConfig, supports: Sequence[Tensor] | None, *, seed: int, gather: Gather
    ) -> attach.SupportChooser:
        def choose(layer: int, block: FeedForward) -> attach.Neurons:
            if supports is not None:
                return attach.Neurons(supports[layer])
            own = replace(config, density=size_of(layer) / block.intermediate)
            shape = {"hidden": block.hidden, "intermediate": block.intermediate}
            weights = block.weights()
            with gather(list(weights)):  # type: ignore[arg-type]
                return attach.Neurons(select_support(own, weights, **shape, seed=seed, layer=layer))

        return choose

    def build(config: AdapterConfig, *, size: int, layer: int, **options: Any) -> DeltaBank:
        return build_deltas(config, size=size_of(layer), layer=layer, **options)

    patches = ExitStack()
    patches.enter_context(mock.patch("srde_ds.model.adapter.support_chooser", chooser))
    patches.enter_context(mock.patch.object(attach, "build_deltas", build))
    # A layer with more neurons than the config says would be pruned.
    patches.enter_context(mock.patch.object(Engines, "_must_shrink", lambda *_: False))
    return patches


def router_temperature(temperature: float) -> Patch:
    """Logits divided by this, from the start to the measurements."""
    logits = Router._logits
    return mock.patch.object(Router, "_logits", lambda self, x_TD: logits(self, x_TD) / temperature)


def rate_of_down(factor: float) -> Patch:
    """Muon's rate of the down projections' deltas times this; gate and up keep theirs."""
    newton_schulz = gram_muon.newton_schulz_factor

    def scaled(gram: Tensor, eps: float) -> Tensor:
        roles = torch.tensor([1.0, 1.0, factor], device=gram.device).repeat(len(gram) // 3)
        return newton_schulz(gram, eps) * roles[:, None, None]

    return mock.patch.object(gram_muon, "newton_schulz_factor", scaled)


def one_matrix_an_expert() -> Patch:
    """Muon sees an expert's three projections as one matrix `[D, 3*m]` instead of three `[D, m]`."""
    register = gram_muon.GramMuonAdamW.register_layout

    def joined(shard: MatrixShard) -> MatrixShard:
        stop = None if shard.stop is None else shard.stop // 3
        return replace(shard, count=shard.count // 3, width=shard.width * 3, first=shard.first // 3, stop=stop)

    def registered(self: Any, flat_param: Tensor, shards: Sequence[MatrixShard], process_group: Any) -> None:
        register(self, flat_param, [joined(shard) for shard in shards], process_group)

    return mock.patch.object(gram_muon.GramMuonAdamW, "register_layout", registered)


def random_first_deltas(scale: float) -> Patch:
    """Deltas start as normal noise of this standard deviation, each expert's its own, instead of at zero."""

    def build(config: AdapterConfig, *, seed: int, layer: int, **options: Any) -> DeltaBank:
        bank = build_deltas(config, seed=seed, layer=layer, **options)
        assert isinstance(bank, FreeNeuronDeltas)
        noise = torch.randn(bank.free.shape, generator=seeded_generator(seed, "first deltas", layer)) * scale
        noise[bank.hidden :] = 0  # padding
        bank.free.data.copy_(noise)
        return bank

    return mock.patch.object(attach, "build_deltas", build)


def _linear(first: int, last: int) -> list[int]:
    return [round(first + (last - first) * layer / (LAYERS - 1)) for layer in range(LAYERS)]


# 15 neurons a layer is a density of 0.01.
VARIANTS: dict[str, Callable[[], Patch]] = {
    "lower half": lambda: neurons_by_depth([29] * 15 + [1] * 15),
    "upper half": lambda: neurons_by_depth([1] * 15 + [29] * 15),
    "falling with depth": lambda: neurons_by_depth(_linear(25, 5)),
    "rising with depth": lambda: neurons_by_depth(_linear(5, 25)),
    "router temperature 1/4": lambda: router_temperature(0.25),
    "router temperature 1/2": lambda: router_temperature(0.5),
    "router temperature 2": lambda: router_temperature(2.0),
    "router temperature 4": lambda: router_temperature(4.0),
    "rate of down x 3": lambda: rate_of_down(3.0),
    "rate of down / 3": lambda: rate_of_down(1 / 3),
    "one matrix an expert": one_matrix_an_expert,
    "random first deltas": lambda: random_first_deltas(0.002),
}


def patched(variant: str | None) -> Patch:
    """The variant's patches as a context; None changes nothing.

    Raises:
        SRDEError: a name that is not in VARIANTS.
    """
    if variant is None:
        return nullcontext()
    if variant not in VARIANTS:
        raise SRDEError(f"variant={variant}: must be one of {', '.join(VARIANTS)}.")
    return VARIANTS[variant]()
