"""Bootstrap intervals over items (Efron 1979, percentile method)."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

RESAMPLES = 1000
COVERAGE = 0.95

Floats = NDArray[np.float64]


def resampled_sums(columns_NC: Floats, seed: int) -> Floats:
    """The columns' sums over N items drawn with replacement, RESAMPLES times: [RESAMPLES, C].

    Columns share the draws, so figures made from them are paired.
    """
    items = len(columns_NC)
    random = np.random.default_rng(seed)
    draws = (random.multinomial(items, np.full(items, 1 / items)) for _ in range(RESAMPLES))
    return np.stack([counts_N @ columns_NC for counts_N in draws])


def interval(samples_R: Floats) -> list[float]:
    """The central COVERAGE of resampled figures, [low, high]. NaN (a resample without any weight) is ignored."""
    tail = (1 - COVERAGE) / 2
    low, high = np.nanquantile(samples_R, [tail, 1 - tail])
    return [float(low), float(high)]
