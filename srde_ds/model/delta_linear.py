"""Products with a matrix that is given by the few entries that are not zero."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class DeltaLinear(torch.autograd.Function):
    """x W^T, where W is zero but for the entries of a support. W is made dense for the product and not kept.

    A GPU is faster at a dense product than at gathering. But autograd would keep the dense W for the backward, although
    1 % of its entries say everything; here the backward makes W again.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, values: Tensor, support: Tensor, begin: int, outputs: int) -> Tensor:
        """`[T, inputs]` -> `[T, outputs]`.

        Args:
            values: `[n]`, of all entries of the support.
            support: `[n]`, flat indices into several matrices that follow one another; those outside W are ignored.
            begin: the index of W's first entry among these.
        """
        x = x.to(values.dtype)  # as autocast would, but it is off in the backward
        ctx.save_for_backward(x, values, support)
        ctx.begin, ctx.outputs = begin, outputs
        size = outputs * x.shape[1]
        return x @ _dense(values, _places(support, begin, size), size).view(outputs, -1).T

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None]:
        """Gradients of x and of values."""
        x, values, support = ctx.saved_tensors
        size = ctx.outputs * x.shape[1]
        places = _places(support, ctx.begin, size)
        of_x = of_values = None
        if ctx.needs_input_grad[0]:
            of_x = gradient @ _dense(values, places, size).view(ctx.outputs, -1)
        if ctx.needs_input_grad[1]:
            dense = (gradient.T @ x).view(-1)
            of_values = dense[places.clamp(max=size - 1)].masked_fill_(places == size, 0)
        return of_x, of_values, None, None, None


def _places(support: Tensor, begin: int, size: int) -> Tensor:
    """Each entry's index into the matrix, and `size` for those that are not in it."""
    places = support.long() - begin
    return places.masked_fill_((places < 0) | (places >= size), size)


def _dense(values: Tensor, places: Tensor, size: int) -> Tensor:
    """`[size]`. One entry more takes what is not in the matrix: to leave that out would wait for the device."""
    return values.new_zeros(size + 1).scatter_(0, places, values)[:size]
