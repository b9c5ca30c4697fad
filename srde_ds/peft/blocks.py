"""Reads the weights of blocks that may be quantised."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from srde_ds.model.feed_forward import ROLES, FeedForward


@dataclass
class ReadableBlock(FeedForward):
    """A block whose weights may be quantised: they are read dequantised, so that supports can be chosen by them.

    Attributes:
        dtype: dtype of the base, the only one that all kernels for packed weights take.
    """

    dtype: torch.dtype

    @torch.no_grad()
    def weights(self) -> tuple[Tensor, Tensor, Tensor]:
        """The weights of `FeedForward` in floating point. Quantised ones are read by projecting unit vectors."""
        stored = super().weights()
        packed = any(weight.numel() == 0 for weight in stored)
        if not packed and all(weight.is_floating_point() for weight in stored):
            return stored
        dtype = self.dtype if packed else torch.float32
        read = []
        for role, width in zip(ROLES, (self.hidden, self.hidden, self.intermediate), strict=True):
            units = torch.eye(width, device=self.device, dtype=dtype)
            projection = getattr(self.block, self.roles[role])
            read.append((projection(units) - projection(torch.zeros_like(units[:1]))).T)
        gate, up, down = read
        return gate, up, down
