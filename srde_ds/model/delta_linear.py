"""Products with a matrix that is given by its few nonzero entries.

`DenseDeltas` and `SparseDeltas` compute the same within rounding. On a GPU a dense product is faster than gathering; on
a CPU it is the other way round.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable


class ElementDeltas(Protocol):
    """The products of an expert's tokens with its delta, `values` `[n]` at the entries of its support."""

    def into(self, x_TD: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """The delta's addition to gate and to up, `[T, F]` each."""
        ...

    def back(self, h_TF: Tensor, values: Tensor) -> Tensor:
        """The product with the delta of down, `[T, D]`."""
        ...


def element_deltas(support: Tensor, hidden: int, intermediate: int) -> ElementDeltas:
    """The quicker of the two ways on the support's device.

    Args:
        support: `[n]`, flat indices into gate `[F, D]`, up `[F, D]` and down `[D, F]`, which follow one another.
    """
    way = SparseDeltas if support.device.type == "cpu" else DenseDeltas
    return way(support, hidden, intermediate)


class DenseDeltas:
    """Makes each matrix dense, one at a time."""

    def __init__(self, support: Tensor, hidden: int, intermediate: int) -> None:
        self.support, self.hidden, self.intermediate = support, hidden, intermediate

    def into(self, x_TD: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """As `ElementDeltas.into`."""
        size = self.hidden * self.intermediate
        gate = DeltaLinear.apply(x_TD, values, self.support, 0, self.intermediate)
        return gate, DeltaLinear.apply(x_TD, values, self.support, size, self.intermediate)

    def back(self, h_TF: Tensor, values: Tensor) -> Tensor:
        """As `ElementDeltas.back`."""
        begin = 2 * self.hidden * self.intermediate
        product: Tensor = DeltaLinear.apply(h_TF, values, self.support, begin, self.hidden)
        return product


class SparseDeltas:
    """Uses only the entries. Gate and up, which are concatenated, form one matrix."""

    def __init__(self, support: Tensor, hidden: int, intermediate: int) -> None:
        self.entries_in = Entries(support, 0, 2 * intermediate, hidden)
        self.entries_back = Entries(support, 2 * intermediate * hidden, hidden, intermediate)

    def into(self, x_TD: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """As `ElementDeltas.into`."""
        gate, up = SparseLinear.apply(x_TD, values, self.entries_in).chunk(2, dim=1)
        return gate, up

    def back(self, h_TF: Tensor, values: Tensor) -> Tensor:
        """As `ElementDeltas.back`."""
        product: Tensor = SparseLinear.apply(h_TF, values, self.entries_back)
        return product


class Entries:
    """The positions of the entries of a sparse matrix `[outputs, inputs]`, by row and by column.

    Args:
        support: `[n]`, flat indices into several concatenated matrices.
        begin: the flat index of this matrix's first entry.

    Attributes:
        value_N: the index of each entry's value among the support's n; N of them are in this matrix, ordered by row.
        by_column_N: the entries ordered by column.
        row_starts, column_starts: the first entry of each row, and of each column in the order by column.
    """

    def __init__(self, support: Tensor, begin: int, outputs: int, inputs: int) -> None:
        inside = (support >= begin) & (support < begin + outputs * inputs)
        self.value_N = inside.nonzero().squeeze(1)
        place_N, order_N = (support[self.value_N].long() - begin).sort()
        self.value_N = self.value_N[order_N]
        self.row_N, self.column_N = place_N // inputs, place_N % inputs
        sorted_columns, self.by_column_N = self.column_N.sort(stable=True)
        self.row_by_column_N = self.row_N[self.by_column_N]
        self.row_starts = torch.searchsorted(self.row_N, torch.arange(outputs))
        self.column_starts = torch.searchsorted(sorted_columns, torch.arange(inputs))


class SparseLinear(torch.autograd.Function):
    """x W^T, where W has a few entries: each row of the result, transposed, is a weighted sum of some columns of x.

    `embedding_bag` computes such sums, and torch has kernels of it for every dtype.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, values: Tensor, entries: Entries) -> Tensor:
        """`[T, inputs]` -> `[T, outputs]`; values `[n]` for all entries of the support."""
        x = x.to(values.dtype)  # as autocast would, but it is off in the backward
        x_transposed = x.T.contiguous()
        ctx.save_for_backward(x_transposed, values)
        ctx.entries = entries
        return _weighted_sums(x_transposed, entries.column_N, entries.row_starts, values[entries.value_N])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        """Gradients of x and of values."""
        x_transposed, values = ctx.saved_tensors
        entries: Entries = ctx.entries
        gradient = gradient.T.contiguous()
        of_x = of_values = None
        if ctx.needs_input_grad[0]:
            weights = values[entries.value_N[entries.by_column_N]]
            of_x = _weighted_sums(gradient, entries.row_by_column_N, entries.column_starts, weights)
        if ctx.needs_input_grad[1]:
            of_values = torch.zeros_like(values)
            if x_transposed.numel() and len(entries.value_N):
                of_values[entries.value_N] = torch.ops.aten._embedding_bag_per_sample_weights_backward(
                    gradient, x_transposed, entries.column_N, entries.row_starts, entries.row_N, 0
                )
        return of_x, of_values, None


def _weighted_sums(rows_NT: Tensor, index_N: Tensor, starts: Tensor, weights_N: Tensor) -> Tensor:
    """`[T, sums]`: each is the weighted sum of the rows `index_N` from its start to the next start."""
    if not (rows_NT.shape[1] and len(index_N)):
        return rows_NT.new_zeros(rows_NT.shape[1], len(starts))
    return F.embedding_bag(index_N, rows_NT, starts, mode="sum", per_sample_weights=weights_N).T


class DeltaLinear(torch.autograd.Function):
    """x W^T, where W is zero except on a support. W is made dense for the product and then dropped.

    Autograd would keep the dense W for the backward, although 1 % of its entries would do; here the backward makes W
    again.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, values: Tensor, support: Tensor, begin: int, outputs: int) -> Tensor:
        """`[T, inputs]` -> `[T, outputs]`.

        Args:
            values: `[n]`, for all entries of the support.
            support: `[n]`, flat indices into several concatenated matrices. Those outside of W are ignored.
            begin: the flat index of W's first entry.
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
    """Each entry's index into the matrix, or `size` for an entry outside of it."""
    places = support.long() - begin
    return places.masked_fill_((places < 0) | (places >= size), size)


def _dense(values: Tensor, places: Tensor, size: int) -> Tensor:
    """`[size]`. An extra entry takes what is outside of the matrix; dropping it would wait for the device."""
    return values.new_zeros(size + 1).scatter_(0, places, values)[:size]
