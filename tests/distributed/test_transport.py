"""Both transports against all experts on one rank: outputs, and gradients of tokens, routing weights and deltas."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from srde_ds.model.dispatch import element_experts, neuron_experts
from srde_ds.parallel.transport import DeltaTransport, TokenTransport
from tests.distributed.harness import Ranks

TOKENS, HIDDEN, WIDTH, NEURONS = 6, 8, 10, 3
EXPERTS = 5  # does not divide by 2 or 3: the last slots are padding


def routing(kind: str, rank: int) -> Tensor:
    """[T, E] weights of two experts a token, unevenly spread."""
    generator = torch.Generator().manual_seed(rank)
    logits = torch.randn(TOKENS, EXPERTS, generator=generator, dtype=torch.float64)
    if kind == "all to one expert":
        weights = torch.zeros_like(logits)
        weights[:, 1] = 1.0
        return weights
    if kind == "rank 0 routes nothing" and rank == 0:
        return torch.zeros_like(logits)
    if kind == "one expert gets none":
        logits[:, 2] = -100
    values, chosen = logits.topk(2, dim=1)
    return torch.zeros_like(logits).scatter(1, chosen, values.softmax(1))


def check(transport: str, granularity: str, shared: bool, kind: str) -> None:
    """On this rank: the transport's results equal those with all experts at hand."""
    group, rank, size = dist.group.WORLD, dist.get_rank(), dist.get_world_size()
    slots = -(-EXPERTS // size)
    generator = torch.Generator().manual_seed(99)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    width = NEURONS if granularity == "neuron" else WIDTH
    copies = 1 if shared or granularity == "element" else EXPERTS
    tokens = [
        (random(TOKENS, HIDDEN), random(TOKENS, copies, width), random(TOKENS, copies, width)) for _ in range(size)
    ]
    shape = (EXPERTS, HIDDEN, 3, NEURONS) if granularity == "neuron" else (EXPERTS, 12)
    deltas = 0.3 * random(*shape)
    entries = 3 * HIDDEN * WIDTH
    support = torch.stack([torch.randperm(entries, generator=generator)[:12] for _ in range(EXPERTS)]).int()
    support = support[0] if shared else support
    dispatch = {"tokens": TokenTransport, "deltas": DeltaTransport}[transport](group, EXPERTS)

    def run(deltas: Tensor, whose: int, local: bool) -> tuple[list[Tensor], list[Tensor]]:
        x, gate, up = (t.clone().requires_grad_() for t in tokens[whose])
        weights = routing(kind, whose).requires_grad_()
        if granularity == "neuron":
            call = neuron_experts if local else dispatch.neuron
            change, extra = call(F.silu, x, gate, up, weights, deltas.transpose(0, 1))
        else:
            call = element_experts if local else dispatch.element
            change, extra = call(F.silu, x, gate[:, 0], up[:, 0], weights, deltas, support)
        (change.square().sum() + extra.sin().sum()).backward()
        return [change.detach(), extra.detach()], [x.grad, gate.grad, up.grad, weights.grad * (weights != 0)]

    whole = deltas.clone().requires_grad_()
    expected = [run(whole, other, local=True) for other in range(size)][rank]

    first = rank * slots
    own = torch.zeros(slots, *shape[1:], dtype=torch.float64)
    real = max(0, min(slots, EXPERTS - first))
    own[:real] = deltas[first : first + real]
    own.requires_grad_()
    found = run(own, rank, local=False)
    for wanted, got in zip(expected[0] + expected[1], found[0] + found[1], strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-6, atol=1e-6)
    assert own.grad is not None and whole.grad is not None
    # The delta transport sums gradients in fp32.
    torch.testing.assert_close(own.grad[:real], whole.grad[first : first + real], rtol=1e-5, atol=1e-5)
    assert not own.grad[real:].any()


@pytest.fixture(scope="module", params=[2, 3])
def ranks(request: pytest.FixtureRequest):
    with Ranks(request.param) as group:
        yield group


@pytest.mark.parametrize("kind", ["uneven", "all to one expert", "rank 0 routes nothing", "one expert gets none"])
@pytest.mark.parametrize(
    "granularity, shared", [("neuron", True), ("neuron", False), ("element", True), ("element", False)]
)
@pytest.mark.parametrize("transport", ["tokens", "deltas"])
def test_transport_equals_local_experts(
    ranks: Ranks, transport: str, granularity: str, shared: bool, kind: str
) -> None:
    ranks(check, transport, granularity, shared, kind)
