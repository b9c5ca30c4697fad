"""Learned supports: there are more candidates than will be kept, and their scores are trained along with the rest.

A candidate is a neuron, a block of weights, or for element granularity a group of consecutive entries of the support.
Those with the largest score + temperature * Gumbel noise are kept, and the effective deltas of the others are zero
(Gumbel top-k, a draw without replacement: Kool et al., arXiv 1903.06059). The backward treats the hard mask as the
relaxation sigmoid((noisy score - threshold) / temperature), with the threshold half-way between the last kept and the
first dropped noisy score (straight-through: Bengio et al., arXiv 1308.3432). Without noise the largest scores win, and
among equal ones the lower index.

Shapes: S rows of scores, one for all experts or one for each, of G groups.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from srde_ds.model.seeding import seeded_generator

# Entries of a support that share a score. With a score for each, element granularity would train twice as many values.
GROUP_SIZE = {"neuron": 1, "block": 1, "element": 64}


def kept_entries(scores_SG: Tensor, *, entries: int, keep: int, group: int) -> Tensor:
    """`[S, entries]` bool with exactly `keep` True in each of the S masks: the entries of the best groups.

    Args:
        scores_SG: one score for each group of `group` consecutive entries; the last group may be shorter. Of the worst
            group that stays, only as many first entries are kept as there is room for.
    """
    kept_SG, _ = _kept_of_groups(scores_SG, entries, keep, group)
    return _entry_masks(kept_SG, group).flatten(1)[:, :entries]


class SupportGate:
    """Turns the scores of a layer into masks over its candidates. Holds no parameters.

    Args:
        entries: number of candidates: neurons, blocks of weights, or single weights.
        keep: how many of them stay.
        group: consecutive entries that share a score.
        seed: the noise depends only on it, the layer and the step, so it is the same on all ranks, in all micro-steps
            and when activations are recomputed.
        layer: number of the decoder layer.
    """

    def __init__(self, *, entries: int, keep: int, group: int, seed: int, layer: int) -> None:
        self.entries, self.keep, self.group = entries, keep, group
        self.groups = math.ceil(entries / group)
        self.seed, self.layer = seed, layer
        self._noise: tuple[int, Tensor] | None = None

    def mask(self, scores_SG: Tensor) -> Tensor:
        """`[S, entries]` bool: the entries kept without noise."""
        return kept_entries(scores_SG, entries=self.entries, keep=self.keep, group=self.group)

    def sample(self, scores_SG: Tensor, *, temperature: float, step: int, overlap_weight: float = 0.0) -> Tensor:
        """`[S, entries]`, zeros and ones: the entries kept in a training step. Differentiable in the scores.

        Args:
            temperature: temperature of the noise and the relaxation.
            step: seeds the noise.
            overlap_weight: factor of the overlap between the S relaxed masks, see `OverlapLoss`.
        """
        precise_SG = scores_SG.to(torch.promote_types(scores_SG.dtype, torch.float32))
        noisy_SG = precise_SG + temperature * self._gumbel(precise_SG, step)
        kept_SG, threshold_S1 = _kept_of_groups(noisy_SG.detach(), self.entries, self.keep, self.group)
        soft_SG = RelaxedTopK.apply(noisy_SG, threshold_S1, temperature)
        if overlap_weight and len(scores_SG) > 1:
            soft_SG = OverlapLoss.apply(soft_SG, overlap_weight, self.keep / self.group)
        zero_SG = (soft_SG - soft_SG.detach()).to(scores_SG.dtype)
        hard_SGg = _entry_masks(kept_SG, self.group).to(scores_SG.dtype)
        return (hard_SGg + zero_SG[:, :, None]).flatten(1)[:, : self.entries]

    def _gumbel(self, scores_SG: Tensor, step: int) -> Tensor:
        """Noise of a step, drawn on the CPU so that all kinds of GPU get the same; cached for the step."""
        if self._noise is None or self._noise[0] != step or self._noise[1].shape != scores_SG.shape:
            generator = seeded_generator(self.seed, "gumbel", self.layer, step)
            uniform = torch.rand(scores_SG.shape, dtype=torch.float64, generator=generator)
            self._noise = step, -(-uniform.log()).log().float().to(scores_SG.device)
        return self._noise[1].to(scores_SG.device)


class RelaxedTopK(torch.autograd.Function):
    """s = sigmoid((score - threshold) / temperature), `[S, G]`, whose backward keeps the sum of each mask.

    In the backward the threshold moves with the scores so that sum_g s_g is constant: a candidate gains what others
    lose. With a fixed threshold all scores would rise as long as everything that is kept helps, and AdamW, which scales
    each gradient by its size, would raise them all equally (measured: docs/decisions.md).
    """

    @staticmethod
    def forward(ctx: Any, scores_SG: Tensor, threshold_S1: Tensor, temperature: float) -> Tensor:
        """The relaxed masks `[S, G]`."""
        soft_SG = ((scores_SG - threshold_S1) / temperature).sigmoid()
        ctx.save_for_backward(soft_SG)
        ctx.temperature = temperature
        return soft_SG

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        """The gradient of the scores."""
        (soft_SG,) = ctx.saved_tensors
        slope_SG = soft_SG * (1 - soft_SG)
        mean_S1 = (slope_SG * gradient).sum(1, keepdim=True) / slope_SG.sum(1, keepdim=True).clamp(min=1e-30)
        return slope_SG * (gradient - mean_S1) / ctx.temperature, None, None


class OverlapLoss(torch.autograd.Function):
    """Passes relaxed masks s `[E, G]` through; its backward adds the gradient of

        weight * mean over pairs e < f of <s_e, s_f> / kept groups

    which is 1 for hard masks that are all equal, and 0 for disjoint ones. Every backward adds the whole gradient, so if
    the gradients of micro-steps are summed, `weight` must be a step's weight divided by their number.
    """

    @staticmethod
    def forward(ctx: Any, soft_EG: Tensor, weight: float, kept_groups: float) -> Tensor:
        """The masks themselves, in a new view."""
        ctx.save_for_backward(soft_EG)
        experts = len(soft_EG)
        ctx.factor = weight * 2 / (experts * (experts - 1)) / kept_groups
        return soft_EG.view_as(soft_EG)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        """The masks' gradient plus that of the overlap."""
        (soft_EG,) = ctx.saved_tensors
        return gradient + ctx.factor * (soft_EG.sum(0, keepdim=True) - soft_EG), None, None


