"""The arithmetic of experts whose deltas consist of blocks, as one autograd function.

It takes one expert after the other, with its own tokens, so that what an expert makes stays in the processor's caches.
Values are laid out block by block, `[blocks, N, BLOCK_SIDE]` for N tokens: the products are batched, and nothing is
transposed between them. The backward computes the hidden values again, so only the inputs are kept.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from srde_ds.config.granularity import BLOCK_SIDE
from srde_ds.model.supports.blocks import BlockPlaces, SupportBlocks

Activation = Callable[[Tensor], Tensor]


class BlockMatrix:
    """A matrix of which only B blocks are not zero.

    Args:
        values: `[n]`, those of all blocks of the expert.
    """

    def __init__(self, places: BlockPlaces, values: Tensor) -> None:
        self.places = places
        self.blocks = values.view(-1, BLOCK_SIDE, BLOCK_SIDE).index_select(0, places.value_B)

    def __call__(self, x: Tensor) -> Tensor:
        """x W^T, `[N, rows * BLOCK_SIDE]`, for x `[N, columns * BLOCK_SIDE]`."""
        return self.times(_rows(x)).transpose(0, 1).flatten(1)

    def times(self, x: Tensor) -> Tensor:
        """x W^T, `[rows, N, BLOCK_SIDE]`, for x `[columns, N, BLOCK_SIDE]`."""
        products = torch.bmm(x.index_select(0, self.places.column_B), self.blocks.transpose(1, 2))
        return _sums(products, self.places.row_B, self.places.rows)

    def transposed_times(self, y: Tensor) -> Tensor:
        """y W, `[columns, N, BLOCK_SIDE]`, for y `[rows, N, BLOCK_SIDE]`."""
        products = torch.bmm(y.index_select(0, self.places.row_B), self.blocks)
        return _sums(products, self.places.column_B, self.places.columns)

    def add_gradient(self, of_values: Tensor, of_y: Tensor, x: Tensor) -> None:
        """Write the gradient of the blocks into that of the expert's values, `[n]`, if y = x W^T."""
        of_y, x = of_y.index_select(0, self.places.row_B), x.index_select(0, self.places.column_B)
        blocks = of_values.view(-1, BLOCK_SIDE, BLOCK_SIDE)
        blocks.index_copy_(0, self.places.value_B, torch.bmm(of_y.transpose(1, 2), x))


