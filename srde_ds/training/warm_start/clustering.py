"""Turns a sample of a layer's router inputs into router weights: a direction for each expert, and one scale for all.

The router is linear without bias, so the discriminant and the clustering are as well: an input x belongs to the cluster
whose unit direction c_e is nearest to A x in angle, with a diagonal A. Then w_e = A c_e routes it to its expert.

scikit-learn is imported where it is used, since that takes a while and only rank 0 of a run with a warm start needs it.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Literal

import numpy as np
from scipy.optimize import linear_sum_assignment

from srde_ds.errors import SRDEError
from srde_ds.training.warm_start.discriminant import discriminant, statistics_of_inputs

Method = Literal["discriminant", "kmeans", "domain_means", "random"]

# Median gap, in nats, between a token's best and second logit: the best of the two experts weighs sigmoid(2) = 88 %.
TARGET_GAP = 2.0
# From this many inputs on, k-means works on mini-batches. Below, all inputs fit into memory, which fits better.
LARGE_SAMPLE = 16_384
_MINI_BATCH = 4096
# Real inputs converge in 12 to 40 iterations. A cloud without clusters would go on in vain.
_MOST_ITERATIONS = 40
# How many times starting points are drawn for experts that have no domain; the best fit is kept.
DRAWS = 5
# A smaller gap, relative to the lengths of inputs and directions, is only rounding.
_SMALLEST_GAP = 1e-5


@dataclass(frozen=True)
class RouterFit:
    """The result for one layer.

    Attributes:
        weights: `[E, D]` fp32.
        cluster_sizes: `[E]` number of sampled tokens by best expert.
        normalized_mutual_information: that of best expert and domain; 0: independent, 1: the same partition.
        own_domain_share: share of the sampled tokens whose best expert is their domain's.
    """

    weights: np.ndarray
    cluster_sizes: list[int]
    normalized_mutual_information: float
    own_domain_share: float


def fit_router(
    inputs: np.ndarray, domain: np.ndarray, *, num_experts: int, method: Method, seed: int, layer: int
) -> RouterFit:
    """Find the router weights of one layer.

    Args:
        inputs: `[N, D]` fp32, the router's inputs.
        domain: `[N]` index of each token's domain. Domain d belongs to expert d; further experts have none.
        num_experts: E, at least 2.
        method: the option `warm_start_method`.
        seed: together with the layer's number, the seed of all random numbers.
        layer: number of the decoder layer.

    Raises:
        SRDEError: the inputs do not tell the experts apart.
    """
    generator = np.random.default_rng([seed, layer])
    if method == "discriminant":
        rows = discriminant(statistics_of_inputs(inputs, domain)).numpy()[:num_experts]
        common = np.broadcast_to(rows.mean(0), (num_experts - len(rows), rows.shape[1]))
        return scaled(np.concatenate([rows, common]), inputs, domain, layer=layer)
    scale, points = _even_points(inputs)
    means = _domain_means(points, domain, min(num_experts, int(domain.max()) + 1))
    if method == "random":
        directions = _unit(generator.standard_normal((num_experts, points.shape[1]), dtype=np.float32))
    elif method == "domain_means":
        # An expert without a domain gets the mean of all domains, so the tokens that lean to none of them.
        common = np.broadcast_to(_unit(points.mean(0)), (num_experts - len(means), points.shape[1]))
        directions = np.concatenate([means, common])
    else:
        directions = align(_clusters(points, means, num_experts, generator), points, domain)
    return scaled(directions * scale, inputs, domain, layer=layer)


def scaled(directions: np.ndarray, inputs: np.ndarray, domain: np.ndarray, *, layer: int) -> RouterFit:
    """The router of the experts' directions `[E, D]`, with a median gap of TARGET_GAP on the inputs.

    Raises:
        SRDEError: the inputs do not tell the experts apart.
    """
    # What all experts have in common changes no choice, and in bfloat16 it would drown the differences.
    weights = (directions - directions.mean(0)).astype(inputs.dtype)
    num_experts, logits = len(weights), inputs @ weights.T
    best = np.partition(logits, num_experts - 2, axis=1)
    gap = float(np.median(best[:, -1] - best[:, -2]))
    if not gap > _SMALLEST_GAP * _lengths(inputs).mean() * _lengths(directions).mean():
        raise SRDEError(
            f"warm_start: layer {layer}: the routers' inputs do not tell {num_experts} experts apart. Give more "
            "--warm_start_samples or fewer --num_experts."
        )
    from sklearn.metrics import normalized_mutual_info_score

    expert = logits.argmax(1)
    return RouterFit(
        weights=(weights * (TARGET_GAP / gap)).astype(np.float32),
        cluster_sizes=np.bincount(expert, minlength=num_experts).tolist(),
        normalized_mutual_information=float(normalized_mutual_info_score(domain, expert)),
        own_domain_share=float((expert == domain).mean()),
    )


def align(directions: np.ndarray, points: np.ndarray, domain: np.ndarray) -> np.ndarray:
    """Order clusters by expert, so that as many points as possible go to the expert of their domain.

    Args:
        directions: `[E, D]` unit vectors, one for each cluster.
        points: `[N, D]`.
        domain: `[N]` index of each point's domain.

    Returns:
        `[E, D]`. Experts without a domain get the clusters that are left, the largest first.
    """
    experts = len(directions)
    cluster = (points @ directions.T).argmax(1)
    table = np.zeros((experts, max(experts, int(domain.max()) + 1)), np.int64)
    np.add.at(table, (cluster, domain), 1)
    matched, expert = linear_sum_assignment(table[:, : min(experts, int(domain.max()) + 1)], maximize=True)
    order = matched[expert.argsort()].tolist()
    left = sorted(set(range(experts)) - set(order), key=lambda c: (-int(table[c].sum()), c))
    return directions[order + left]


def _even_points(inputs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """`scale` `[D]`, which tames dimensions louder than the median, and the unit vectors `[N, D]` of inputs * scale.

    A few dimensions of hidden states make up much of their length and say little about the domain.
    """
    loudness = np.sqrt(np.einsum("nd,nd->d", inputs, inputs) / len(inputs))
    median = np.median(loudness[loudness > 0]) if loudness.any() else 0.0
    scale = np.divide(median, loudness, out=np.ones_like(loudness), where=loudness > median)
    points = inputs * scale
    points /= np.maximum(_lengths(points), np.finfo(points.dtype).tiny)
    return scale, points


def _domain_means(points: np.ndarray, domain: np.ndarray, count: int) -> np.ndarray:
    """`[count, D]` unit vectors."""
    return _unit(np.stack([points[domain == index].mean(0) for index in range(count)]))


def _clusters(points: np.ndarray, means: np.ndarray, experts: int, generator: np.random.Generator) -> np.ndarray:
    """`[E, D]` directions of the clusters that spherical k-means finds, starting at the domains' means.

    If there are more experts than domains, further starting points are drawn, and the best of several draws is kept.
    """
    from sklearn.cluster import KMeans, MiniBatchKMeans
    from sklearn.exceptions import ConvergenceWarning

    fits = []
    for _ in range(1 if experts == len(means) else DRAWS):
        starts = _draw_starts(points, means, experts - len(means), generator)
        options = {
            "n_clusters": experts,
            "init": starts,
            "n_init": 1,
            "max_iter": _MOST_ITERATIONS,
            "random_state": int(generator.integers(2**31)),
        }
        kmeans = KMeans(**options) if len(points) < LARGE_SAMPLE else MiniBatchKMeans(batch_size=_MINI_BATCH, **options)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)  # fewer distinct inputs than experts: refused later
            fits.append(kmeans.fit(points))
    return _unit(min(fits, key=lambda kmeans: kmeans.inertia_).cluster_centers_)


def _draw_starts(points: np.ndarray, starts: np.ndarray, count: int, generator: np.random.Generator) -> np.ndarray:
    """`starts` and `count` more, drawn as k-means++ does: in proportion to the squared distance from the nearest."""
    for _ in range(count):
        # Not zero, so that drawing works on identical inputs; they are refused later, by the gap of their logits.
        distance = np.maximum(1 - (points @ starts.T).max(1).astype(np.float64), 1e-12)
        drawn = generator.choice(len(points), p=distance / distance.sum())
        starts = np.concatenate([starts, points[drawn : drawn + 1]])
    return starts


def _unit(vectors: np.ndarray) -> np.ndarray:
    return vectors / np.maximum(_lengths(vectors), np.finfo(vectors.dtype).tiny)


def _lengths(vectors: np.ndarray) -> np.ndarray:
    """`[..., 1]`. `np.linalg.norm` would copy all vectors, which takes longer than the sums."""
    return np.sqrt(np.einsum("...d,...d->...", vectors, vectors))[..., None]
