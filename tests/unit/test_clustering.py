"""From sampled router inputs to router weights: planted clusters, alignment, scale."""

from __future__ import annotations

from unittest.mock import patch

import numpy as np
import pytest
import sklearn.cluster
import torch

from srde_ds.errors import SRDEError
from srde_ds.training.warm_start import clustering
from srde_ds.training.warm_start.clustering import TARGET_GAP, RouterFit, align, fit_router
from srde_ds.training.warm_start.discriminant import discriminant, statistics_of_inputs
from srde_ds.weights.schema import FACTORS


def planted(
    clusters: int, *, rows: int = 60, hidden: int = 24, noise: float = 0.2, common: float = 2.0, seed: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """[N, D] inputs around directions that are far apart, on top of one that all share, and each one's cluster."""
    generator = np.random.default_rng(seed)
    centres = np.linalg.qr(generator.standard_normal((hidden, hidden)))[0][: clusters + 1]
    cluster = generator.permutation(np.repeat(np.arange(clusters), rows))
    inputs = centres[cluster] + common * centres[-1] + noise * generator.standard_normal((len(cluster), hidden))
    return inputs.astype(np.float32), cluster


def fit(inputs: np.ndarray, domain: np.ndarray, *, experts: int, method: str = "kmeans", layer: int = 0) -> RouterFit:
    return fit_router(inputs, domain, num_experts=experts, method=method, seed=1, layer=layer)  # type: ignore[arg-type]


@pytest.mark.parametrize("method", ["kmeans", "domain_means"])
def test_planted_domains_get_their_own_experts(method: str) -> None:
    inputs, domain = planted(4)
    found = fit(inputs, domain, experts=4, method=method)
    assert found.normalized_mutual_information == pytest.approx(1)
    assert found.own_domain_share == 1
    assert found.cluster_sizes == [60] * 4
    np.testing.assert_array_equal((inputs @ found.weights.T).argmax(1), domain)


def test_the_discriminant_sees_past_what_varies_within_domains() -> None:
    generator = np.random.default_rng(3)
    inputs, domain = planted(4, rows=500)
    test, test_domain = planted(4, rows=500, seed=0)
    directions = generator.standard_normal((3, 24)).astype(np.float32)
    for own in (inputs, test):
        own += generator.standard_normal((len(own), 3)).astype(np.float32) @ directions
    shares = {}
    for method in ("discriminant", "domain_means"):
        weights = fit(inputs, domain, experts=4, method=method).weights
        shares[method] = float(((test @ weights.T).argmax(1) == test_domain).mean())
    assert shares["discriminant"] > 0.95 > 0.8 > shares["domain_means"]


def test_the_discriminant_is_the_least_squares_fit_where_the_factors_are_all_there_is() -> None:
    generator = np.random.default_rng(0)
    domain = np.repeat(np.arange(3), 400)
    factors = generator.standard_normal((3, FACTORS, 12))
    inputs = 4 + 2 * generator.standard_normal((3, 12))[domain] + 0.05 * generator.standard_normal((1200, 12))
    inputs += np.einsum("nr,nrd->nd", generator.standard_normal((1200, FACTORS)), factors[domain])
    found = discriminant(statistics_of_inputs(inputs.astype(np.float32), domain)).numpy()
    expected = np.linalg.lstsq(inputs, np.eye(3)[domain], rcond=None)[0].T
    assert np.abs(found - expected).max() < 0.01 * np.abs(expected).max()


@pytest.mark.parametrize("tokens", [3, 20, 100])  # fewer than factors, fewer than dimensions, more than both
def test_the_factors_are_the_longest_principal_axes(tokens: int) -> None:
    inputs = np.random.default_rng(0).standard_normal((tokens, 24)) * np.linspace(3, 0.1, 24)
    factors = statistics_of_inputs(inputs.astype(np.float32), np.zeros(tokens, np.int64)).factors[0].double()
    centred = torch.from_numpy(inputs - inputs.mean(0)) / tokens**0.5
    _, lengths, axes = torch.linalg.svd(centred, full_matrices=False)
    kept = min(FACTORS, len(lengths))
    expected = (axes[:kept].T * lengths[:kept].square()) @ axes[:kept]
    torch.testing.assert_close(factors.T @ factors, expected, rtol=0, atol=1e-4)
    torch.testing.assert_close(factors.norm(dim=1)[:kept], lengths[:kept], rtol=0, atol=2e-3)


def test_the_discriminant_of_inputs_without_spread_is_finite() -> None:
    inputs = np.eye(4, dtype=np.float32)[[0, 0, 1, 1]]
    found = fit(inputs, np.array([0, 0, 1, 1]), experts=2, method="discriminant")
    assert np.isfinite(found.weights).all() and found.own_domain_share == 1


def test_a_random_router_knows_no_domain_and_depends_on_seed_and_layer() -> None:
    inputs, domain = planted(4, rows=300, hidden=64)
    shares = [fit(inputs, domain, experts=4, method="random", layer=layer).own_domain_share for layer in range(40)]
    assert np.mean(shares) == pytest.approx(1 / 4, abs=0.1)
    first, again, other = (fit(inputs, domain, experts=4, method="random", layer=layer).weights for layer in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert not np.allclose(first, other)


def test_clusters_are_found_where_domains_are_mixed_in_them() -> None:
    """K-means follows the inputs, not the labels: with a tenth of the labels wrong it still finds the clusters."""
    inputs, cluster = planted(3)
    domain = cluster.copy()
    domain[::10] = (domain[::10] + 1) % 3
    weights = fit(inputs, domain, experts=3).weights
    np.testing.assert_array_equal((inputs @ weights.T).argmax(1), cluster)


def test_permuted_clusters_are_aligned_with_their_domains() -> None:
    directions = np.linalg.qr(np.random.default_rng(0).standard_normal((8, 8)))[0][:4]
    domain = np.repeat(np.arange(4), 5)
    points = directions[domain]
    for order in ([2, 0, 3, 1], [3, 2, 1, 0]):
        np.testing.assert_array_equal(align(directions[order], points, domain), directions)


def test_alignment_maximises_the_tokens_that_reach_their_expert() -> None:
    """Cluster 0 holds most of both domains; giving each domain its own largest cluster would use it twice."""
    clusters = np.eye(2, dtype=np.float32)
    cluster = np.repeat([0, 0, 1, 1], [10, 9, 1, 8])
    domain = np.repeat([0, 1, 0, 1], [10, 9, 1, 8])
    np.testing.assert_array_equal(align(clusters, clusters[cluster], domain), clusters)
    np.testing.assert_array_equal(align(clusters, clusters[cluster], 1 - domain), clusters[::-1])


def test_experts_without_a_domain_get_the_clusters_that_are_left() -> None:
    directions = np.eye(5, dtype=np.float32)
    cluster = np.repeat([0, 1, 2, 3, 4], [9, 2, 3, 8, 4])
    domain = np.repeat([0, 0, 0, 1, 1], [9, 2, 3, 8, 4])
    found = align(directions, directions[cluster], domain)
    np.testing.assert_array_equal(found, directions[[0, 3, 4, 2, 1]])  # after the two domains' own, the largest first


@pytest.mark.parametrize("method", ["discriminant", "kmeans", "domain_means", "random"])
def test_more_experts_than_domains(method: str) -> None:
    inputs, cluster = planted(4, rows=50, noise=0.1)
    domain = np.minimum(cluster, 1)  # the second domain is made of three clusters
    found = fit(inputs, domain, experts=4, method=method)
    assert found.weights.shape == (4, 24) and np.isfinite(found.weights).all()
    assert sum(found.cluster_sizes) == 200
    if method == "kmeans":
        assert found.cluster_sizes == [50] * 4
        expert = (inputs @ found.weights.T).argmax(1)
        assert set(expert[domain == 0]) == {0}
        assert len(set(zip(cluster.tolist(), expert.tolist(), strict=True))) == 4


def test_fewer_experts_than_domains() -> None:
    inputs, domain = planted(4)
    found = fit(inputs, domain, experts=2)
    expert = (inputs @ found.weights.T).argmax(1)
    assert all((expert[domain == index] == index).all() for index in (0, 1))
    assert sum(found.cluster_sizes) == 240


def test_a_loud_dimension_does_not_hide_the_domains() -> None:
    inputs, domain = planted(4)
    inputs[:, 0] = 30 * np.random.default_rng(1).standard_normal(len(inputs))
    assert fit(inputs, domain, experts=4).own_domain_share > 0.99
    with patch.object(clustering, "_even_points", lambda x: (np.ones(x.shape[1], x.dtype), clustering._unit(x))):
        assert fit(inputs, domain, experts=4).own_domain_share < 0.4


def test_a_silent_dimension_is_left_alone() -> None:
    inputs, domain = planted(3)
    inputs[:, 5] = 0
    found = fit(inputs, domain, experts=3)
    assert found.own_domain_share == 1
    assert np.isfinite(found.weights).all()


@pytest.mark.parametrize("method", ["discriminant", "kmeans", "domain_means", "random"])
@pytest.mark.parametrize("loudness", [0.01, 1.0, 100.0])
def test_logits_have_a_sensible_scale_whatever_that_of_the_inputs(method: str, loudness: float) -> None:
    inputs, domain = planted(4, noise=1.0)
    inputs *= loudness
    best = np.sort(inputs @ fit(inputs, domain, experts=4, method=method).weights.T, axis=1)
    assert np.median(best[:, -1] - best[:, -2]) == pytest.approx(TARGET_GAP, rel=1e-4)


@pytest.mark.parametrize("method", ["discriminant", "kmeans", "domain_means", "random"])
def test_experts_share_no_part_and_bfloat16_keeps_the_choices(method: str) -> None:
    """With a common direction that is 50 times as long as what differs, rounded centroids would all be alike."""
    inputs, domain = planted(4, common=50.0)
    weights = fit(inputs, domain, experts=4, method=method).weights
    assert np.abs(weights.mean(0)).max() < 1e-5 * np.abs(weights).max()
    rounded = torch.from_numpy(weights).bfloat16().float().numpy()
    assert ((inputs @ rounded.T).argmax(1) == (inputs @ weights.T).argmax(1)).mean() > 0.97


def test_a_large_sample_is_clustered_in_mini_batches() -> None:
    inputs, domain = planted(4)
    with (
        patch.object(clustering, "LARGE_SAMPLE", 200),
        patch.object(sklearn.cluster, "MiniBatchKMeans", wraps=sklearn.cluster.MiniBatchKMeans) as mini_batch,
    ):
        assert fit(inputs, domain, experts=4).own_domain_share == 1
        assert mini_batch.call_count == 1
        fit(inputs[:199], domain[:199], experts=4)
        assert mini_batch.call_count == 1


@pytest.mark.parametrize("method", ["discriminant", "kmeans", "domain_means", "random"])
def test_inputs_that_are_all_alike_are_refused(method: str) -> None:
    inputs = np.tile(np.linspace(1, 2, 8, dtype=np.float32), (20, 1))
    with pytest.raises(SRDEError, match="layer 7: the routers' inputs do not tell 3 experts apart"):
        fit(0 * inputs, np.arange(20) % 2, experts=3, method=method, layer=7)
    if method != "random":
        with pytest.raises(SRDEError, match="do not tell 3 experts apart"):
            fit(inputs, np.arange(20) % 2, experts=3, method=method)
