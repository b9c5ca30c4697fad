"""Which weights are chosen."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from srde_ds.errors import SRDEError
from srde_ds.model.feed_forward import ROLES
from srde_ds.model.seeding import seeded_generator
from srde_ds.model.supports.blocks import SupportBlocks, _located, block_numbers, weight_indices
from srde_ds.model.supports.selection import (
    activation_scores,
    best_entries,
    magnitude_scores,
    random_subset,
    ranking,
    select_support,
    support_size,
    touched_neurons,
    value_count,
)
from srde_ds.training.calibration import _SummedGradientScores
from srde_ds.weights.schema import support_hash
from tests.helpers import adapter_config, tiny_srde

D, F = 8, 24


def weights(dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = ((F, D), (F, D), (D, F))
    gate, up, down = (torch.randn(s, generator=generator).bfloat16().to(dtype) for s in shapes)
    return gate, up, down


def select(*, seed: int = 0, layer: int = 0, dtype: torch.dtype = torch.float32, **overrides: Any) -> torch.Tensor:
    config = adapter_config(**overrides)
    return select_support(config, weights(dtype), hidden=D, intermediate=F, seed=seed, layer=layer)


def test_neuron_magnitude_takes_the_neurons_with_the_largest_norm() -> None:
    gate, up, down = weights()
    norms = [(gate[j].norm() ** 2 + up[j].norm() ** 2 + down[:, j].norm() ** 2).sqrt().item() for j in range(F)]
    largest = sorted(sorted(range(F), key=lambda j: -norms[j])[:5])
    support = select(density=5 / F)
    assert support.tolist() == largest and support.dtype == torch.int32


def test_element_magnitude_takes_the_largest_weights() -> None:
    flat = torch.cat([w.flatten() for w in weights()]).abs()
    support = select(granularity="element", density=0.1).long()
    assert support.numel() == round(0.1 * 3 * D * F)
    chosen = torch.zeros(flat.numel(), dtype=torch.bool).index_fill(0, support, True)
    assert flat[chosen].min() >= flat[~chosen].max()


def test_equal_scores_go_to_the_lower_index() -> None:
    scores = torch.tensor([1.0, 3.0, 2.0, 2.0, 2.0, 5.0])
    assert ranking(scores, 4).tolist() == [5, 1, 2, 3]


@pytest.mark.parametrize("granularity", ["neuron", "element"])
def test_the_dtype_of_the_load_does_not_matter(granularity: str) -> None:
    kwargs: dict[str, Any] = {"granularity": granularity, "density": 0.25}
    assert torch.equal(select(dtype=torch.bfloat16, **kwargs), select(dtype=torch.float32, **kwargs))


def test_magnitude_per_expert_cuts_the_ranking_into_slices() -> None:
    shared, separate = select(density=6 / F), select(density=2 / F, support_scope="per_expert")
    assert separate.shape == (3, 2)
    assert sorted(separate.flatten().tolist()) == shared.tolist()
    assert separate[0].tolist() == select(density=2 / F).tolist()


def test_slices_that_do_not_fit_are_refused() -> None:
    with pytest.raises(SRDEError, match=r"density=0\.5 for 3 experts.*0\.3333 or less"):
        select(density=0.5, support_scope="per_expert")


@pytest.mark.parametrize("granularity", ["neuron", "element"])
def test_random_depends_on_seed_layer_and_expert_alone(granularity: str) -> None:
    kwargs: dict[str, Any] = {"granularity": granularity, "support_strategy": "random", "density": 0.4}
    support = select(support_scope="per_expert", **kwargs)
    assert torch.equal(support, select(support_scope="per_expert", **kwargs))
    others = [select(seed=1, **kwargs), select(layer=1, **kwargs), support[1], support[2]]
    assert all(not torch.equal(support[0], other) for other in others)
    assert all(len(set(row.tolist())) == row.numel() and row.tolist() == sorted(row.tolist()) for row in support)
    assert torch.equal(support[0], select(**kwargs))  # shared is expert 0's draw


@pytest.mark.parametrize("count", [0, 1, 3, 5, 9, 10])
def test_random_subset_is_uniform(count: int) -> None:
    draws = [random_subset(10, count, seeded_generator(0, i)) for i in range(600)]
    assert all(d.unique().numel() == count for d in draws)
    frequency = torch.cat(draws).bincount(minlength=10) / 600
    assert (frequency - count / 10).abs().max() < 0.08  # 4 standard deviations of a fair draw


def test_sizes() -> None:
    assert support_size(adapter_config(density=1e-9), D, F) == 1
    assert support_size(adapter_config(density=1.0), D, F) == F
    assert value_count(adapter_config(density=0.25), D, F) == 3 * 6 * D
    assert value_count(adapter_config(density=0.25, granularity="element"), D, F) == 3 * D * F // 4
    assert select(density=1.0).tolist() == list(range(F))


def test_indices_beyond_int32_are_refused() -> None:
    with pytest.raises(SRDEError, match="exceeds int32"):
        select_support(
            adapter_config(granularity="element"), weights(), hidden=16384, intermediate=53248, seed=0, layer=0
        )


@pytest.mark.parametrize("strategy", ["activation", "gradient"])
def test_until_data_are_looked_at_all_experts_have_the_largest_weights(strategy: str) -> None:
    """Their supports may overlap: no slices need to fit."""
    support = select(support_strategy=strategy, support_scope="per_expert", density=0.5)
    assert support.tolist() == [select(density=0.5).tolist()] * 3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_activation_scores_weigh_each_weight_by_its_input(dtype: torch.dtype) -> None:
    gate, up, down = weights(dtype)
    input_norm, hidden_norm = torch.rand(D, dtype=torch.float64) + 0.1, torch.rand(F, dtype=torch.float64) + 0.1
    g, u, d = gate.double(), up.double(), down.double()
    elements = [(w * norm).abs() for w, norm in ((g, input_norm), (u, input_norm), (d, hidden_norm))]
    found = activation_scores("element", gate, up, down, input_norm, hidden_norm)
    torch.testing.assert_close(found, torch.cat([e.flatten() for e in elements]).float())
    neurons = [
        sum((w[j] * input_norm).square().sum() for w in (g, u)) + (d[:, j] * hidden_norm[j]).square().sum()
        for j in range(F)
    ]
    found = activation_scores("neuron", gate, up, down, input_norm, hidden_norm)
    torch.testing.assert_close(found, torch.stack(neurons).sqrt(), rtol=1e-6, atol=0)


def test_blocks_with_the_largest_norms_are_chosen() -> None:
    """Counted by hand: the largest weights are in one block of each matrix."""
    gate, up, down = torch.ones(48, 32), torch.ones(48, 32), torch.ones(32, 48)
    gate[17, 3], up[47, 31], down[16:32, 32:48] = 100, 90, 8  # norms of about 101, 91 and 128
    config = adapter_config(granularity="block", density=3 / 18)
    sizes: dict[str, int] = {"hidden": 32, "intermediate": 48, "seed": 0, "layer": 0}
    assert select_support(config, (gate, up, down), **sizes).tolist() == [2, 6 + 5, 12 + 5]
    found = activation_scores("block", gate, up, down, torch.ones(32), 2 * torch.ones(48))
    assert found[12:].tolist() == [32.0] * 5 + [256.0]
    indices = weight_indices("block", torch.tensor([2, 17]), 32, 48).view(2, 16, 16)
    assert indices[0, 1, 3] == 17 * 32 + 3 and indices[1, 2, 4] == 2 * 48 * 32 + 18 * 48 + 36
    with pytest.raises(SRDEError, match="granularity=block with a base of hidden size 40 and feed-forward size 48"):
        select_support(config, (gate, up, down), **sizes | {"hidden": 40})


@pytest.mark.parametrize("scope", ["shared", "per_expert"])
@pytest.mark.parametrize(("density", "neurons"), [(0.01, 240), (0.05, 240), (0.1, 384), (1.0, 960)])
def test_random_blocks_touch_a_quarter_of_the_neurons_or_as_many_as_needed(
    density: float, neurons: int, scope: Any
) -> None:
    config = adapter_config(granularity="block", support_strategy="random", density=density, support_scope=scope)
    sizes: dict[str, int] = {"hidden": 576, "intermediate": 960}
    unread = torch.empty(0)
    support = select_support(config, (unread, unread, unread), seed=0, layer=0, **sizes)
    blocks = SupportBlocks.of(support, **sizes)
    assert len(blocks.neurons) == pytest.approx(touched_neurons(config, **sizes), rel=0.1)
    assert 0.6 * neurons < len(blocks.neurons) <= neurons
    rows = support.view(-1, support.shape[-1])
    assert all(len(row.unique()) == len(row) == round(density * 3 * 36 * 60) for row in rows)
    assert scope == "shared" or density == 1 or not torch.equal(rows[0], rows[1])
    in_down = (rows >= 2 * 36 * 60).float().mean()
    assert in_down == pytest.approx(1 / 3, abs=0.15)


def test_block_numbers_find_the_blocks_that_they_name() -> None:
    numbers = torch.arange(3 * 2 * 3)
    matrix, row, column = _located(numbers, 32, 48)
    neuron, other = torch.where(matrix < 2, row, column), torch.where(matrix < 2, column, row)
    assert torch.equal(block_numbers(matrix, neuron, other, 32, 48), numbers)


def test_squares_of_gradients_are_summed_by_block() -> None:
    scores = _SummedGradientScores(tiny_srde(granularity="block"), torch.device("cpu"))
    squares = {role: torch.rand(shape) for role, shape in zip(ROLES, [(96, 32), (96, 32), (32, 96)], strict=True)}
    for role in ("down", "gate", "up"):
        scores._add(1, role, squares[role])
    expected = magnitude_scores("block", *(squares[role].sqrt() for role in ROLES)).square()
    torch.testing.assert_close(scores._sums.row_of_layer[1], expected, rtol=1e-6, atol=0)
    assert not scores._sums.row_of_layer[0].any()


def test_best_entries_come_in_ascending_order() -> None:
    assert best_entries(torch.tensor([1.0, 3.0, 2.0, 2.0, 2.0, 5.0]), 4).tolist() == [1, 2, 3, 5]


def test_the_hash_sees_values_order_and_shape() -> None:
    a, b = torch.arange(4, dtype=torch.int32), torch.arange(1, 5, dtype=torch.int32)
    hashes = [support_hash(s) for s in ([a, b], [b, a], [a, a], [a.view(2, 2), b])]
    assert len(set(hashes)) == 4 and support_hash([a, b]) == hashes[0]