def _kept_of_groups(scores_SG: Tensor, entries: int, keep: int, group: int) -> tuple[Tensor, Tensor]:
    """The number of entries that each group keeps, `[S, G]` int64, and the threshold of the scores, `[S, 1]`."""
    groups = scores_SG.shape[1]
    sizes_G = torch.full((groups,), group, device=scores_SG.device)
    sizes_G[-1] = entries - (groups - 1) * group
    ranked_SG, order_SG = scores_SG.sort(dim=1, descending=True, stable=True)
    sizes_SG = sizes_G[order_SG]
    room_SG = (keep - (sizes_SG.cumsum(1) - sizes_SG)).clamp(min=0)
    kept_SG = sizes_SG.minimum(room_SG)
    last_S1 = (kept_SG > 0).sum(1, keepdim=True) - 1
    next_S1 = (last_S1 + 1).clamp(max=groups - 1)
    threshold_S1 = (ranked_SG.gather(1, last_S1) + ranked_SG.gather(1, next_S1)) / 2
    return torch.zeros_like(kept_SG).scatter(1, order_SG, kept_SG), threshold_S1


def _entry_masks(kept_SG: Tensor, group: int) -> Tensor:
    """`[S, G, group]` bool; False after the last entry."""
    return torch.arange(group, device=kept_SG.device) < kept_SG[:, :, None]
