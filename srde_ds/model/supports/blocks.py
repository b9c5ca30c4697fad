"""Supports of blocks: squares of `BLOCK_SIDE` rows and columns of a layer's matrices.

Blocks are numbered row by row through gate `[F, D]`, then up `[F, D]`, then down `[D, F]`. An expert's values follow
the order of its support, and within a block they go row by row.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from srde_ds.config.granularity import BLOCK_SIDE, Granularity


def by_block(matrix: Tensor) -> Tensor:
    """A view `[rows, BLOCK_SIDE, columns, BLOCK_SIDE]` of a matrix, whose axes 0 and 2 count blocks."""
    return matrix.unflatten(1, (-1, BLOCK_SIDE)).unflatten(0, (-1, BLOCK_SIDE))


def weight_indices(granularity: Granularity, support: Tensor, hidden: int, intermediate: int) -> Tensor:
    """`[n]` int64: the flat indices into gate, up, down of an expert's values, in their order.

    Args:
        support: `[n]` single weights, which are these indices, or `[b]` blocks.
    """
    if granularity == "element":
        return support.long()
    matrix, row, column = (at[:, None, None] for at in _located(support, hidden, intermediate))
    inside = torch.arange(BLOCK_SIDE, device=support.device)
    row, column = BLOCK_SIDE * row + inside[:, None], BLOCK_SIDE * column + inside
    width = torch.where(matrix < 2, hidden, intermediate)
    return (matrix * hidden * intermediate + row * width + column).flatten()


def block_numbers(matrix: Tensor, neuron: Tensor, other: Tensor, hidden: int, intermediate: int) -> Tensor:
    """The numbers of blocks.

    Args:
        matrix: of each block: 0 gate, 1 up, 2 down.
        neuron, other: its place along the axis of neurons and along that of hidden values, counted in blocks.
    """
    wide, high = hidden // BLOCK_SIDE, intermediate // BLOCK_SIDE
    return matrix * wide * high + torch.where(matrix < 2, neuron * wide + other, other * high + neuron)


def _located(support: Tensor, hidden: int, intermediate: int) -> tuple[Tensor, Tensor, Tensor]:
    """Of each block: its matrix (0 gate, 1 up, 2 down), and its row and column there, counted in blocks."""
    wide, high = hidden // BLOCK_SIDE, intermediate // BLOCK_SIDE
    matrix, place = support.long() // (wide * high), support.long() % (wide * high)
    width = torch.where(matrix < 2, wide, high)
    return matrix, place // width, place % width


@dataclass(frozen=True)
class BlockPlaces:
    """Where B blocks of an expert are in a matrix; rows and columns are counted in blocks.

    Attributes:
        value_B: the place of each block's values among those of all blocks of the expert.
        rows, columns: of the whole matrix.
    """

    value_B: Tensor
    row_B: Tensor
    column_B: Tensor
    rows: int
    columns: int


def block_places(support: Tensor, hidden: int, intermediate: int) -> tuple[BlockPlaces, BlockPlaces]:
    """Those of an expert's `[b]` blocks in gate above up, `[2 * F, D]`, and in down, `[D, F]`."""
    matrix, row, column = _located(support, hidden, intermediate)
    wide, high = hidden // BLOCK_SIDE, intermediate // BLOCK_SIDE
    block, down = (matrix != 2).nonzero().squeeze(1), (matrix == 2).nonzero().squeeze(1)
    into = BlockPlaces(block, row[block] + high * matrix[block], column[block], 2 * high, wide)
    return into, BlockPlaces(down, row[down], column[down], wide, high)


@dataclass(frozen=True)
class SupportBlocks:
    """A layer's support of blocks as two matrices for each expert, over only those neurons that a block touches.

    Attributes:
        neurons: `[U]` int64, ascending: all neurons with a weight in a block of any expert.
        moved: those with a weight in gate or up, whose hidden value an expert changes; like all further positions, they
            are counted in blocks of neurons, here among `neurons`.
        read: those with a weight in down.
        moved_read, read_moved: positions among `moved`, and among `read`, of those that are both.
        into: of each expert, or of all: its gate above its up, from D to `moved`.
        back: its down, from `read` to D.
    """

    neurons: Tensor
    moved: Tensor
    read: Tensor
    moved_read: Tensor
    read_moved: Tensor
    into: Sequence[BlockPlaces]
    back: Sequence[BlockPlaces]

    @staticmethod
    def of(support: Tensor, hidden: int, intermediate: int) -> SupportBlocks:
        """Those of `[b]`, which stands for any expert, or `[E, b]`."""
        matrix, row, column = _located(support.view(-1, support.shape[-1]), hidden, intermediate)
        is_down, wide = matrix == 2, hidden // BLOCK_SIDE
        moved, read = row[~is_down].unique(), column[is_down].unique()
        used = torch.cat([moved, read]).unique()
        into, back = [], []
        for own in range(len(matrix)):
            block, down = (~is_down[own]).nonzero().squeeze(1), is_down[own].nonzero().squeeze(1)
            in_row = torch.searchsorted(moved, row[own, block]) + len(moved) * matrix[own, block]
            into.append(BlockPlaces(block, in_row, column[own, block], 2 * len(moved), wide))
            neuron = torch.searchsorted(read, column[own, down])
            back.append(BlockPlaces(down, row[own, down], neuron, wide, len(read)))
        return SupportBlocks(
            (BLOCK_SIDE * used[:, None] + torch.arange(BLOCK_SIDE, device=support.device)).flatten(),
            torch.searchsorted(used, moved),
            torch.searchsorted(used, read),
            torch.isin(moved, read).nonzero().squeeze(1),
            torch.isin(read, moved).nonzero().squeeze(1),
            into,
            back,
        )

    def of_experts(self, experts: Sequence[int]) -> SupportBlocks:
        """Those of a part of the experts, over the same neurons."""
        if len(self.into) == 1:
            return self
        return replace(self, into=[self.into[e] for e in experts], back=[self.back[e] for e in experts])
