"""Adds an expert's delta to the base's dense weights."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from srde_ds.errors import SRDEError
from srde_ds.model.base import ROLES
from srde_ds.model.layer import SRDEFeedForward

PLAIN_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def merged_weight(weight: Tensor, role: str, support: Tensor, delta: Tensor, granularity: str) -> Tensor:
    """W + delta_e for one of a block's matrices, as a new tensor in the dtype of W; the sum is rounded once.

    Args:
        weight: gate or up `[F, D]`, down `[D, F]`.
        role: which of ROLES it is.
        support: the expert's `[m]` neurons, or `[n]` flat indices into gate, up, down.
        delta: the expert's effective delta, `[D, 3, m]` (neuron) or `[n]` (element).
    """
    merged, number = weight.detach().clone(), ROLES.index(role)
    index, precise = support.long(), torch.promote_types(weight.dtype, torch.float32)
    if granularity == "element":
        first = number * weight.numel()
        here = (index >= first) & (index < first + weight.numel())
        merged, index, change = merged.view(-1), index[here] - first, delta[here]
    elif role == "down":
        change = delta[:, number]
        merged[:, index] = (merged[:, index].to(precise) + change.to(precise)).to(weight.dtype)
        return merged
    else:
        change = delta[:, number].T
    merged[index] = (merged[index].to(precise) + change.to(precise)).to(weight.dtype)
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
    for owner, name, layer in found:
        merge_into_block(layer, expert)
        setattr(owner, name, layer.block)


def check_mergeable(layers: Sequence[SRDEFeedForward]) -> None:
    """Raise an SRDEError if the weights of a layer's block are quantised."""
    for layer in layers:
        for weight in _weights(layer).values():
            if weight.dtype not in PLAIN_DTYPES or weight.dim() != 2:
                raise SRDEError(
                    f"the expert cannot be merged: layer {layer.layer} of the base has quantised weights "
                    f"({weight.dtype}, shape {list(weight.shape)}); load the base unquantised."
                )


@torch.no_grad()
def merge_into_block(layer: SRDEFeedForward, expert: int) -> None:
    """Add one expert's deltas to the weights of the layer's block, in place."""
    support = layer.support if layer.support.dim() == 1 else layer.support[expert]
    delta = expert_delta(layer.deltas(), expert, layer.granularity)
    for role, weight in _weights(layer).items():
        weight.copy_(merged_weight(weight, role, support, delta, layer.granularity))


def expert_delta(deltas: Tensor, expert: int, granularity: str) -> Tensor:
    """One expert's part of a bank's effective deltas: `[D, 3, m]` or `[n]`."""
    return deltas[:, expert] if granularity == "neuron" else deltas[expert]


def _weights(layer: SRDEFeedForward) -> dict[str, Tensor]:
    return {role: getattr(layer.block, layer.roles[role]).weight for role in ROLES}
