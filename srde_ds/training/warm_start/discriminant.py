"""Tells domains apart: a linear discriminant of their inputs, without a constant, since a router has none."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from srde_ds.weights.origins import DomainStatistics
from srde_ds.weights.schema import FACTORS

# Least variance of a dimension, relative to the mean second moment: inputs without any spread must not divide by zero.
_FLOOR = 1e-6


def discriminant(statistics: DomainStatistics) -> Tensor:
    """`[E, D]` float64: the vectors w_e that fit w_e . x best to 1 for inputs x of domain e, and to 0 for all others.

    With equal weights for the E domains, least squares gives w_e = M^-1 mean_e / E, where M is the inputs' second
    moment. Apart from the missing constant this is Fisher's discriminant. M comes from the factor model of
    `DomainStatistics`, so beyond the factors the dimensions count as independent. This keeps a router steady: with the
    whole covariance it relies on directions of little variance, which other experts easily change.
    """
    mean, spread, factors = (part.double() for part in (statistics.mean, statistics.spread, statistics.factors))
    domains, hidden = mean.shape
    # M = own + columns columns^T, and by Woodbury's identity only a matrix of the columns is solved for.
    own_D = (spread.square() - factors.square().sum(1)).clamp(min=0).mean(0)
    moment = (mean.square() + spread.square()).mean()
    own_D = own_D.clamp(min=_FLOOR * float(moment.clamp(min=torch.finfo(torch.float32).tiny)))
    columns = torch.cat([factors.reshape(-1, hidden), mean]).T / domains**0.5
    scaled, scaled_mean = columns / own_D[:, None], (mean / own_D).T
    core = torch.eye(columns.shape[1], dtype=torch.float64) + columns.T @ scaled
    return ((scaled_mean - scaled @ torch.linalg.solve(core, columns.T @ scaled_mean)) / domains).T


def statistics_of_inputs(inputs: np.ndarray, domain: np.ndarray) -> DomainStatistics:
    """The statistics of a layer's inputs on each domain.

    Args:
        inputs: `[N, D]` fp32.
        domain: `[N]` index of each input's domain; each index below the largest occurs.
    """
    means, spreads, factors = [], [], []
    for index in range(int(domain.max()) + 1):
        own = torch.from_numpy(inputs[domain == index])
        mean = own.mean(0)
        means.append(mean)
        spreads.append(own.std(0, correction=0))
        factors.append(_longest_factors((own - mean) / len(own) ** 0.5))
    return DomainStatistics(torch.stack(means), torch.stack(spreads), torch.stack(factors))


def _longest_factors(inputs_ND: Tensor) -> Tensor:
    """`[FACTORS, D]`: the right singular vectors times their singular values, the largest first, then zeros.

    A singular value decomposition would find all of them, which takes far longer.
    """
    tokens, hidden = inputs_ND.shape
    factors = inputs_ND.new_zeros(FACTORS, hidden)
    count = min(FACTORS, tokens, hidden)
    if tokens <= hidden:
        left = torch.linalg.eigh(inputs_ND @ inputs_ND.T).eigenvectors[:, -count:]
        factors[:count] = (left.T @ inputs_ND).flip(0)
    else:
        values, right = torch.linalg.eigh(inputs_ND.T @ inputs_ND)
        factors[:count] = (right[:, -count:] * values[-count:].clamp(min=0).sqrt()).T.flip(0)
    return factors
