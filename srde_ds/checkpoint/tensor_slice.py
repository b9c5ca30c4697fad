"""The part of a tensor that a rank holds, described independently of the number of ranks. Needs no deepspeed."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from srde_ds.errors import SRDEError

KINDS = ("master", "momentum_buffer", "exp_avg", "exp_avg_sq")


@dataclass
class TensorSlice:
    """A rank's part of a global tensor: a contiguous run of elements, or several of equal length at equal distances.

    Args:
        name: the tensor's stable name, such as `layers.0.deltas.free`.
        kind: one of KINDS: the fp32 master weights, or an optimizer state of the same shape.
        global_shape: shape of the whole tensor over all ranks, without padding.
        offset: index of the first element in the row-major flattened global tensor.
        data: fp32; 1-D: one run; 2-D: one run per line (such as some experts' columns in a matrix of all experts).
        stride: distance in elements from the start of one run to the next; for 2-D data only.

    Raises:
        SRDEError: the kind is unknown, the data is not 1-D or 2-D fp32, or the slice leaves the tensor.
    """

    name: str
    kind: str
    global_shape: tuple[int, ...]
    offset: int
    data: Tensor
    stride: int = 0

    def __post_init__(self) -> None:
        where = f"slice of '{self.name}' ({self.kind})"
        if self.kind not in KINDS:
            raise SRDEError(f"{where}: kind must be one of {', '.join(KINDS)}.")
        if self.data.dim() not in (1, 2) or self.data.dtype != torch.float32:
            raise SRDEError(f"{where}: data must be 1-D or 2-D float32, not {self.data.dim()}-D {self.data.dtype}.")
        if self.data.dim() == 2 and self.stride < self.data.shape[1]:
            raise SRDEError(f"{where}: stride {self.stride} is shorter than its runs of {self.data.shape[1]} elements.")
        end = self.offset + self.span
        if self.offset < 0 or end > math.prod(self.global_shape):
            raise SRDEError(f"{where}: elements {self.offset}:{end} lie outside shape {self.global_shape}.")

    @property
    def span(self) -> int:
        """Number of elements of the global tensor from the slice's first to its last."""
        if self.data.dim() == 1 or self.data.numel() == 0:
            return self.data.numel()
        runs, length = self.data.shape
        return (runs - 1) * self.stride + length
