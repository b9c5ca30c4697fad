"""The Triton kernels of the experts, run by Triton's interpreter, against the readable path."""

from __future__ import annotations

import os
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("there is a GPU: tests/gpu runs the kernels", allow_module_level=True)
pytest.importorskip("triton", minversion="3.9")  # extra `kernels`; older interpreters fail on a new numpy

import triton.language as tl
from triton.runtime import interpreter

from srde_ds.distributed.engine import warn_of_idle_kernels
from srde_ds.model import fused
from srde_ds.model.dispatch import LocalDispatch
from srde_ds.model.fused import GELU_TANH, SILU, FusedExperts, fused_activation
from srde_ds.model.products import GROUPING, GroupingOverhead
from tests.helpers import gradient_of, randomize, tiny_llama, tiny_srde

TOKENS, WIDTH, EXPERTS, TOP_K = 3, 40, 4, 2
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
    act: Any, gate: Tensor, up: Tensor, shift: Tensor, weights: Tensor, neurons_TKm: Tensor, dense: Tensor
) -> tuple[Tensor, Tensor]:
    hidden, parts = act(gate) * up, []
    hidden = hidden + (dense - hidden).detach()  # the base's own, rounded as it rounds them
    for k in range(weights.shape[1]):
        own, p = neurons_TKm[:, k], weights[:, k, None]
        g, u = gate.gather(1, own), up.gather(1, own)
        h = act(g + shift[:, k, 0]) * (u + shift[:, k, 1])
        hidden = hidden.scatter_add(1, own, p * (h - act(g) * u))
        parts.append(p * h)
    return hidden, torch.stack(parts, 1)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("by_expert", [True, False])
@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize(("kind", "neurons"), [(SILU, 6), (SILU, 1), (GELU_TANH, 6)])
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
    weights = torch.rand(TOKENS, TOP_K, generator=generator).requires_grad_()  # in fp32, as the router makes them
    # Of twelve neurons, so that experts of one token share some.
    rows = torch.rand(EXPERTS, 12, generator=generator).topk(neurons, dim=1).indices.int()
    rows = rows[:1].expand(EXPERTS, -1) if shared else rows
    inputs = [gate, up, shift, weights]
    picked = index if by_expert else torch.arange(TOP_K).expand_as(index)
    slots = picked[:, :, None].expand(-1, -1, neurons)

    wide = [t.detach().to(torch.float64 if dtype == torch.float32 else torch.float32).requires_grad_() for t in inputs]
    own_shift = wide[2].gather(1, slots[:, :, None].expand(-1, -1, 2, -1))
    dense = (ACT[kind](gate) * up).detach().to(wide[0])
    expected = readable(ACT[kind], wide[0], wide[1], own_shift, wide[3], rows[index].long(), dense)
    found = FusedExperts.apply(gate, up, shift, weights, index, rows[0] if shared else rows, (kind, by_expert))
    given = [torch.randn(t.shape, generator=generator).to(dtype) for t in expected]
    picked_results = (found[0], found[1].gather(1, slots))
    of_expected = torch.autograd.grad(expected, wide, [g.to(t) for g, t in zip(given, expected, strict=True)])
    of_found = torch.autograd.grad(picked_results, inputs, given)
    # Gradients at neurons of several experts are rounded once for each.
    tolerance = TOLERANCE[dtype] * (1 if shared or dtype == torch.float32 else 2)
    for ours, theirs in zip((*picked_results, *of_found), (*expected, *of_expected), strict=True):
        scale = float(theirs.detach().abs().max())
        torch.testing.assert_close(ours.to(theirs), theirs, rtol=0, atol=tolerance * scale)
    if by_expert:  # experts that a token does not use give nothing
        unused = torch.ones(TOKENS, EXPERTS, dtype=torch.bool).scatter(1, index, False)
        assert not found[1][unused].any() and not of_found[2][unused].any()


def test_shifts_of_zero_change_no_bit() -> None:
    gate, up = (torch.randn(TOKENS, WIDTH, dtype=torch.bfloat16) for _ in range(2))
    index, neurons = torch.tensor([[0, 1]] * TOKENS), torch.arange(3, 9).int()
    weights = torch.full((TOKENS, 2), 0.5, dtype=torch.bfloat16)
    hidden, _ = FusedExperts.apply(gate, up, gate.new_zeros(TOKENS, 2, 2, 6), weights, index, neurons, (SILU, False))
    assert torch.equal(hidden, F.silu(gate) * up)


@pytest.mark.parametrize("way", ["joint", "grouped"])
@pytest.mark.parametrize(
    "form", [{}, {"neuron_parts": 4}, {"support_scope": "per_expert", "support_strategy": "random"}]
)
def test_a_layer_on_kernels_equals_the_readable_one(form: dict[str, Any], way: str) -> None:
    """Output and all gradients, with each of both products."""
    model = randomize(tiny_srde(num_experts=8, **form))
    layer, x = model.layers[0], torch.randn(2, 4, 32, generator=torch.Generator().manual_seed(3))
    overhead = GroupingOverhead(10**9 if way == "joint" else -(10**9), 0, 0)
    results = []
    for devices in (set(), {"cpu"}):
        own = x.clone().requires_grad_()
        layer.dispatch = LocalDispatch(kernels=True)
        model.zero_grad()
        with (
            patch.object(fused, "KERNEL_DEVICES", devices),
            patch.dict(GROUPING, {("cpu", torch.float32): overhead}),
            patch.object(FusedExperts, "apply", wraps=FusedExperts.apply) as calls,
        ):
            y = layer(own)
            y.sin().sum().backward()
        assert calls.call_count == len(devices)
        gradients = {name: gradient_of(p).clone() for name, p in layer.named_parameters() if p.requires_grad}
        results.append({"y": y.detach(), "x": gradient_of(own)} | gradients)
    for name, expected in results[0].items():
        scale = float(expected.abs().max())
        torch.testing.assert_close(results[1][name], expected, rtol=0, atol=2e-6 * scale, msg=name)


def test_what_the_kernels_do_not_know_is_left_to_the_readable_path() -> None:
    gate = torch.zeros(1, 4)
    with patch.object(fused, "KERNEL_DEVICES", {"cpu"}):
        assert fused_activation(torch.nn.SiLU(), gate, 4) == SILU
        assert fused_activation(torch.nn.GELU(approximate="tanh"), gate, 4) == GELU_TANH
        assert fused_activation(torch.nn.GELU(), gate, 4) is None
        assert fused_activation(torch.nn.SiLU(), gate.double(), 4) is None
        assert fused_activation(torch.nn.SiLU(), gate, 5000) is None
        assert fused_activation(F.silu, gate, 4) == SILU
    assert fused_activation(torch.nn.SiLU(), gate, 4) is None  # no GPU


def test_kernels_that_cannot_be_used_are_reported(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fused, "HAS_TRITON", True)
    warn_of_idle_kernels(tiny_srde())
    assert not caplog.messages
    warn_of_idle_kernels(tiny_srde(base=tiny_llama(hidden_act="gelu")))
    warn_of_idle_kernels(tiny_srde(base=tiny_llama(intermediate_size=1200, num_hidden_layers=1), density=0.9))
    monkeypatch.setattr(fused, "HAS_TRITON", False)
    warn_of_idle_kernels(tiny_srde())
    reasons = (
        "the base's activation is GELUActivation(), and the kernels know SiLU and tanh-GELU",
        "an expert has 1,080 neurons, and the kernels take at most 1,024",
        "the package triton is missing",
    )
    assert caplog.messages == [
        f"expert_kernels=true has no effect: {reason}. The experts are computed without them." for reason in reasons
    ]
