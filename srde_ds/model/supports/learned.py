"""Learned supports: there are more candidates than will be kept, and their scores are trained along with the rest.

A candidate is a neuron, or for element granularity a block of consecutive entries of the support. Those with the
largest score + temperature * Gumbel noise are kept, and the effective deltas of the others are zero (Gumbel top-k, a
draw without replacement: Kool et al., arXiv 1903.06059). The backward treats the hard mask as the relaxation
sigmoid((noisy score - threshold) / temperature), with the threshold half-way between the last kept and the first
dropped noisy score (straight-through: Bengio et al., arXiv 1308.3432). Without noise the largest scores win, and among
equal ones the lower index.

Shapes: S rows of scores, one for all experts or one for each, of B blocks.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from srde_ds.model.seeding import seeded_generator

# Entries of a support that share a score. With a score for each, element granularity would train twice as many values.
BLOCK_SIZE = {"neuron": 1, "block": 1, "element": 64}


def kept_entries(scores_SB: Tensor, *, entries: int, keep: int, block: int) -> Tensor:
    """`[S, entries]` bool with exactly `keep` True in each of the S masks: the entries of the best blocks.

    Args:
        scores_SB: one score for each block of `block` consecutive entries; the last block may be shorter. Of the worst
            block that stays, only as many first entries are kept as there is room for.
    """
    kept_SB, _ = _kept_of_blocks(scores_SB, entries, keep, block)
    return _entry_masks(kept_SB, block).flatten(1)[:, :entries]


class SupportGate:
    """Turns the scores of a layer into masks over its candidates. Holds no parameters.

    Args:
        entries: number of candidates: neurons, blocks of weights, or single weights.
        keep: how many of them stay.
        block: consecutive entries that share a score.
        seed: the noise depends only on it, the layer and the step, so it is the same on all ranks, in all micro-steps
            and when activations are recomputed.
        layer: number of the decoder layer.
    """

    def __init__(self, *, entries: int, keep: int, block: int, seed: int, layer: int) -> None:
        self.entries, self.keep, self.block = entries, keep, block
        self.blocks = math.ceil(entries / block)
        self.seed, self.layer = seed, layer
        self._noise: tuple[int, Tensor] | None = None

    def mask(self, scores_SB: Tensor) -> Tensor:
        """`[S, entries]` bool: the entries kept without noise."""
        return kept_entries(scores_SB, entries=self.entries, keep=self.keep, block=self.block)

    def sample(self, scores_SB: Tensor, *, temperature: float, step: int, overlap_weight: float = 0.0) -> Tensor:
        """`[S, entries]`, zeros and ones: the entries kept in a training step. Differentiable in the scores.

        Args:
            temperature: temperature of the noise and the relaxation.
            step: seeds the noise.
            overlap_weight: factor of the overlap between the S relaxed masks, see `OverlapLoss`.
        """
        precise_SB = scores_SB.to(torch.promote_types(scores_SB.dtype, torch.float32))
        noisy_SB = precise_SB + temperature * self._gumbel(precise_SB, step)
        kept_SB, threshold_S1 = _kept_of_blocks(noisy_SB.detach(), self.entries, self.keep, self.block)
        soft_SB = RelaxedTopK.apply(noisy_SB, threshold_S1, temperature)
        if overlap_weight and len(scores_SB) > 1:
            soft_SB = OverlapLoss.apply(soft_SB, overlap_weight, self.keep / self.block)
        zero_SB = (soft_SB - soft_SB.detach()).to(scores_SB.dtype)
        hard_SBb = _entry_masks(kept_SB, self.block).to(scores_SB.dtype)
        return (hard_SBb + zero_SB[:, :, None]).flatten(1)[:, : self.entries]

    def _gumbel(self, scores_SB: Tensor, step: int) -> Tensor:
        """Noise of a step, drawn on the CPU so that all kinds of GPU get the same; cached for the step."""
        if self._noise is None or self._noise[0] != step or self._noise[1].shape != scores_SB.shape:
            generator = seeded_generator(self.seed, "gumbel", self.layer, step)
            uniform = torch.rand(scores_SB.shape, dtype=torch.float64, generator=generator)
            self._noise = step, -(-uniform.log()).log().float().to(scores_SB.device)
        return self._noise[1].to(scores_SB.device)


class RelaxedTopK(torch.autograd.Function):
    """s = sigmoid((score - threshold) / temperature), `[S, B]`, whose backward keeps the sum of each mask.

    In the backward the threshold moves with the scores so that sum_b s_b is constant: a candidate gains what others
    lose. With a fixed threshold all scores would rise as long as everything that is kept helps, and AdamW, which scales
    each gradient by its size, would raise them all equally (measured: docs/decisions.md).
    """

    @staticmethod
    def forward(ctx: Any, scores_SB: Tensor, threshold_S1: Tensor, temperature: float) -> Tensor:
        """The relaxed masks `[S, B]`."""
        soft_SB = ((scores_SB - threshold_S1) / temperature).sigmoid()
        ctx.save_for_backward(soft_SB)
        ctx.temperature = temperature
        return soft_SB

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        """The gradient of the scores."""
        (soft_SB,) = ctx.saved_tensors
        slope_SB = soft_SB * (1 - soft_SB)
        mean_S1 = (slope_SB * gradient).sum(1, keepdim=True) / slope_SB.sum(1, keepdim=True).clamp(min=1e-30)
        return slope_SB * (gradient - mean_S1) / ctx.temperature, None, None


class OverlapLoss(torch.autograd.Function):
    """Passes relaxed masks s `[E, B]` through; its backward adds the gradient of

        weight * mean over pairs e < f of <s_e, s_f> / kept blocks

    which is 1 for hard masks that are all equal, and 0 for disjoint ones. Every backward adds the whole gradient, so if
    the gradients of micro-steps are summed, `weight` must be a step's weight divided by their number.
    """

    @staticmethod
    def forward(ctx: Any, soft_EB: Tensor, weight: float, kept_blocks: float) -> Tensor:
        """The masks themselves, in a new view."""
        ctx.save_for_backward(soft_EB)
        experts = len(soft_EB)
        ctx.factor = weight * 2 / (experts * (experts - 1)) / kept_blocks
        return soft_EB.view_as(soft_EB)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        """The masks' gradient plus that of the overlap."""
        (soft_EB,) = ctx.saved_tensors
        return gradient + ctx.factor * (soft_EB.sum(0, keepdim=True) - soft_EB), None, None


