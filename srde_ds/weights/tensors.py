"""Tensors that are read from a file only when needed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class LazyTensor:
    """A tensor's dtype and shape, and a function that loads the values."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    load: Callable[[], Tensor]

    def to(self, dtype: torch.dtype | None) -> LazyTensor:
        """The tensor with floating-point values in another dtype; None: unchanged."""
        if dtype is None or not self.dtype.is_floating_point:
            return self
        return LazyTensor(dtype, self.shape, lambda: self.load().to(dtype))

    @classmethod
    def of(cls, tensor: Tensor) -> LazyTensor:
        """The form for a tensor in memory."""
        return cls(tensor.dtype, tuple(tensor.shape), lambda: tensor)
