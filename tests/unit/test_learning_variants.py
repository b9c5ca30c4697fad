"""The patches of benchmarks/learning/variants.py: each changes what its name says, alone, and only inside."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from benchmarks.learning.plan import Plan
from benchmarks.learning.variants import VARIANTS, neurons_by_depth, patched, rate_of_down
from srde_ds.config import AdapterConfig
from srde_ds.errors import SRDEError
from srde_ds.model.adapter import SRDEModel, add_experts
from srde_ds.optim.gram_muon import GramMuonAdamW
from srde_ds.optim.shards import MatrixShard
from tests.helpers import tiny_llama

CONFIG = AdapterConfig(num_experts=3, density=0.1)
NAMES = ["math", "logic", "code"]


def model(layers: int = 2) -> SRDEModel:
    return add_experts(tiny_llama(num_hidden_layers=layers), CONFIG, expert_names=NAMES, seed=0)


def test_the_rows_of_the_suite_are_the_variants() -> None:
    plan = Plan("small", lambda run: None)
    rows = [row for row in plan.rows.values() if row.variant]
    assert {row.variant for row in rows} == VARIANTS.keys()
    runs = [plan.example(row) for row in rows]
    assert [run.flags["variant"] for run in runs] == [row.variant for row in rows]
    assert len({run.key("") for run in runs}) == len(rows)


def test_an_unknown_variant_is_refused() -> None:
    with pytest.raises(SRDEError, match="variant=upper third: must be one of lower half"):
        patched("upper third")


@pytest.mark.parametrize("name", ["lower half", "upper half", "falling with depth", "rising with depth"])
def test_neurons_by_depth_keep_their_sum(name: str) -> None:
    with patched(name):
        sizes = [layer.support.shape[-1] for layer in model(30).layers]
    assert sum(sizes) == 30 * 15 and len(set(sizes)) > 1
    assert (sizes[0] > sizes[-1]) == (name in ("lower half", "falling with depth"))


def test_neurons_by_depth_are_saved_and_loaded(tmp_path: Path) -> None:
    with neurons_by_depth([3, 9]):
        saved = model()
        for layer in saved.layers:
            layer.deltas.free.data.normal_()
        saved.save_pretrained(tmp_path)
        loaded = SRDEModel.from_pretrained(tiny_llama(), tmp_path)
        with pytest.raises(SRDEError, match="layer 2: this variant is made for a base of 2 layers"):
            model(3)
    assert [layer.support.shape for layer in loaded.layers] == [(3,), (9,)]
    for one, other in zip(saved.layers, loaded.layers, strict=True):
        assert torch.equal(one.support, other.support) and torch.equal(one.deltas.free, other.deltas.free)
    assert len({layer.support.shape for layer in model().layers}) == 1  # outside nothing is changed


def test_a_temperature_divides_the_logits() -> None:
    router = model().layers[0].router
    x_TD = torch.randn(5, router.weight.shape[1], generator=torch.Generator().manual_seed(0))
    logits_TE = router(x_TD)
    for temperature, value in (("1/4", 0.25), ("1/2", 0.5), ("2", 2.0), ("4", 4.0)):
        with patched(f"router temperature {temperature}"):
            assert torch.equal(router(x_TD), logits_TE / value)
    assert torch.equal(router(x_TD), logits_TE)


def step(piece: MatrixShard, gradient: torch.Tensor) -> torch.Tensor:
    """What one update adds to a flat parameter that holds this piece."""
    flat = torch.nn.Parameter(torch.zeros(gradient.numel()))
    optimizer = GramMuonAdamW([{"params": [flat], "rule": "muon", "lr": 1.0, "name": "deltas"}])
    optimizer.register_layout(flat, [piece], None)
    optimizer.param_groups[0]["step"] = 1
    flat.grad = gradient.flatten()
    optimizer.step()
    return flat.detach().view_as(gradient)


def test_the_rate_of_down_is_that_of_every_third_matrix() -> None:
    rows, experts, neurons = 12, 2, 4
    gradient = torch.randn(rows, 3 * experts, neurons, generator=torch.Generator().manual_seed(0))
    piece = MatrixShard("free", 0, rows, 3 * experts, neurons, rows)
    plain = step(piece, gradient)
    with rate_of_down(3.0):
        changed = step(piece, gradient)
    factors = torch.tensor([1.0, 1.0, 3.0] * experts)[:, None]
    assert torch.allclose(changed, plain * factors, rtol=1e-5, atol=1e-7)


def test_one_matrix_an_expert_orthogonalises_its_projections_together() -> None:
    rows, experts, neurons = 24, 2, 3
    gradient = torch.randn(rows, 3 * experts, neurons, generator=torch.Generator().manual_seed(0))
    with patched("one matrix an expert"):
        changed = step(MatrixShard("free", 0, rows, 3 * experts, neurons, rows, 0, 3 * experts), gradient)
    joined = gradient.reshape(rows, experts, 3 * neurons)
    assert torch.equal(changed.reshape(joined.shape), step(MatrixShard("free", 0, rows, experts, 9, rows), joined))
    assert not torch.allclose(
        changed, step(MatrixShard("free", 0, rows, 3 * experts, neurons, rows), gradient), atol=1e-2
    )


def test_random_first_deltas_are_small_and_differ_between_experts() -> None:
    with patched("random first deltas"):
        first = model().layers[0].deltas.free.detach()
    assert 0.001 < float(first.std()) < 0.003
    assert not torch.equal(first[:, :3], first[:, 3:6])
    assert float(model().layers[0].deltas.free.detach().abs().max()) == 0
