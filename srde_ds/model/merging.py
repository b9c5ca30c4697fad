"""Adds an expert's delta to the base's dense weights."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from srde_ds.config.granularity import Granularity
from srde_ds.errors import SRDEError
from srde_ds.model.feed_forward import ROLES
from srde_ds.model.layer import SRDEFeedForward
from srde_ds.model.quantization import weight_of
from srde_ds.model.supports.blocks import weight_indices

logger = logging.getLogger(__name__)

PLAIN_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


class Rounding:
    """Measures what rounding to the dtype of the weights loses of the experts' changes.

    Attributes:
        changed: number of weights that the experts change, in a dtype with less than float32's precision.
    """

    def __init__(self) -> None:
        self.changed = self._same = 0
        self._error = self._size = 0.0

    @torch.no_grad()
    def add(self, before: Tensor, after: Tensor, change: Tensor) -> None:
        """Count weights before and after the merge, and their exact change."""
        moved, change = after.float() - before.float(), change.float()
        self.changed += int((change != 0).sum())
        self._same += int(((change != 0) & (moved == 0)).sum())
        self._error += float((moved - change).square().sum())
        self._size += float(change.square().sum())

    @property
    def relative_error(self) -> float:
        """The norm of the error relative to the norm of the exact changes."""
        return (self._error / self._size) ** 0.5 if self._size else 0.0

    @property
    def unchanged_share(self) -> float:
        """The share of the weights to change that rounding leaves unchanged."""
        return self._same / self.changed if self.changed else 0.0

    def __str__(self) -> str:
        return (
            f"rounding: the merged changes have a relative error of {self.relative_error:.2g}, and "
            f"{self.unchanged_share:.1%} of the weights to change stay the same"
        )


def merged_weight(
    weight: Tensor,
    role: str,
    support: Tensor,
    delta: Tensor,
    granularity: Granularity,
    rounding: Rounding | None = None,
) -> Tensor:
    """W + delta_e for one of a block's matrices, as a new tensor in the dtype of W; the sum is rounded once.

    Args:
        weight: gate or up `[F, D]`, down `[D, F]`.
        role: which of ROLES it is.
        support: the expert's `[m]` neurons, `[b]` blocks, or `[n]` flat indices into gate, up, down.
        delta: the expert's effective delta, `[D, 3, m]` (neuron) or `[n]`.
        rounding: counts what the rounding loses.
    """
    merged, number = weight.detach().clone(), ROLES.index(role)
    index, precise = support.long(), torch.promote_types(weight.dtype, torch.float32)
    place: Any = index
    if granularity != "neuron":
        hidden, intermediate = weight.shape if role == "down" else weight.shape[::-1]
        index = weight_indices(granularity, support, hidden, intermediate)
        first = number * weight.numel()
        here = (index >= first) & (index < first + weight.numel())
        merged, place, change = merged.view(-1), index[here] - first, delta[here]
    elif role == "down":
        place, change = (slice(None), index), delta[:, number]
    else:
        change = delta[:, number].T
    before = merged[place]
    after = (before.to(precise) + change.to(precise)).to(weight.dtype)
    if rounding is not None and precise != weight.dtype:
        rounding.add(before, after, change)
    merged[place] = after
    return merged.view_as(weight)


def merge_into_base(base: PreTrainedModel, expert: int) -> None:
    """Add an expert's deltas to the base's original blocks, and put these back in their places.

    Raises:
        SRDEError: a block's weights are quantised. Then nothing is changed.
    """
    found = [
        (owner, name, child)
        for owner in base.modules()
        for name, child in owner.named_children()
        if isinstance(child, SRDEFeedForward)
    ]
    check_mergeable([layer for _, _, layer in found])
    merge_into_blocks([layer for _, _, layer in found], expert)
    for owner, name, layer in found:
        setattr(owner, name, layer.block)


def check_mergeable(layers: Sequence[SRDEFeedForward]) -> None:
    """Raise an SRDEError if the weights of a layer's block are quantised."""
    for layer in layers:
        for projection in _projections(layer).values():
            weight = weight_of(projection)
            if weight is None or weight.dtype not in PLAIN_DTYPES or weight.dim() != 2:
                raise SRDEError(
                    f"the expert cannot be merged: layer {layer.layer} of the base has quantised weights "
                    f"({type(projection).__name__}); load the base unquantised."
                )


@torch.no_grad()
def merge_into_blocks(layers: Sequence[SRDEFeedForward], expert: int) -> None:
    """Add the deltas of one expert and of the shared one to the weights of the layers' blocks, in place.

    A warning says what rounding loses."""
    rounding = Rounding()
    for layer in layers:
        shared = layer.shared_expert
        support = layer.support if layer.support.dim() == 1 else layer.support[expert]
        delta = expert_delta(layer.deltas.whole(), expert, layer.granularity)
        for role, projection in _projections(layer).items():
            weight = weight_of(projection)
            assert weight is not None  # see check_mergeable
            if shared is not None:
                weight.copy_(merged_weight(weight, role, shared.neurons, shared(), "neuron", rounding))
            weight.copy_(merged_weight(weight, role, support, delta, layer.granularity, rounding))
    if rounding.changed:
        logger.warning("%s; a base in float32 keeps them exactly", rounding)


def expert_delta(deltas: Tensor, expert: int, granularity: Granularity) -> Tensor:
    """One expert's part of a bank's effective deltas: `[D, 3, m]` or `[n]`."""
    return deltas[:, expert] if granularity == "neuron" else deltas[expert]


def _projections(layer: SRDEFeedForward) -> dict[str, nn.Module]:
    return {role: getattr(layer.block, layer.roles[role]) for role in ROLES}
