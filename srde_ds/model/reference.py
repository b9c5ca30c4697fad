"""The equation in float64 with merged dense weights, token by token, which the fast path must match."""

from __future__ import annotations

import torch
from torch import Tensor

from srde_ds.config.granularity import Granularity
from srde_ds.model.dispatch import Activation
from srde_ds.model.layer import SRDEFeedForward
from srde_ds.model.merging import expert_delta
from srde_ds.model.supports.blocks import weight_indices

Weights = tuple[Tensor, Tensor, Tensor]


def merge_expert(weights: Weights, support: Tensor, delta: Tensor, granularity: Granularity) -> Weights:
    """W + delta_e as new tensors in the dtype of W.

    Args:
        weights: gate `[F, D]`, up `[F, D]`, down `[D, F]`.
        support: the expert's `[m]` neurons, `[b]` blocks, or `[n]` flat indices into gate, up, down.
        delta: the expert's effective delta, `[D, 3, m]` (neuron) or `[n]`.
    """
    if granularity == "neuron":
        index = support.long()
        gate, up, down = (w.detach().clone() for w in weights)
        delta = delta.detach().to(gate.dtype)
        gate[index] += delta[:, 0].T
        up[index] += delta[:, 1].T
        down[:, index] += delta[:, 2]
        return gate, up, down
    flat = torch.cat([w.detach().flatten() for w in weights])
    index = weight_indices(granularity, support, *weights[2].shape)
    flat[index] += delta.detach().to(flat.dtype)
    parts = flat.split([w.numel() for w in weights])
    return parts[0].view_as(weights[0]), parts[1].view_as(weights[1]), parts[2].view_as(weights[2])


def element_support(neurons: Tensor, hidden: int, intermediate: int) -> Tensor:
    """The flat indices, `[D, 3, m]`, of the weights that a neuron support `[m]` covers, in a neuron delta's order."""
    inputs = torch.arange(hidden)[:, None]
    into = neurons.long()[None, :] * hidden + inputs
    size = hidden * intermediate
    return torch.stack([into, size + into, 2 * size + inputs * intermediate + neurons.long()[None, :]], dim=1)


def feed_forward(act: Activation, weights: Weights, biases: tuple[Tensor, Tensor, Tensor], x_D: Tensor) -> Tensor:
    """`[D]`: the dense block for one token."""
    gate, up, down = weights
    return down @ (act(gate @ x_D + biases[0]) * (up @ x_D + biases[1])) + biases[2]


def reference_forward(layer: SRDEFeedForward, x_TD: Tensor, *, top_k: int) -> Tensor:
    """`[T, D]` float64: the layer's output, by loops over tokens and their experts."""
    roles = layer.roles
    parts = [getattr(layer.block, roles[role]) for role in ("gate", "up", "down")]
    gate, up, down = (part.weight.detach().double() for part in parts)
    biases = tuple(
        torch.zeros(w.shape[0], dtype=torch.float64) if part.bias is None else part.bias.detach().double()
        for part, w in zip(parts, (gate, up, down), strict=True)
    )
    if layer.shared_expert is not None:
        shared = layer.shared_expert
        gate, up, down = merge_expert((gate, up, down), shared.neurons, shared().detach().double(), "neuron")
    act = getattr(layer.block, roles["act"])
    deltas = layer.deltas.whole().detach().double()
    router = layer.router.weight.detach().double()
    outputs = []
    for x_D in x_TD.double():
        y_base = feed_forward(act, (gate, up, down), biases, x_D)  # type: ignore[arg-type]
        y_D = y_base.clone()
        logits = router @ x_D
        experts = (logits + layer.router.selection_bias).topk(top_k).indices
        for p, expert in zip(logits[experts].softmax(0), experts.tolist(), strict=True):
            support = layer.support if layer.support.dim() == 1 else layer.support[expert]
            delta = expert_delta(deltas, expert, layer.granularity)
            merged = merge_expert((gate, up, down), support, delta, layer.granularity)
            y_D += p * (feed_forward(act, merged, biases, x_D) - y_base)  # type: ignore[arg-type]
        outputs.append(y_D)
    return torch.stack(outputs)
