"""The positions of a micro-batch that predict tokens, and these tokens."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from srde_ds.data.packing import NO_LABEL


@dataclass(frozen=True)
class Targets:
    """What the loss needs of `[B, S]` labels. Computed on the labels' device; for labels on the CPU, no GPU waits.

    Attributes:
        columns: `[N]` int64, the positions from which any row predicts a label. There is at least one, so that there is
            a graph and every rank runs the same backward.
        tokens: `[B, N]` int64, the tokens predicted from there; NO_LABEL where a row predicts none.
        count: int64 scalar, the number of labels.
        weights: `[B, N]`, how much each label counts in the loss; None: 1.
    """

    columns: Tensor
    tokens: Tensor
    count: Tensor
    weights: Tensor | None = None

    @classmethod
    def of(cls, labels: Tensor, weights: Tensor | None = None) -> Targets:
        """The targets of `[B, S]` labels and weights. Label s is predicted from position s - 1."""
        following = F.pad(labels[:, 1:], (0, 1), value=NO_LABEL)
        columns = (following != NO_LABEL).any(0).nonzero().squeeze(1)
        if columns.numel() == 0:
            columns = following.new_zeros(1)
        tokens = following.index_select(1, columns)
        if weights is not None:
            weights = F.pad(weights[:, 1:], (0, 1)).index_select(1, columns)
        return cls(columns, tokens, (tokens != NO_LABEL).sum(), weights)

    def to(self, device: torch.device) -> Targets:
        """A copy on a device, made without waiting."""
        weights = None if self.weights is None else on_device(self.weights, device)
        columns, tokens, count = (on_device(tensor, device) for tensor in (self.columns, self.tokens, self.count))
        return Targets(columns, tokens, count, weights)


def on_device(tensor: Tensor, device: torch.device) -> Tensor:
    """A copy on a device. From the CPU to a GPU it goes through pinned memory, so that the CPU does not wait."""
    if device.type == "cuda" and tensor.device.type == "cpu":
        # Pinning keeps the strides, and torch copies no values into an expanded tensor, whose elements share memory.
        tensor = tensor.contiguous().pin_memory()
    return tensor.to(device, non_blocking=True)
