"""Sums over rows of training data that are bit-identical on any number of ranks.

In each round every rank has one row; rows are ordered by round, then rank. They are added one by one in this order, so
the additions are those of a single process that goes through all rows.
"""

from __future__ import annotations

import math

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor


class ReproducibleSum:
    """A float64 sum of vectors, whole on every rank."""

    def __init__(self, size: int, device: torch.device) -> None:
        self.total = torch.zeros(size, dtype=torch.float64, device=device)

    def add(self, value: Tensor) -> None:
        """Add each rank's row; a collective."""
        world = dist.get_world_size()
        rows = self.total.new_empty(world * self.total.numel())
        dist.all_gather_into_tensor(rows, value.to(self.total))
        for row in rows.view(world, -1):
            self.total += row

    def merge(self, other: ReproducibleSum) -> None:
        """Add another sum of the same size."""
        self.total += other.total


class ShardedReproducibleSum:
    """The sum of a large vector; each rank keeps an equal part of it, float32, in host memory."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.part = torch.zeros(math.ceil(size / dist.get_world_size()))

    def add(self, value: Tensor) -> None:
        """Add each rank's row, float32; a collective."""
        world = dist.get_world_size()
        sent = F.pad(value, (0, world * self.part.numel() - self.size))
        rows = torch.empty_like(sent)
        dist.all_to_all_single(rows, sent)
        total = self.part.to(value.device)
        for row in rows.view(world, -1):
            total += row
        self.part.copy_(total)

    def merge(self, other: ShardedReproducibleSum) -> None:
        """Add another sum of the same size."""
        self.part += other.part

    def whole(self, device: torch.device) -> Tensor:
        """All of it on `device`, on every rank; a collective."""
        parts = torch.empty(dist.get_world_size() * self.part.numel(), device=device)
        dist.all_gather_into_tensor(parts, self.part.to(device))
        return parts[: self.size]
