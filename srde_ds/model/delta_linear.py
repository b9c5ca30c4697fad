"""Products with a matrix that is given by its few entries."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class DeltaLinear(torch.autograd.Function):
    """x W^T, where W is zero but for entries of a support; dense while it is computed with, and not kept.

    A dense product takes a GPU less time than gathering, but autograd would keep W, of which a delta of 1 % says
    everything: here the backward makes it again.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, values: Tensor, support: Tensor, begin: int, rows: int) -> Tensor:
        """`[T, columns]` -> `[T, rows]`.

        Args:
            values: `[n]`, of all entries of the support.
            support: `[n]`, flat indices into several matrices one after the other; entries of the others are ignored.
            begin: the index of W's first entry among these.
        """
        x = x.to(values.dtype)  # as autocast would, which is not there in the backward
        ctx.save_for_backward(x, values, support)
        ctx.begin, ctx.rows = begin, rows
        size = rows * x.shape[1]
        return x @ _dense(values, _places(support, begin, size), size).view(rows, -1).T

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None]:
        x, values, support = ctx.saved_tensors
        size = ctx.rows * x.shape[1]
        places = _places(support, ctx.begin, size)
        of_x = of_values = None
        if ctx.needs_input_grad[0]:
            of_x = gradient @ _dense(values, places, size).view(ctx.rows, -1)
        if ctx.needs_input_grad[1]:
            dense = (gradient.T @ x).view(-1)
            of_values = dense[places.clamp(max=size - 1)].masked_fill_(places == size, 0)
        return of_x, of_values, None, None, None


def _places(support: Tensor, begin: int, size: int) -> Tensor:
    """Each entry's index into the matrix, and `size` for those that are not in it."""
    places = support.long() - begin
    return places.masked_fill_((places < 0) | (places >= size), size)


def _dense(values: Tensor, places: Tensor, size: int) -> Tensor:
    """`[size]`. An entry behind its end takes what is not in the matrix: to count that would wait for the device."""
    return values.new_zeros(size + 1).scatter_(0, places, values)[:size]
