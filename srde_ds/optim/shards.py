"""The layout of the flat parameters that ZeRO-3 passes to an optimizer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class MatrixShard:
    """The position of this process's slice of a Muon tensor in a flat parameter.

    The whole tensor is `[full_height, count, width]`: `count` matrices with their long side first. A shard is a slice
    of it along the long side, `[height, count, width]`, in row-major order, beginning at element `offset` of the flat
    parameter. Newton-Schulz works on the Gram matrices, `[count, width, width]`.

    Attributes:
        name: the tensor's name, for messages.
        height: height of the slice; 0 if the process has no part of the tensor.
        full_height: height of all slices together, without padding.
        first, stop: only matrices `first` to `stop - 1` are updated; None: all from `first` on.
        transposed: the values are stored as `[width, height]`, a single whole matrix with its short side first.
    """

    name: str
    offset: int
    height: int
    count: int
    width: int
    full_height: int
    first: int = 0
    stop: int | None = None
    transposed: bool = False

    @classmethod
    def whole(cls, shape: Sequence[int]) -> MatrixShard:
        """The shard of an unsharded parameter: `[height, count, width]`, or one matrix `[rows, columns]`."""
        if len(shape) == 3:
            height, count, width = shape
            return cls("parameter", 0, height, count, width, full_height=height)
        return cls("parameter", 0, max(shape), 1, min(shape), max(shape), transposed=shape[0] < shape[1])

    @property
    def end(self) -> int:
        """The first element after it."""
        return self.offset + self.height * self.count * self.width

    @property
    def updated(self) -> int:
        """The number of its matrices that are updated."""
        return (self.count if self.stop is None else self.stop) - self.first

    def view(self, flat: Tensor) -> Tensor:
        """The slices of the updated matrices: `[updated, height, width]`, a view of `flat`."""
        values = flat[self.offset : self.end]
        if self.transposed:
            return values.view(1, self.width, self.height).mT[: self.updated]
        return values.view(self.height, self.count, self.width)[:, self.first : self.stop].transpose(0, 1)


@dataclass(frozen=True)
class UpdatedBlock:
    """A part of a flat AdamW parameter that is updated, such as the values of unlocked experts.

    Beginning at element `offset`, the values form `[lines, line_length]`; columns `first` to `stop - 1` are updated.
    """

    offset: int
    lines: int
    line_length: int
    first: int
    stop: int

    def view(self, flat: Tensor) -> Tensor:
        """`[lines, stop - first]`, a view of `flat`."""
        values = flat[self.offset : self.offset + self.lines * self.line_length]
        return values.view(self.lines, self.line_length)[:, self.first : self.stop]