def block_experts(
    act: Activation,
    x_TD: Tensor,
    gate_TU: Tensor,
    up_TU: Tensor,
    index_TK: Tensor,
    weights_TK: Tensor,
    deltas_En: Tensor,
    blocks: SupportBlocks,
) -> tuple[Tensor, Tensor]:
    """As `dispatch.element_experts`, at the neurons of the blocks."""
    order_R = index_TK.flatten().argsort(stable=True)
    counts = torch.bincount(index_TK.flatten(), minlength=len(deltas_En)).tolist()
    tokens = (order_R // index_TK.shape[1]).split(counts)
    weights_R = weights_TK.flatten()[order_R]
    values: tuple[Any, ...] = (x_TD, gate_TU, up_TU, weights_R, deltas_En, tokens, (act, blocks))
    if torch.is_autocast_enabled(x_TD.device.type):  # else the context would break torch.compile's graph
        # Autocast is off in the backward, and would mix dtypes in the forward where a base in 4 bits gives float32.
        with torch.autocast(x_TD.device.type, enabled=False):
            change_TU, extra_TD = BlockExperts.apply(*values)
    else:
        change_TU, extra_TD = BlockExperts.apply(*values)
    return change_TU, extra_TD


class BlockExperts(torch.autograd.Function):
    """change `[T, U]` and extra `[T, D]` of all experts, see `dispatch.py`."""

    @staticmethod
    def forward(
        ctx: Any,
        x_TD: Tensor,
        gate_TU: Tensor,
        up_TU: Tensor,
        weights_R: Tensor,
        deltas_En: Tensor,
        tokens: Sequence[Tensor],
        experts: tuple[Activation, SupportBlocks],
    ) -> tuple[Tensor, Tensor]:
        """The inputs are those of `ExpertDispatch.element`, but for these.

        Args:
            weights_R: the weights of all assignments, expert by expert.
            tokens: the tokens of each expert.
            experts: the activation and the blocks of the experts.
        """
        ctx.save_for_backward(x_TD, gate_TU, up_TU, weights_R, deltas_En)
        ctx.tokens, (ctx.act, ctx.blocks) = tokens, experts
        x_T, gate_T, up_T, read_gate_T, read_up_T = _inputs(x_TD, gate_TU, up_TU, deltas_En, ctx.blocks)
        read_T = ctx.act(read_gate_T).mul_(read_up_T)
        change_T, extra_T = _zeros(gate_T), _zeros(x_T)
        for expert, (own, weights_N) in enumerate(zip(tokens, _split(weights_R, tokens), strict=True)):
            into, back = _matrices(ctx.blocks, expert, deltas_En)
            x, gate, up, read = (t.index_select(1, own) for t in (x_T, gate_T, up_T, read_T))
            moved_gate, moved_up = into.times(x).chunk(2)
            change = ctx.act(moved_gate.add_(gate)).mul_(moved_up.add_(up)).sub_(ctx.act(gate).mul_(up))
            read.index_add_(0, ctx.blocks.read_moved, change.index_select(0, ctx.blocks.moved_read))
            _add(extra_T, own, back.times(read).mul_(weights_N[:, None]))
            _add(change_T, own, change.mul_(weights_N[:, None]))
        change_TU = torch.zeros_like(gate_TU)
        _rows(change_TU).index_copy_(0, ctx.blocks.moved, change_T.to(gate_TU.dtype))
        return change_TU, extra_T.transpose(0, 1).flatten(1).to(deltas_En.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, of_change_TU: Tensor, of_extra_TD: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of x, gate, up, weights and deltas."""
        x_TD, gate_TU, up_TU, weights_R, deltas_En = ctx.saved_tensors
        blocks: SupportBlocks = ctx.blocks
        x_T, gate_T, up_T, read_gate_T, read_up_T = _inputs(x_TD, gate_TU, up_TU, deltas_En, blocks)
        read_act_T, read_act_gradient = _activation(ctx.act, read_gate_T)
        read_T = read_act_T * read_up_T
        of_change_T, of_extra_T = _rows(of_change_TU).index_select(0, blocks.moved), _rows(of_extra_TD).contiguous()
        of_x_T, of_gate_T, of_up_T, of_read_T = (_zeros(t) for t in (x_T, gate_T, up_T, read_T))
        of_weights, of_deltas = torch.empty_like(weights_R), torch.zeros_like(deltas_En)
        parts = zip(ctx.tokens, _split(weights_R, ctx.tokens), _split(of_weights, ctx.tokens), strict=True)
        for expert, (own, weights_N, of_weights_N) in enumerate(parts):
            into, back = _matrices(blocks, expert, deltas_En)
            x, gate, up, read = (t.index_select(1, own) for t in (x_T, gate_T, up_T, read_T))
            of_change, of_y = (t.index_select(1, own) for t in (of_change_T, of_extra_T))
            moved_gate, moved_up = into.times(x).chunk(2)
            moved_gate, moved_up = moved_gate.add_(gate), moved_up.add_(up)
            act, act_gradient = _activation(ctx.act, moved_gate)
            base_act, base_act_gradient = _activation(ctx.act, gate)
            change = (act * moved_up).sub_(base_act * up)
            read.index_add_(0, blocks.read_moved, change.index_select(0, blocks.moved_read))
            of_read = back.transposed_times(of_y)  # still without the weight, like that of the change
            of_weights_N.copy_(_dot(of_read, read) + _dot(of_change, change))
            of_change.index_add_(0, blocks.moved_read, of_read.index_select(0, blocks.read_moved))
            weights_N1 = weights_N[:, None]
            _add(of_read_T, own, of_read.mul_(weights_N1))
            back.add_gradient(of_deltas[expert], of_y.mul_(weights_N1), read)
            of_moved_up = of_change.mul_(weights_N1) * act
            of_moved_gate = act_gradient(of_change * moved_up)
            of_shift = torch.cat([of_moved_gate, of_moved_up])
            into.add_gradient(of_deltas[expert], of_shift, x)
            _add(of_x_T, own, into.transposed_times(of_shift))
            _add(of_up_T, own, of_moved_up.addcmul_(of_change, base_act, value=-1))
            _add(of_gate_T, own, of_moved_gate.sub_(base_act_gradient(of_change.mul_(up))))
        of_gate, of_up = (torch.zeros_like(t) for t in (gate_TU, up_TU))
        for of, of_moved, of_read in (
            (of_gate, of_gate_T, read_act_gradient(of_read_T.to(read_T.dtype) * read_up_T)),
            (of_up, of_up_T, of_read_T.mul_(read_act_T)),
        ):
            _rows(of).index_copy_(0, blocks.moved, of_moved.to(of.dtype))
            _rows(of).index_add_(0, blocks.read, of_read.to(of.dtype))
        of_x = of_x_T.transpose(0, 1).flatten(1).to(x_TD.dtype)
        return of_x, of_gate, of_up, of_weights, of_deltas, None, None


def _inputs(
    x_TD: Tensor, gate_TU: Tensor, up_TU: Tensor, deltas_En: Tensor, blocks: SupportBlocks
) -> tuple[Tensor, ...]:
    """By block: x, gate and up of the neurons that are moved, and of those that are read."""
    x_T = _rows(x_TD.to(deltas_En.dtype)).contiguous()  # autocast would convert it, but it is off in the backward
    values = [_rows(t).index_select(0, at) for at in (blocks.moved, blocks.read) for t in (gate_TU, up_TU)]
    return x_T, *values


def _rows(values: Tensor) -> Tensor:
    """A view `[blocks, T, BLOCK_SIDE]` of `[T, columns]`."""
    return values.unflatten(1, (-1, BLOCK_SIDE)).transpose(0, 1)


def _dot(a: Tensor, b: Tensor) -> Tensor:
    """`[N]`: scalar products of the tokens' values."""
    return (a * b).sum((0, 2))


def _matrices(blocks: SupportBlocks, expert: int, deltas_En: Tensor) -> tuple[BlockMatrix, BlockMatrix]:
    """Those into and back from the neurons."""
    own = 0 if len(blocks.into) == 1 else expert
    return BlockMatrix(blocks.into[own], deltas_En[expert]), BlockMatrix(blocks.back[own], deltas_En[expert])


def _activation(act: Activation, x: Tensor) -> tuple[Tensor, Activation]:
    """Its values, and what turns their gradient into that of x."""
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        values = act(x)
    return values.detach(), lambda gradient: torch.autograd.grad(values, x, gradient)[0]


def _add(total: Tensor, own: Tensor, values: Tensor) -> None:
    """Add to the `own` tokens of the total. No token repeats, so the sum has one order."""
    total.index_add_(1, own, values.to(total.dtype))


def _sums(products: Tensor, place_B: Tensor, places: int) -> Tensor:
    """`[B, N, BLOCK_SIDE]` -> `[places, N, BLOCK_SIDE]`: the sum of the products at each place."""
    precision = torch.promote_types(products.dtype, torch.float32)
    sums = products.new_zeros(places, *products.shape[1:], dtype=precision)
    return sums.index_add_(0, place_B, products.to(precision)).to(products.dtype)


def _split(values_R: Tensor, tokens: Sequence[Tensor]) -> tuple[Tensor, ...]:
    return values_R.split([len(own) for own in tokens])


def _zeros(like: Tensor) -> Tensor:
    """To add to, in at least float32."""
    return torch.zeros_like(like, dtype=torch.promote_types(like.dtype, torch.float32))
