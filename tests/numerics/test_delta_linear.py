"""Products with sparse matrices against the dense ones, and what is kept of them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from srde_ds.model import products
from srde_ds.model.delta_linear import DeltaLinear, DenseDeltas, Entries, SparseDeltas, SparseLinear, element_deltas
from tests.helpers import gradient_of, randomize, tiny_llama, tiny_srde, tokens

ROWS, COLUMNS, TOKENS = 7, 5, 3
SIZE = ROWS * COLUMNS


SUPPORTS = [
    [0, SIZE - 1, SIZE, 2 * SIZE - 1, 2 * SIZE, 3 * SIZE - 1],  # the first and last entry of each matrix
    [3, 4, 2 * SIZE + 6],  # nothing of the second
    [SIZE + 30, SIZE + 2],  # in no order
]


@pytest.mark.parametrize("begin", [0, SIZE, 2 * SIZE])
@pytest.mark.parametrize("support", SUPPORTS)
@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("count", [0, TOKENS])
def test_product_and_gradients_are_those_of_the_dense_matrix(
    begin: int, support: list[int], sparse: bool, count: int
) -> None:
    torch.manual_seed(0)
    index = torch.tensor(support, dtype=torch.int32)
    x = torch.randn(count, COLUMNS, dtype=torch.float64, requires_grad=True)
    values = torch.randn(len(support), dtype=torch.float64, requires_grad=True)
    weight = torch.zeros(3 * SIZE, dtype=torch.float64).scatter(0, index.long(), values)
    expected = F.linear(x, weight[begin : begin + SIZE].view(ROWS, COLUMNS))
    if sparse:
        found = SparseLinear.apply(x, values, Entries(index, begin, ROWS, COLUMNS))
    else:
        found = DeltaLinear.apply(x, values, index, begin, ROWS)
    torch.testing.assert_close(found, expected)
    back = torch.randn_like(expected)
    for mine, theirs in zip(*(torch.autograd.grad(y, (x, values), back) for y in (found, expected)), strict=True):
        torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sparse_and_dense_deltas_round_alike(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    hidden, intermediate, tokens = 48, 64, 33
    support = torch.randperm(3 * hidden * intermediate)[:400].sort().values.int()
    x, h = (torch.randn(tokens, width, dtype=dtype, requires_grad=True) for width in (hidden, intermediate))
    values = torch.randn(len(support), dtype=dtype, requires_grad=True)
    results = []
    for way in (SparseDeltas, DenseDeltas):
        deltas = way(support, hidden, intermediate)
        gate, up = deltas.into(x, values)
        loss = gate.square().sum() + (up * h).sum() + deltas.back(h, values).square().sum()
        results.append((gate, up, *torch.autograd.grad(loss, (x, h, values))))
    for sparse, dense in zip(*results, strict=True):
        scale = dense.float().norm()
        assert (sparse.float() - dense.float()).norm() < {torch.float32: 1e-6, torch.bfloat16: 8e-3}[dtype] * scale


def test_entries_alone_on_a_cpu_and_dense_matrices_elsewhere() -> None:
    support = torch.tensor([1, SIZE + 2], dtype=torch.int32)
    assert isinstance(element_deltas(support, COLUMNS, ROWS), SparseDeltas)
    assert isinstance(element_deltas(support.to("meta"), COLUMNS, ROWS), DenseDeltas)


def test_nothing_dense_is_kept_for_the_backward() -> None:
    kept: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    x, values = torch.randn(TOKENS, COLUMNS, requires_grad=True), torch.randn(2, requires_grad=True)
    support = torch.tensor([1, 2], dtype=torch.int32)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        DeltaLinear.apply(x, values, support, 0, ROWS)
    assert sorted(t.untyped_storage().nbytes() for t in kept) == sorted(4 * t.numel() for t in (x, values, support))


@pytest.mark.parametrize(
    "form",
    [
        {"granularity": "neuron"},
        {"granularity": "neuron", "shared_expert_density": 0.1},
        {"granularity": "element"},
        {"granularity": "block", "density": 0.25},
    ],
)
@pytest.mark.parametrize("grouped", [False, True])
def test_experts_train_under_autocast(form: dict[str, Any], grouped: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    base = tiny_llama(hidden_size=32, intermediate_size=64)
    model = randomize(tiny_srde(base=base, **form)).train()
    if grouped:
        monkeypatch.setitem(products.GROUPING, ("cpu", torch.bfloat16), products.GroupingOverhead(-99, 0, 0))
    grads = []
    for enabled in (True, False):
        model.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            logits = model(tokens()).logits
        logits.float().logsumexp(-1).mean().backward()
        grads.append(torch.cat([gradient_of(p).flatten() for _, p in model.trainable_parameters()]))
    assert F.cosine_similarity(grads[0], grads[1], dim=0) > 0.95
