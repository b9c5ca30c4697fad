"""The neuron experts' elementwise work as one autograd function on Triton kernels, see `expert_kernels.py`.

It computes what the readable path does (`dispatch.neuron_experts` and the lines around it in `layer.py`); tests compare
the two. Gradients at the support are added in place, whereas autograd would make a dense tensor of zeros for each and
add these.
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

DENSE_BLOCK = 1024
WIDEST_BLOCK = 1024
"""Most neurons of an expert: a program of the kernels holds all of them in registers, and more would spill"""
SILU, GELU_TANH = 0, 1
KERNEL_DEVICES = {"cuda"}
HAS_TRITON = find_spec("triton") is not None  # read once, since torch.compile cannot trace the search


def fused_activation(module: Any, gate_TF: Tensor, neurons: int) -> int | None:
    """The kernels' number of an activation; None: the kernels cannot be used.

    They need a GPU, values of at most float32, experts of at most `WIDEST_BLOCK` neurons, and SiLU or tanh-GELU.
    """
    if gate_TF.device.type not in KERNEL_DEVICES or gate_TF.dtype == torch.float64 or not HAS_TRITON:
        return None
    return None if block_size(neurons) > WIDEST_BLOCK else _kind(module)


def idle_because(module: Any, neurons: int) -> str | None:
    """Why the kernels cannot be used on any GPU; None: they can."""
    if not HAS_TRITON:
        return "the package triton is missing"
    if block_size(neurons) > WIDEST_BLOCK:
        return f"an expert has {neurons:,} neurons, and the kernels take at most {WIDEST_BLOCK:,}"
    if _kind(module) is None:
        name = module if isinstance(module, nn.Module) else getattr(module, "__name__", type(module).__name__)
        return f"the base's activation is {name}, and the kernels know SiLU and tanh-GELU"
    return None


def _kind(module: Any) -> int | None:
    if isinstance(module, nn.SiLU) or type(module).__name__ == "SiLUActivation" or module is F.silu:
        return SILU
    gelu_tanh = isinstance(module, nn.GELU) and module.approximate == "tanh"
    return GELU_TANH if gelu_tanh or type(module).__name__ == "GELUTanh" else None


class FusedExperts(torch.autograd.Function):
    """Hidden values with the experts' change, `[T, F]`, and the experts' weighted hidden values, `[T, X, m]`.

    The X slots are those of `products.ExpertProducts`.
    """

    @staticmethod
    def forward(
        ctx: Any,
        gate_TF: Tensor,
        up_TF: Tensor,
        shift_TX2m: Tensor,
        weights_TK: Tensor,
        index_TK: Tensor,
        neurons: Tensor,
        options: tuple[int, bool],
    ) -> tuple[Tensor, Tensor]:
        """Weights may have more precision than the rest; neurons is `[m]`, shared, or `[E, m]`; `options` are the
        activation's kind and `by_expert`."""
        kind, by_expert = options
        hidden_TF = _activation(gate_TF, kind).mul_(up_TF)
        tokens, slots, _, size = shift_TX2m.shape
        from srde_ds.model.expert_kernels import experts_forward

        tensors = [t.contiguous() for t in (gate_TF, up_TF, shift_TX2m, weights_TK, index_TK, neurons)]
        weighted = shift_TX2m.new_empty(tokens, slots, size)
        sizes = (gate_TF.shape[1], size, slots, index_TK.shape[1])
        ctx.sizes = (*sizes, neurons.dim() == 1, by_expert, kind, block_size(size))
        experts_forward[(tokens,)](*tensors, hidden_TF, weighted, *ctx.sizes, **LAUNCH)
        ctx.save_for_backward(*tensors)
        return hidden_TF, weighted

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, of_hidden_TF: Tensor, of_weighted: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of gate, up, shift and weights."""
        from srde_ds.model.expert_kernels import experts_backward

        gate_TF, up_TF, shift, weights_TK, *_ = ctx.saved_tensors
        results = [torch.empty_like(t) for t in (gate_TF, up_TF, shift, weights_TK)]
        given = of_hidden_TF.contiguous(), of_weighted.contiguous()
        kernel = experts_backward[(len(gate_TF),)]
        kernel(*ctx.saved_tensors, *given, *results, *ctx.sizes, DENSE_BLOCK, **LAUNCH)
        return (*results, None, None, None)


def block_size(size: int) -> int:
    """The power of two that holds all neurons of an expert, which a program handles at once."""
    return 1 << (size - 1).bit_length() if size > 1 else 1


LAUNCH: dict[str, Any] = {"enable_fp_fusion": False}
"""Fused multiply-adds would round some products and not others, so that shifts of zero would change something."""


def _activation(x: Tensor, kind: int) -> Tensor:
    return F.silu(x) if kind == SILU else F.gelu(x, approximate="tanh")
