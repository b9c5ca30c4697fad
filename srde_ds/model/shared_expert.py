"""An expert that every token uses, beside its routed ones: a change of neurons that no routed expert changes.

    y = FFN(x; W + s) + sum_e p_e [FFN(x; W + s + delta_e) - FFN(x; W + s)]

The term is DeepSeekMoE's (Dai et al. 2024, arXiv 2401.06066). Since its neurons belong to no routed expert, the change
of these neurons is added on its own, whatever the routed experts do.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from srde_ds.config import AdapterConfig
from srde_ds.model.deltas import Storage, tagged
from srde_ds.model.dispatch import Activation
from srde_ds.model.supports.selection import shared_expert_size

if TYPE_CHECKING:
    from srde_ds.model.deltas import Trainable


class Moved(NamedTuple):
    """What the shared expert makes of a block's values: gate and up `[T, F]`, and extra `[T, D]` for the output."""

    gate_TF: Tensor
    up_TF: Tensor
    extra_TD: Tensor


class SharedExpert(nn.Module):
    """The change s of one layer.

    `forward()` gives the deltas of gate, up and down, `[D, 3, m]`, as a bare tensor, since ZeRO-3 attaches its backward
    hooks to nothing else. Parameter: `delta`, the same with padding at the end of the first axis. Buffer: `neurons`,
    int32 `[m]`, ascending.
    """

    neurons: Tensor

    def __init__(self, hidden: int, neurons: Tensor, storage: Storage) -> None:
        super().__init__()
        shape = (hidden, 3, len(neurons))
        self.hidden = hidden
        self.delta: Trainable = tagged(storage.padded_zeros(shape), "shared", expert_axis=None, shape=shape)
        self.register_buffer("neurons", neurons.to(device=storage.device, dtype=torch.int32))

    def forward(self) -> Tensor:
        """`[D, 3, m]`."""
        return self.delta[: self.hidden]


def move(act: Activation, x_TD: Tensor, gate_TF: Tensor, up_TF: Tensor, delta_D3m: Tensor, neurons: Tensor) -> Moved:
    """Apply a shared expert to a block's input and its gate and up values."""
    delta, size = delta_D3m.to(gate_TF.dtype), len(neurons)
    # Under autocast the product is narrower than the values of a base in 4 bits, which bitsandbytes gives in float32.
    shift = (x_TD.to(delta.dtype) @ delta[:, :2].flatten(1)).to(gate_TF.dtype)
    gate_TF = gate_TF.index_add(1, neurons, shift[:, :size])
    up_TF = up_TF.index_add(1, neurons, shift[:, size:])
    own = neurons.long()
    hidden = act(gate_TF.index_select(1, own)) * up_TF.index_select(1, own)
    return Moved(gate_TF, up_TF, F.linear(hidden, delta[:, 2]))


def build_shared_expert(
    config: AdapterConfig, *, hidden: int, intermediate: int, neurons: Tensor | None, storage: Storage
) -> SharedExpert | None:
    """The layer's shared expert, whose deltas are zero; None: the config has none.

    Args:
        neurons: which ones it changes; None: they are loaded later.
    """
    size = shared_expert_size(config, intermediate)
    if not size:
        return None
    return SharedExpert(hidden, torch.arange(size) if neurons is None else neurons, storage)
