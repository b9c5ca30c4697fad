"""Cross entropy at the positions that carry labels, summed with the labels' weights."""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

IGNORED = -100
"""Where there is no label"""


@dataclass(frozen=True)
class Targets:
    """What a batch's logits are held against.

    Attributes:
        positions: `[P]` columns of the batch whose logits are needed, since a label follows them in some row.
        tokens: `[B * P]` the labels that follow them.
        weights: `[B * P]` how much each counts; None: each 1.
    """

    positions: Tensor
    tokens: Tensor
    weights: Tensor | None

    @staticmethod
    def of(labels: Tensor, weights: Tensor | None) -> Targets:
        """From `[B, S]` labels and their weights; label s is predicted from position s - 1."""
        tokens = F.pad(labels[:, 1:], (0, 1), value=IGNORED)
        positions = (tokens != IGNORED).any(0).nonzero().squeeze(1)
        if positions.numel() == 0:  # the loss is 0, with a graph, so that every rank runs the same backward
            positions = tokens.new_zeros(1)
        if weights is not None:
            weights = F.pad(weights[:, 1:], (0, 1)).index_select(1, positions).flatten()
        return Targets(positions, tokens.index_select(1, positions).flatten(), weights)

    @property
    def count(self) -> Tensor:
        """How many labels there are."""
        return (self.tokens != IGNORED).sum()

    def loss(self, logits: Tensor) -> Tensor:
        """The sum over labels, in nats (fp32 scalar), from logits `[B, P, V]`."""
        logits = logits.flatten(0, 1).float()
        if self.weights is None:
            return F.cross_entropy(logits, self.tokens, ignore_index=IGNORED, reduction="sum")
        return (F.cross_entropy(logits, self.tokens, ignore_index=IGNORED, reduction="none") * self.weights).sum()
