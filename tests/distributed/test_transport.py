"""Both transports against all experts on one rank: outputs, gradients, and the bytes that they move."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from srde_ds.config import Config, resolve
from srde_ds.distributed.expert_parallel import ExpertGroups, place_experts
from srde_ds.distributed.expert_traffic import transport_bytes
from srde_ds.distributed.transport import DeltaTransport, TokenTransport
from srde_ds.distributed.workload import Workload
from srde_ds.model.adapter import SRDEModel
from srde_ds.model.dispatch import ExpertDispatch, element_experts, neuron_experts
from srde_ds.model.policy import RoutingPolicy
from srde_ds.model.supports.blocks import SupportBlocks
from srde_ds.model.supports.selection import support_size, value_count
from tests.distributed.harness import Ranks
from tests.helpers import gradient_of, randomize, tiny_srde

TOKENS, HIDDEN, WIDTH, NEURONS = 6, 8, 10, 3
TRANSPORTS: dict[str, Callable[..., ExpertDispatch]] = {"tokens": TokenTransport, "deltas": DeltaTransport}
EXPERTS = 5  # does not divide by 2 or 3: the last slots are padding


def routing(kind: str, rank: int) -> tuple[Tensor, Tensor]:
    """Two experts of each token, `[T, 2]`, unevenly spread, and their weights."""
    generator = torch.Generator().manual_seed(rank)
    logits = torch.randn(TOKENS, EXPERTS, generator=generator, dtype=torch.float64)
    if kind == "one expert gets none":
        logits[:, 2] = -100
    values, chosen = logits.topk(2, dim=1)
    weights = values.softmax(1)
    if kind == "all to one expert":
        chosen, weights = torch.tensor([[1, 3]] * TOKENS), torch.tensor([[1.0, 0.0]] * TOKENS, dtype=torch.float64)
    if kind == "rank 0 routes nothing" and rank == 0:
        weights = torch.zeros_like(weights)
    return chosen, weights


def check(transport: str, granularity: str, shared: bool, kind: str) -> None:
    """On this rank: the transport's results equal those with all experts at hand."""
    group, rank, size = dist.group.WORLD, dist.get_rank(), dist.get_world_size()
    slots = -(-EXPERTS // size)
    generator = torch.Generator().manual_seed(99)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    width = NEURONS if granularity == "neuron" else WIDTH
    copies = 1 if shared or granularity != "neuron" else 2
    hidden, entries, size_of_support = HIDDEN, 3 * HIDDEN * WIDTH, 12
    if granularity == "block":
        hidden, entries, size_of_support = 16, 3 * 4, 5
    support: Any = torch.stack([torch.randperm(entries, generator=generator)[:size_of_support] for _ in range(EXPERTS)])
    support = support[0].int() if shared else support.int()
    shape = (EXPERTS, HIDDEN, 3, NEURONS) if granularity == "neuron" else (EXPERTS, 12)
    if granularity == "block":
        support, shape = SupportBlocks.of(support, hidden, 64), (EXPERTS, 5 * 256)
        width = len(support.neurons)
    tokens = [
        (random(TOKENS, hidden), random(TOKENS, copies, width), random(TOKENS, copies, width)) for _ in range(size)
    ]
    deltas = 0.3 * random(*shape)
    dispatch = TRANSPORTS[transport](group, EXPERTS)

    def run(deltas: Tensor, whose: int, local: bool) -> tuple[list[Tensor], list[Tensor]]:
        x, gate, up = (t.clone().requires_grad_() for t in tokens[whose])
        chosen, weights = routing(kind, whose)
        weights.requires_grad_()
        if granularity == "neuron":
            call: Any = neuron_experts if local else dispatch.neuron
            change, extra = call(F.silu, x, gate, up, chosen, weights, deltas.transpose(0, 1))
        else:
            call = element_experts if local else dispatch.element
            change, extra = call(F.silu, x, gate[:, 0], up[:, 0], chosen, weights, deltas, support)
        (change.square().sum() + extra.sin().sum()).backward()
        return [change.detach(), extra.detach()], [
            *map(gradient_of, (x, gate, up)),
            gradient_of(weights) * (weights != 0),
        ]

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
def ranks(request: pytest.FixtureRequest) -> Iterator[Ranks]:
    with Ranks(request.param) as group:
        yield group


@pytest.mark.parametrize("kind", ["uneven", "all to one expert", "rank 0 routes nothing", "one expert gets none"])
@pytest.mark.parametrize(
    "granularity, shared",
    [("neuron", True), ("neuron", False), ("block", True), ("block", False), ("element", True), ("element", False)],
)
@pytest.mark.parametrize("transport", ["tokens", "deltas"])
def test_transport_equals_local_experts(
    ranks: Ranks, transport: str, granularity: str, shared: bool, kind: str
) -> None:
    ranks(check, transport, granularity, shared, kind)


MASKS = (
    "forced, by token",
    "forced, all to one expert",
    "forced, none to the first rank's experts",
    "two locked",
    "all locked but one",
    "the first rank's experts locked",
)


def policy_of(kind: str, rank: int, size: int) -> RoutingPolicy:
    """What the curriculum does: each row's tokens to its domain's expert, or some experts locked."""
    first_ranks = -(-EXPERTS // size)  # experts of rank 0
    tokens = torch.arange(TOKENS)[None]
    forced = {
        "forced, by token": (tokens + rank) % (EXPERTS - 1),  # the last expert gets none
        "forced, all to one expert": torch.full_like(tokens, 1),
        "forced, none to the first rank's experts": torch.full_like(tokens, first_ranks) + tokens % 2,
    }
    locked = {
        "two locked": [0, 3],
        "all locked but one": [e for e in range(EXPERTS) if e != 2],
        "the first rank's experts locked": list(range(first_ranks)),
    }
    allowed = None
    if kind in locked:
        allowed = torch.ones(EXPERTS, dtype=torch.bool)
        allowed[locked[kind]] = False
    return RoutingPolicy(forced_experts=forced.get(kind), allowed_experts=allowed)


def check_masks(transport: str, granularity: str, kind: str) -> None:
    """On this rank: a layer whose experts are spread gives what one with all of them does."""
    group, rank, size = dist.group.WORLD, dist.get_rank(), dist.get_world_size()
    assert group is not None
    options: dict[str, Any] = {"granularity": granularity, "num_experts": EXPERTS, "dtype": torch.float64}
    whole = randomize(tiny_srde(**options)).train()
    spread = randomize(tiny_srde(**options)).train()
    place_experts(spread, ExpertGroups("all", group, group), transport)

    def run(model: SRDEModel, whose: int) -> list[Tensor]:
        """Output, and gradients of the input and of the router."""
        layer = model.layers[0]
        x = torch.randn(1, TOKENS, 32, generator=torch.Generator().manual_seed(whose), dtype=torch.float64)
        x.requires_grad_()
        layer.router.weight.grad = None
        with model.routing.running(policy_of(kind, whose, size)):
            output = layer(x)
        output.square().sum().backward()
        assert layer.router.weight.grad is not None and x.grad is not None
        return [output.detach(), x.grad, layer.router.weight.grad]

    expected = [run(whole, other) for other in range(size)][rank]
    for wanted, got in zip(expected, run(spread, rank), strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-6, atol=1e-6)
    expected_gradient, own = gradient_of(whole.layers[0].deltas.free), spread.layers[0].deltas.free
    cut: Any = vars(own)["srde_cut"]
    axis = cut.axis
    mine = gradient_of(own).narrow(axis, 0, cut.entries)
    torch.testing.assert_close(mine, expected_gradient.narrow(axis, cut.first, cut.entries), rtol=1e-5, atol=1e-5)
    assert not gradient_of(own).narrow(axis, cut.entries, own.shape[axis] - cut.entries).any()


@pytest.mark.parametrize("kind", MASKS)
@pytest.mark.parametrize("granularity", ["neuron", "element"])
@pytest.mark.parametrize("transport", ["tokens", "deltas"])
def test_forced_and_locked_experts(ranks: Ranks, transport: str, granularity: str, kind: str) -> None:
    ranks(check_masks, transport, granularity, kind)


def received_bytes(transport: str, granularity: str, config: Config, hidden: int, intermediate: int) -> int:
    """Bytes of values that this rank gets from others in a forward and a backward of one layer, evenly routed."""
    rank, size, experts = dist.get_rank(), dist.get_world_size(), config.adapter.num_experts
    tokens = config.training.batch_size * config.data.max_length
    received = []

    def count(original: Callable[..., Any], remote: Callable[..., int]) -> Callable[..., Any]:
        def counted(output: Tensor, given: Tensor, *args: Any, **kwargs: Any) -> Any:
            if output.is_floating_point():  # not the counts of rows, a few integers
                received.append(remote(output, given, *args) * output.element_size())
            return original(output, given, *args, **kwargs)

        return counted

    def own_splits(output: Tensor, given: Tensor, receive: list[int], send: list[int]) -> int:
        return (sum(receive) - receive[rank]) * output.shape[1]

    remote_part = {
        "all_gather_into_tensor": lambda output, given, *_: output.numel() - given.numel(),
        "reduce_scatter_tensor": lambda output, given, *_: given.numel() - output.numel(),
        "all_to_all_single": own_splits,
    }
    top_k = config.adapter.top_k
    chosen = (torch.arange(tokens)[:, None] + torch.arange(top_k)) % experts
    weights = torch.full((tokens, top_k), 1 / top_k)
    dispatch = TRANSPORTS[transport](dist.group.WORLD, experts)
    x = torch.randn(tokens, hidden, requires_grad=True)
    with ExitStack() as stack:
        for name, remote in remote_part.items():
            stack.enter_context(patch.object(dist, name, count(getattr(dist, name), remote)))
        if granularity == "neuron":
            neurons = support_size(config.adapter, hidden, intermediate)
            gate, up = (torch.randn(tokens, 1, neurons, requires_grad=True) for _ in range(2))
            x = x[:, : hidden // config.adapter.neuron_parts]
            deltas = torch.randn(x.shape[1], experts // size, 3, neurons, requires_grad=True)
            change, extra = dispatch.neuron(F.silu, x, gate, up, chosen, weights, deltas)
        else:
            gate, up = (torch.randn(tokens, intermediate, requires_grad=True) for _ in range(2))
            entries = value_count(config.adapter, hidden, intermediate)
            deltas = torch.randn(experts // size, entries, requires_grad=True)
            change, extra = dispatch.element(F.silu, x, gate, up, chosen, weights, deltas, torch.arange(entries).int())
        (change.sum() + extra.sum()).backward()
    return sum(received)


@pytest.mark.parametrize(("granularity", "parts"), [("neuron", 1), ("neuron", 4), ("element", 1)])
@pytest.mark.parametrize("transport", ["tokens", "deltas"])
def test_cost_model_equals_counted_bytes(ranks: Ranks, transport: str, granularity: str, parts: int) -> None:
    hidden, intermediate, size = 16, 48, ranks.world_size
    flags = {
        "num_experts": 6,
        "density": 0.1,
        "granularity": granularity,
        "neuron_parts": parts,
        "use_muon": False,
        "bf16": False,
        "max_length": 24,
        "gradient_accumulation_steps": 1,
        "expert_parallel_size": size,
    }
    config = resolve({}, flags)
    # The second of two equal layers: the first one's tokens need no gradient.
    work = Workload.of(config, size)
    one, two = (transport_bytes(work, [(hidden, intermediate)] * count)[transport] for count in (1, 2))
    expected = two - one
    assert ranks(received_bytes, transport, granularity, config, hidden, intermediate) == [expected] * size
