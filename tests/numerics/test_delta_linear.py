"""Products with sparse matrices against the dense ones, and what is kept of them."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from srde_ds.model.delta_linear import DeltaLinear
from tests.helpers import gradient_of, randomize, tiny_srde, tokens

ROWS, COLUMNS, TOKENS = 7, 5, 3
SIZE = ROWS * COLUMNS


@pytest.mark.parametrize("begin", [0, SIZE, 2 * SIZE])
@pytest.mark.parametrize(
    "support",
    [
        [0, SIZE - 1, SIZE, 2 * SIZE - 1, 2 * SIZE, 3 * SIZE - 1],  # the first and last entry of each matrix
        [3, 4, 2 * SIZE + 6],  # nothing of the second
        [SIZE + 30, SIZE + 2],  # in no order
    ],
)
def test_product_and_gradients_are_those_of_the_dense_matrix(begin: int, support: list[int]) -> None:
    torch.manual_seed(0)
    index = torch.tensor(support, dtype=torch.int32)
    x = torch.randn(TOKENS, COLUMNS, dtype=torch.float64, requires_grad=True)
    values = torch.randn(len(support), dtype=torch.float64, requires_grad=True)
    weight = torch.zeros(3 * SIZE, dtype=torch.float64).scatter(0, index.long(), values)
    expected = F.linear(x, weight[begin : begin + SIZE].view(ROWS, COLUMNS))
    found = DeltaLinear.apply(x, values, index, begin, ROWS)
    torch.testing.assert_close(found, expected)
    back = torch.randn_like(expected)
    for mine, theirs in zip(*(torch.autograd.grad(y, (x, values), back) for y in (found, expected)), strict=True):
        torch.testing.assert_close(mine, theirs)


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


@pytest.mark.parametrize("granularity", ["neuron", "element"])
def test_experts_train_under_autocast(granularity: str) -> None:
    model = randomize(tiny_srde(granularity=granularity)).train()
    grads = []
    for enabled in (True, False):
        model.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            logits = model(tokens()).logits
        logits.float().logsumexp(-1).mean().backward()
        grads.append(torch.cat([gradient_of(p).flatten() for _, p in model.trainable_parameters()]))
    assert F.cosine_similarity(grads[0], grads[1], dim=0) > 0.95
