"""Tensors that are read from a file when they are needed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class LazyTensor:
    """Dtype, shape, and how to get the values."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    load: Callable[[], Tensor]

    def to(self, dtype: torch.dtype | None) -> LazyTensor:
        """Floating-point values in another dtype; None: as they are."""
        if dtype is None or not self.dtype.is_floating_point:
            return self
        return LazyTensor(dtype, self.shape, lambda: self.load().to(dtype))

    @classmethod
    def of(cls, tensor: Tensor) -> LazyTensor:
        """Of a tensor that is in memory."""
        return cls(tensor.dtype, tuple(tensor.shape), lambda: tensor)
