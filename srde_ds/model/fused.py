"""The neuron experts' elementwise work as one autograd function on Triton kernels, see `expert_kernels.py`.

It computes what the readable path of `dispatch.neuron_experts` and the lines around it in `layer.py` do, which tests
hold it against. The gradients at the support are added where they belong, without a dense tensor of zeros for each.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

DENSE_BLOCK = 1024
SILU, GELU_TANH = 0, 1


def activation_kind(module: Any) -> int | None:
    """The number by which the kernels know an activation; None: they do not know it."""
    if isinstance(module, nn.SiLU) or type(module).__name__ == "SiLUActivation":
        return SILU
    gelu_tanh = isinstance(module, nn.GELU) and module.approximate == "tanh"
    return GELU_TANH if gelu_tanh or type(module).__name__ in ("GELUTanh", "PytorchGELUTanh") else None


class FusedExperts(torch.autograd.Function):
    """Hidden values with the experts' change, `[T, F]`, and the experts' weighted hidden values, `[T, X, m]`.

    X is E where each expert has a slot, and `by_expert` is true, else K, one slot for each of a token's experts.
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
        """`neurons` is `[m]`, shared, or `[E, m]`; `options` are the activation's kind and `by_expert`."""
        from srde_ds.model.expert_kernels import experts_forward

        kind, by_expert = options
        activated = F.silu(gate_TF) if kind == SILU else F.gelu(gate_TF, approximate="tanh")
        hidden_TF = activated.mul_(up_TF)
        tensors = [t.contiguous() for t in (gate_TF, up_TF, shift_TX2m, weights_TK, index_TK, neurons)]
        tokens, slots, _, size = shift_TX2m.shape
        weighted = shift_TX2m.new_zeros(tokens, slots, size)
        sizes = (gate_TF.shape[1], size, slots, index_TK.shape[1])
        ctx.sizes = (*sizes, neurons.dim() == 1, by_expert, kind, block_size(size))
        experts_forward[(tokens,)](*tensors, hidden_TF, weighted, *ctx.sizes)
        ctx.save_for_backward(*tensors)
        return hidden_TF, weighted

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, of_hidden_TF: Tensor, of_weighted: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of gate, up, shift and weights."""
        from srde_ds.model.expert_kernels import experts_backward

        gate_TF, up_TF, shift, weights_TK, *_ = ctx.saved_tensors
        results = [torch.empty_like(gate_TF), torch.empty_like(up_TF)]
        results += [torch.zeros_like(shift), torch.empty_like(weights_TK)]
        given = of_hidden_TF.contiguous(), of_weighted.contiguous()
        experts_backward[(len(gate_TF),)](*ctx.saved_tensors, *given, *results, *ctx.sizes, DENSE_BLOCK)
        return (*results, None, None, None)


def block_size(size: int) -> int:
    """A power of two: a program takes all neurons of an expert at once."""
    return 1 << (size - 1).bit_length() if size > 1 else 1
