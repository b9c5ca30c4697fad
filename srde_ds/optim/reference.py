"""The update rules in plain float64 on whole matrices, which `gram_muon` must match.

Tests compare `gram_muon` with them, and both with torch.optim.Muon and torch.optim.AdamW.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from srde_ds.optim.gram_muon import NS_COEFFICIENTS, NS_STEPS


def newton_schulz(matrix: Tensor, eps: float = 1e-7) -> Tensor:
    """Five quintic Newton-Schulz steps on `[..., height, width]`: singular values become about one (K. Jordan)."""
    a, b, c = NS_COEFFICIENTS
    x = matrix.double()
    x = x / torch.linalg.matrix_norm(x, keepdim=True).clamp(min=eps)
    for _ in range(NS_STEPS):
        gram = x.mT @ x
        x = a * x + x @ (b * gram + c * gram @ gram)
    return x


def muon_step(
    param: Tensor, grad: Tensor, momentum_buffer: Tensor, *, lr: float, momentum: float, weight_decay: float
) -> tuple[Tensor, Tensor]:
    """One update of `[height, count, width]` (`count` matrices) by Nesterov Muon with AdamW's scale.

    Returns:
        The new parameter and the new momentum buffer, float64.
    """
    grad = grad.double()
    momentum_buffer = momentum * momentum_buffer.double() + (1 - momentum) * grad
    x = (1 - momentum) * grad + momentum * momentum_buffer
    update = newton_schulz(x.transpose(0, 1)).transpose(0, 1)
    scale = 0.2 * math.sqrt(max(param.shape[0], param.shape[2]))
    return param.double() * (1 - lr * weight_decay) - lr * scale * update, momentum_buffer


def adamw_step(
    param: Tensor,
    grad: Tensor,
    moments: tuple[Tensor, Tensor],
    *,
    step: int,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Update number `step` (from 1) of AdamW (Loshchilov and Hutter, arXiv 1711.05101, algorithm 2) in float64.

    Args:
        moments: running means of the gradient and of its square.

    Returns:
        The new parameter, first moment and second moment.
    """
    grad = grad.double()
    exp_avg = betas[0] * moments[0].double() + (1 - betas[0]) * grad
    exp_avg_sq = betas[1] * moments[1].double() + (1 - betas[1]) * grad**2
    mean, square = exp_avg / (1 - betas[0] ** step), exp_avg_sq / (1 - betas[1] ** step)
    return param.double() * (1 - lr * weight_decay) - lr * mean / (square.sqrt() + eps), exp_avg, exp_avg_sq