def _kept_of_blocks(scores_SB: Tensor, entries: int, keep: int, block: int) -> tuple[Tensor, Tensor]:
    """The number of entries that each block keeps, `[S, B]` int64, and the threshold of the scores, `[S, 1]`."""
    blocks = scores_SB.shape[1]
    sizes_B = torch.full((blocks,), block, device=scores_SB.device)
    sizes_B[-1] = entries - (blocks - 1) * block
    ranked_SB, order_SB = scores_SB.sort(dim=1, descending=True, stable=True)
    sizes_SB = sizes_B[order_SB]
    room_SB = (keep - (sizes_SB.cumsum(1) - sizes_SB)).clamp(min=0)
    kept_SB = sizes_SB.minimum(room_SB)
    last_S1 = (kept_SB > 0).sum(1, keepdim=True) - 1
    next_S1 = (last_S1 + 1).clamp(max=blocks - 1)
    threshold_S1 = (ranked_SB.gather(1, last_S1) + ranked_SB.gather(1, next_S1)) / 2
    return torch.zeros_like(kept_SB).scatter(1, order_SB, kept_SB), threshold_S1


def _entry_masks(kept_SB: Tensor, block: int) -> Tensor:
    """`[S, B, block]` bool; False after the last entry."""
    return torch.arange(block, device=kept_SB.device) < kept_SB[:, :, None]
