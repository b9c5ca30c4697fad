"""The Triton kernels of the experts, run by Triton's interpreter, against the readable path."""

from __future__ import annotations

import os
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

os.environ["TRITON_INTERPRET"] = "1"  # read when a kernel is defined
pytest.importorskip("triton")

import triton.language as tl  # noqa: E402
from triton.runtime import interpreter  # noqa: E402

from srde_ds.model.fused import GELU_TANH, SILU, FusedExperts  # noqa: E402

TOKENS, WIDTH, EXPERTS, TOP_K = 5, 40, 4, 2
TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 4e-3}
ACT: dict[int, Any] = {SILU: F.silu, GELU_TANH: lambda x: F.gelu(x, approximate="tanh")}


@pytest.fixture(autouse=True)
def rounding(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton's interpreter cuts float32 values off to bfloat16, where a GPU rounds them."""
    original = interpreter.InterpreterBuilder.cast_impl

    def cast(self: Any, source: Any, target: Any) -> Any:
        if source.dtype.scalar == tl.float32 and target.scalar == tl.bfloat16:
            values = torch.from_numpy(np.array(source.data)).bfloat16()
            return interpreter.TensorHandle(values.view(torch.uint16).numpy(), tl.bfloat16)
        return original(self, source, target)

    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_fp_trunc", cast)


def readable(
    act: Any, gate: Tensor, up: Tensor, shift: Tensor, weights: Tensor, neurons_TKm: Tensor
) -> tuple[Tensor, Tensor]:
    hidden, parts = act(gate) * up, []
    for k in range(weights.shape[1]):
        own, p = neurons_TKm[:, k], weights[:, k, None]
        g, u = gate.gather(1, own), up.gather(1, own)
        h = act(g + shift[:, k, 0]) * (u + shift[:, k, 1])
        hidden = hidden.scatter_add(1, own, p * (h - act(g) * u))
        parts.append(p * h)
    return hidden, torch.stack(parts, 1)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("neurons", [1, 6])
@pytest.mark.parametrize("by_expert", [True, False])
@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("kind", [SILU, GELU_TANH])
def test_kernels_equal_the_readable_path(
    kind: int, shared: bool, by_expert: bool, neurons: int, dtype: torch.dtype
) -> None:
    """Values and all gradients, against the readable path in a wider dtype."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(dtype).requires_grad_()

    gate, up = random(TOKENS, WIDTH), random(TOKENS, WIDTH)
    shift = random(TOKENS, EXPERTS if by_expert else TOP_K, 2, neurons)
    index = torch.rand(TOKENS, EXPERTS, generator=generator).topk(TOP_K, dim=1).indices
    weights = torch.rand(TOKENS, TOP_K, generator=generator).to(dtype).requires_grad_()
    # Of twelve neurons, so that experts of one token share some.
    rows = torch.rand(EXPERTS, 12, generator=generator).topk(neurons, dim=1).indices.int()
    rows = rows[:1].expand(EXPERTS, -1) if shared else rows
    inputs = [gate, up, shift, weights]
    picked = index if by_expert else torch.arange(TOP_K).expand_as(index)
    slots = picked[:, :, None].expand(-1, -1, neurons)

    wide = [t.detach().to(torch.float64 if dtype == torch.float32 else torch.float32).requires_grad_() for t in inputs]
    own_shift = wide[2].gather(1, slots[:, :, None].expand(-1, -1, 2, -1))
    expected = readable(ACT[kind], wide[0], wide[1], own_shift, wide[3], rows[index].long())
    found = FusedExperts.apply(gate, up, shift, weights, index, rows[0] if shared else rows, (kind, by_expert))
    given = [torch.randn(t.shape, generator=generator).to(dtype) for t in expected]
    picked_results = (found[0], found[1].gather(1, slots))
    of_expected = torch.autograd.grad(expected, wide, [g.to(t) for g, t in zip(given, expected, strict=True)])
    of_found = torch.autograd.grad(picked_results, inputs, given)
    for ours, theirs in zip((*picked_results, *of_found), (*expected, *of_expected), strict=True):
        scale = float(theirs.detach().abs().max())
        torch.testing.assert_close(ours.to(theirs), theirs, rtol=0, atol=TOLERANCE[dtype] * scale)
    if by_expert:  # experts that a token does not use give nothing
        unused = torch.ones(TOKENS, EXPERTS, dtype=torch.bool).scatter(1, index, False)
        assert not found[1][unused].any() and not of_found[2][unused].any()


def test_shifts_of_zero_change_no_bit() -> None:
    gate, up = (torch.randn(TOKENS, WIDTH, dtype=torch.bfloat16) for _ in range(2))
    index, neurons = torch.tensor([[0, 1]] * TOKENS), torch.arange(3, 9).int()
    weights = torch.full((TOKENS, 2), 0.5, dtype=torch.bfloat16)
    hidden, _ = FusedExperts.apply(gate, up, gate.new_zeros(TOKENS, 2, 2, 6), weights, index, neurons, (SILU, False))
    assert torch.equal(hidden, F.silu(gate) * up)
