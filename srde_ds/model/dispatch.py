"""Carrying tokens to experts and back: the protocol, the local implementation and the experts' arithmetic.

The layer hands over what the experts need (tokens, the base's gate and up values, routing weights, and the effective
deltas of the experts at hand). It gets back, summed over experts with their weights p_e,

    change = sum_e p_e (h_e - h)        to be added to the base's hidden values before down_proj, and
    extra  = sum_e p_e dD_e h_e         to be added to the base's output.

For neuron granularity, shapes never depend on the routing. For element granularity every expert also runs on zero
tokens, so that every parameter gets a gradient on every rank.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Protocol

import torch
from torch import Tensor

from srde_ds.model.delta_linear import DeltaLinear

Activation = Callable[[Tensor], Tensor]


class ExpertDispatch(Protocol):
    """How the experts of a layer are reached. weights_TE covers all experts, also those on other ranks."""

    def neuron(
        self, act: Activation, x_TD: Tensor, gate_TSm: Tensor, up_TSm: Tensor, weights_TE: Tensor, deltas_DE3m: Tensor
    ) -> tuple[Tensor, Tensor]:
        """change `[T, S, m]` and extra `[T, D]`; S is 1 for a support that the experts share, else E."""
        ...

    def element(
        self,
        act: Activation,
        x_TD: Tensor,
        gate_TF: Tensor,
        up_TF: Tensor,
        weights_TE: Tensor,
        deltas_En: Tensor,
        support: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """change `[T, F]` and extra `[T, D]`; support `[n]` or `[E, n]`, flat indices into gate, up, down."""
        ...


class LocalDispatch:
    """All experts are here.

    Args:
        compiled: run the neuron experts' arithmetic through torch.compile; equal within rounding.
    """

    def __init__(self, *, compiled: bool = False) -> None:
        self._neuron_experts = _compiled_neuron_experts() if compiled else neuron_experts

    def neuron(
        self, act: Activation, x_TD: Tensor, gate_TSm: Tensor, up_TSm: Tensor, weights_TE: Tensor, deltas_DE3m: Tensor
    ) -> tuple[Tensor, Tensor]:
        """As `ExpertDispatch.neuron`, by `neuron_experts`."""
        return self._neuron_experts(act, x_TD, gate_TSm, up_TSm, weights_TE, deltas_DE3m)

    def element(
        self,
        act: Activation,
        x_TD: Tensor,
        gate_TF: Tensor,
        up_TF: Tensor,
        weights_TE: Tensor,
        deltas_En: Tensor,
        support: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """As `ExpertDispatch.element`, by `element_experts`."""
        return element_experts(act, x_TD, gate_TF, up_TF, weights_TE, deltas_En, support)


@cache
def _compiled_neuron_experts() -> Callable[..., tuple[Tensor, Tensor]]:
    """One function for all layers, so that they share its kernels."""
    compiled: Callable[..., tuple[Tensor, Tensor]] = torch.compile(neuron_experts)
    return compiled


def neuron_experts(
    act: Activation, x_TD: Tensor, gate_TSm: Tensor, up_TSm: Tensor, weights_TE: Tensor, deltas_DE3m: Tensor
) -> tuple[Tensor, Tensor]:
    """All experts on all tokens in two GEMMs; an expert that a token did not choose has weight 0.

    The base's hidden values are computed a second time here, by the experts' operations and at the same places of
    tensors of the same shape. So zero deltas give a change of exactly zero, although kernels round the last few values
    of a tensor differently from those that fill a vector register.
    """
    tokens, (hidden, experts, _, neurons) = x_TD.shape[0], deltas_DE3m.shape
    into, back = deltas_DE3m.transpose(1, 2).split([2, 1], dim=1)
    shift = (x_TD @ into.reshape(hidden, -1)).view(tokens, 2, experts, neurons)
    gate_TEm, up_TEm = (t.expand(tokens, experts, neurons).contiguous() for t in (gate_TSm, up_TSm))
    h_TEm = act(gate_TEm + shift[:, 0]) * (up_TEm + shift[:, 1])
    weights_TE1 = weights_TE[:, :, None]
    change = weights_TE1 * (h_TEm - act(gate_TEm) * up_TEm)
    extra = (weights_TE1 * h_TEm).flatten(1) @ back.reshape(hidden, -1).T
    return (change.sum(1, keepdim=True) if gate_TSm.shape[1] == 1 else change), extra


def element_experts(
    act: Activation,
    x_TD: Tensor,
    gate_TF: Tensor,
    up_TF: Tensor,
    weights_TE: Tensor,
    deltas_En: Tensor,
    support: Tensor,
) -> tuple[Tensor, Tensor]:
    """Each expert on its own tokens, with its delta as three dense matrices, one at a time."""
    change, extra = torch.zeros_like(gate_TF), torch.zeros_like(x_TD, dtype=gate_TF.dtype)  # not x's under autocast
    hidden, intermediate = x_TD.shape[1], gate_TF.shape[1]
    size = hidden * intermediate
    # A copy: autograd keeps it, and must not keep the buffer into which ZeRO-3 gathered the deltas.
    for expert, values in enumerate(deltas_En.clone()):
        places = support if support.dim() == 1 else support[expert]
        tokens = weights_TE[:, expert].nonzero().squeeze(1)
        x, base_gate, base_up = (t.index_select(0, tokens) for t in (x_TD, gate_TF, up_TF))
        gate = base_gate + DeltaLinear.apply(x, values, places, 0, intermediate)
        h = act(gate) * (base_up + DeltaLinear.apply(x, values, places, size, intermediate))
        p = weights_TE[:, expert].index_select(0, tokens)[:, None]
        change.index_add_(0, tokens, p * (h - act(base_gate) * base_up))
        extra.index_add_(0, tokens, p * DeltaLinear.apply(h, values, places, 2 * size, hidden))
    return change, extra
