"""Brings tokens to experts and back: the protocol, its local implementation and the experts' arithmetic.

The layer passes what the experts need (tokens, the base's gate and up values, each token's K experts and their weights,
and the effective deltas of the experts held here). It gets back, summed over a token's experts with weight p_e,

    change = sum_e p_e (h_e - h)        to be added to the base's hidden values before down_proj, and
    extra  = sum_e p_e dD_e h_e         to be added to the base's output.

Every expert also runs on zero tokens, so that every parameter gets a gradient on every rank.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Protocol

import torch
from torch import Tensor

from srde_ds.model.block_experts import block_experts
from srde_ds.model.delta_linear import element_deltas
from srde_ds.model.products import ByExpert, ExpertProducts, TakenSlots, expert_products, filled_slots
from srde_ds.model.supports.blocks import SupportBlocks

Activation = Callable[[Tensor], Tensor]


class ExpertDispatch(Protocol):
    """How a layer reaches its experts. index_TK counts all experts, including those on other ranks."""

    def neuron(
        self,
        act: Activation,
        x_TD: Tensor,
        gate_TXm: Tensor,
        up_TXm: Tensor,
        index_TK: Tensor,
        weights_TK: Tensor,
        deltas_DE3m: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """change `[T, X, m]` and extra `[T, D]`. If the experts share a support, X is 1 and change is the sum over a
        token's experts; otherwise X is K, and each expert's change is at its own neurons."""
        ...

    def products(self, index_TK: Tensor, deltas_DE3m: Tensor) -> ExpertProducts | None:
        """For neurons, the experts' products, if the layer can do the rest itself; None: it must call `neuron`."""
        ...

    def element(
        self,
        act: Activation,
        x_TD: Tensor,
        gate_TF: Tensor,
        up_TF: Tensor,
        index_TK: Tensor,
        weights_TK: Tensor,
        deltas_En: Tensor,
        support: Tensor | SupportBlocks,
    ) -> tuple[Tensor, Tensor]:
        """change `[T, F]` and extra `[T, D]`.

        Args:
            support: `[n]` or `[E, n]`, flat indices into gate, up, down; or blocks, for which F counts only their
                `neurons`.
        """
        ...


class LocalDispatch:
    """For experts that are all in this process.

    Args:
        compiled: run the neuron experts' arithmetic through torch.compile; equal within rounding.
        kernels: let the layer use the kernels of `fused.py` if possible; equal within rounding.
    """

    def __init__(self, *, compiled: bool = False, kernels: bool = False) -> None:
        self._neuron_experts = _compiled_neuron_experts() if compiled else neuron_experts
        self._kernels = kernels

    def products(self, index_TK: Tensor, deltas_DE3m: Tensor) -> ExpertProducts | None:
        """As `ExpertDispatch.products`."""
        return expert_products(deltas_DE3m, index_TK) if self._kernels else None

    def neuron(
        self,
        act: Activation,
        x_TD: Tensor,
        gate_TXm: Tensor,
        up_TXm: Tensor,
        index_TK: Tensor,
        weights_TK: Tensor,
        deltas_DE3m: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """See `ExpertDispatch.neuron`; uses `neuron_experts`."""
        return self._neuron_experts(act, x_TD, gate_TXm, up_TXm, index_TK, weights_TK, deltas_DE3m)

    def element(
        self,
        act: Activation,
        x_TD: Tensor,
        gate_TF: Tensor,
        up_TF: Tensor,
        index_TK: Tensor,
        weights_TK: Tensor,
        deltas_En: Tensor,
        support: Tensor | SupportBlocks,
    ) -> tuple[Tensor, Tensor]:
        """See `ExpertDispatch.element`; uses `element_experts`."""
        return element_experts(act, x_TD, gate_TF, up_TF, index_TK, weights_TK, deltas_En, support)


@cache
def _compiled_neuron_experts() -> Callable[..., tuple[Tensor, Tensor]]:
    """One function for all layers, so that they share its kernels."""
    compiled: Callable[..., tuple[Tensor, Tensor]] = torch.compile(neuron_experts)
    return compiled


def neuron_experts(
    act: Activation,
    x_TD: Tensor,
    gate_TXm: Tensor,
    up_TXm: Tensor,
    index_TK: Tensor,
    weights_TK: Tensor,
    deltas_DE3m: Tensor,
) -> tuple[Tensor, Tensor]:
    """Compute each token with its experts' neurons.

    The base's hidden values are computed again here, with the experts' operations and at the same positions of tensors
    of the same shape. So zero deltas change exactly nothing, although kernels round the last few values of a tensor
    differently from those that fill a vector register.
    """
    products = expert_products(deltas_DE3m, index_TK)
    shift_TK2m, shape = products.into(x_TD), (*index_TK.shape, gate_TXm.shape[2])
    if products.by_expert:
        shift_TK2m = TakenSlots.apply(shift_TK2m, index_TK)
    base_2TKm = torch.stack([gate_TXm.expand(shape), up_TXm.expand(shape)])
    base_gate_TKm, base_up_TKm = base_2TKm.unbind()
    gate_TKm, up_TKm = (base_2TKm + shift_TK2m.permute(2, 0, 1, 3)).unbind()
    h_TKm = act(gate_TKm) * up_TKm
    weights_TK1 = weights_TK[:, :, None]
    change = weights_TK1 * (h_TKm - act(base_gate_TKm) * base_up_TKm)
    weighted = weights_TK1 * h_TKm
    if products.by_expert:
        weighted = filled_slots(weighted, index_TK, deltas_DE3m.shape[1])
    return (change.sum(1, keepdim=True) if gate_TXm.shape[1] == 1 else change), products.back(weighted)


def element_experts(
    act: Activation,
    x_TD: Tensor,
    gate_TF: Tensor,
    up_TF: Tensor,
    index_TK: Tensor,
    weights_TK: Tensor,
    deltas_En: Tensor,
    support: Tensor | SupportBlocks,
) -> tuple[Tensor, Tensor]:
    """Compute expert by expert, on its own tokens."""
    # A copy, so that autograd does not keep the buffer into which ZeRO-3 gathered the deltas.
    deltas_En = deltas_En.clone()
    if isinstance(support, SupportBlocks):
        return block_experts(act, x_TD, gate_TF, up_TF, index_TK, weights_TK, deltas_En, support)
    sizes = x_TD.shape[1], gate_TF.shape[1]
    shared = element_deltas(support, *sizes) if support.dim() == 1 else None
    order = ByExpert(index_TK)
    counts = torch.bincount(index_TK.flatten(), minlength=len(deltas_En)).tolist()
    sorted_tokens = zip(*(order.sorted(t).split(counts) for t in (x_TD, gate_TF, up_TF)), strict=True)
    changes, extras = [], []
    for expert, (values, (x, base_gate, base_up)) in enumerate(zip(deltas_En, sorted_tokens, strict=True)):
        delta = shared or element_deltas(support[expert], *sizes)
        gate_shift, up_shift = delta.into(x, values)
        h = act(base_gate + gate_shift) * (base_up + up_shift)
        changes.append(h - act(base_gate) * base_up)
        extras.append(delta.back(h, values))
    weights_TK1 = weights_TK[:, :, None]
    change, extra = ((weights_TK1 * order.unsorted(torch.cat(parts))).sum(1) for parts in (changes, extras))
    return change, extra
