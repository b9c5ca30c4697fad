"""Finds out what a base's feed-forward blocks compute before its weights are loaded, with tiny copies of them."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from srde_ds.model.base import decoder_layers
from srde_ds.model.feed_forward import block_of_layer, block_shapes, verify_block

HIDDEN, INTERMEDIATE = 8, 16


def check_formulas(base: PreTrainedModel) -> None:
    """Check every block of a base on the meta device as `verify_block` does, which needs weights.

    Raises:
        SRDEError: a layer has no gated block or several, or a block computes something else.
    """
    for number, (layer, (_, intermediate)) in enumerate(zip(decoder_layers(base), block_shapes(base), strict=True)):
        name, block, hidden = block_of_layer(layer, number, base)
        where = f"base {type(base).__name__}, layer {number}, {name}"
        verify_block(tiny_copy(block, hidden, intermediate), HIDDEN, dtype=torch.float32, where=where, original=block)


def tiny_copy(block: nn.Module, hidden: int, intermediate: int) -> nn.Module:
    """A block of the same class and settings on the CPU, with random fp32 weights and other sizes in place of D and F.

    Args:
        block: on the meta device.
    """
    generator = torch.Generator().manual_seed(0)

    def size(value: Any) -> Any:
        if isinstance(value, tuple):
            return tuple(map(size, value))
        if isinstance(value, bool) or not isinstance(value, int):
            return value
        return {intermediate: INTERMEDIATE, hidden: HIDDEN}.get(value, value)

    copied = copy.deepcopy(block).eval()  # as the base of a run is, without dropout
    for module in copied.modules():
        for name, value in vars(module).items():
            if not name.startswith("_"):
                vars(module)[name] = size(value)
        for name, parameter in module._parameters.items():
            if parameter is not None:
                values = torch.randn(size(tuple(parameter.shape)), generator=generator)
                module._parameters[name] = nn.Parameter(values, requires_grad=False)
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = torch.randn(size(tuple(buffer.shape)), generator=generator)
    return copied
