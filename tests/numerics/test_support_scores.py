"""Learned supports: the mask, its gradient, its noise, and that it finds what is worth keeping."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from srde_ds.config import AdapterConfig
from srde_ds.errors import SRDEError
from srde_ds.model.adapter import SRDEModel
from srde_ds.model.deltas import DeltaBank, Storage, build_deltas
from srde_ds.model.policy import AuxiliaryWeights, RoutingPolicy
from srde_ds.model.supports.learned import OverlapLoss, RelaxedTopK, SupportGate, kept_entries
from srde_ds.model.supports.selection import check_support, select_support
from tests.helpers import adapter_config, gradient_of, randomize, tiny_srde, tokens

D, E, C, KEEP = 4, 3, 150, 70  # for blocks of 64: two whole ones and one of 22
FORMS = [
    {"granularity": granularity, "support_scope": scope, "num_atoms": atoms}
    for granularity, scope, atoms in itertools.product(("neuron", "element"), ("shared", "per_expert"), (0, 2))
    if not (scope == "per_expert" and atoms)
]


def bank_of(*, dtype: torch.dtype = torch.float64, seed: int = 0, layer: int = 0, **form: Any) -> DeltaBank:
    """Random deltas and scores."""
    config = adapter_config(num_experts=E, support_strategy="learned", **form)
    storage = Storage(dtype, torch.device("cpu"))
    bank = build_deltas(config, hidden=D, size=C, seed=seed, layer=layer, storage=storage, keep=KEEP)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in bank.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return bank


def mask_by_hand(scores: list[float], block: int) -> list[bool]:
    """Entry by entry: best score first, the lower index among equal ones, until KEEP are kept."""
    order = sorted(range(C), key=lambda entry: (-scores[entry // block], entry))
    return [entry in set(order[:KEEP]) for entry in range(C)]


@pytest.mark.parametrize("block", [1, 64, 200])
@pytest.mark.parametrize("ties", [False, True])
def test_the_mask_keeps_the_best_entries_and_exactly_so_many(block: int, ties: bool) -> None:
    blocks = math.ceil(C / block)
    scores = torch.randn(4, blocks, generator=torch.Generator().manual_seed(2))
    if ties:
        scores = scores.round()
    kept = kept_entries(scores, entries=C, keep=KEEP, group=block)
    assert kept.tolist() == [mask_by_hand(row, block) for row in scores.tolist()]
    assert kept.sum(1).tolist() == [KEEP] * 4


@pytest.mark.parametrize("form", FORMS)
def test_the_straight_through_gradient_follows_its_formula(form: dict[str, Any]) -> None:
    """With g the sum of gradient * delta over a block's entries and w = s (1 - s) of the relaxed mask s:
    d/d score = w (g - sum w g / sum w) / temperature; d/d delta = gradient * mask."""
    bank, temperature, step = bank_of(**form), 0.7, 5
    assert bank.gate is not None
    block = 1 if form["granularity"] == "neuron" else 64
    values = bank.values().detach()
    gradient = torch.randn(values.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    bank(temperature=temperature, step=step).backward(gradient)
    noisy = bank.scores.detach() + temperature * bank.gate._gumbel(bank.scores, step)
    expected = torch.zeros_like(bank.scores)
    slope = torch.zeros_like(bank.scores)
    hard = torch.zeros(E, C, dtype=torch.float64)
    for expert in range(E):
        row = expert if form["support_scope"] == "per_expert" else 0
        mask = mask_by_hand(noisy[row].tolist(), block)
        hard[expert] = torch.tensor(mask)
        kept = {entry // block for entry in range(C) if mask[entry]}
        rest = [noisy[row, b] for b in range(noisy.shape[1]) if b not in kept]
        threshold = (min(noisy[row, b] for b in kept) + max(rest)) / 2
        for entry in range(C):
            soft = 1 / (1 + math.exp(-(noisy[row, entry // block] - threshold) / temperature))
            where = (slice(None), expert, slice(None), entry) if block == 1 else (expert, entry)
            product = (gradient[where] * values[where]).sum()
            slope[row, entry // block] = soft * (1 - soft)
            expected[row, entry // block] += product
    expected -= (slope * expected).sum(1, keepdim=True) / slope.sum(1, keepdim=True)
    expected *= slope / temperature
    assert bank.scores.grad is not None and expected.abs().min() > 0
    torch.testing.assert_close(bank.scores.grad, expected, rtol=1e-9, atol=1e-9)
    if form["num_atoms"] == 0:
        free = next(p for name, p in bank.named_parameters() if name == "free")
        masked = gradient * (hard[:, None] if block == 1 else hard)
        assert torch.equal(gradient_of(free), masked.flatten(1, 2) if block == 1 else masked)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("form", FORMS)
def test_effective_deltas_are_whole_or_zero(form: dict[str, Any], dtype: torch.dtype) -> None:
    bank = bank_of(dtype=dtype, **form)
    for options in ({}, {"temperature": 0.3, "step": 2}):
        deltas, values = bank(**options), bank.values()
        assert deltas.dtype == dtype
        assert ((deltas == values) | (deltas == 0)).all()
        entries = (deltas != 0).any(0).any(1) if deltas.dim() == 4 else deltas != 0
        assert (entries.sum(1) <= KEEP).all() and (entries.sum(1) > KEEP - 3).all()  # a value may be zero by itself


def test_noise_is_a_gumbel_draw() -> None:
    """One of four: with the probabilities of a softmax of scores / temperature; two: without replacement."""
    scores, temperature, draws = torch.tensor([[1.0, 0.0, -0.5, 0.5]]), 0.8, 1500
    p = (scores[0] / temperature).softmax(0)
    second = p + torch.tensor([sum(float(p[j] * p[i] / (1 - p[j])) for j in range(4) if j != i) for i in range(4)])
    for keep, expected in ((1, p), (2, second)):
        gate = SupportGate(entries=4, keep=keep, group=1, seed=0, layer=0)
        kept = sum(gate.sample(scores, temperature=temperature, step=step)[0] for step in range(draws)) / draws
        assert (kept - expected).abs().max() < 4 * math.sqrt(0.25 / draws)


def test_noise_depends_on_seed_layer_and_step_alone() -> None:
    form: dict[str, Any] = {"granularity": "neuron", "support_scope": "per_expert"}
    options: dict[str, Any] = {"temperature": 5.0, "step": 3}
    first = bank_of(**form)(**options)
    assert torch.equal(first, bank_of(**form)(**options))
    bank = bank_of(**form)
    bank(temperature=5.0, step=4)
    assert torch.equal(first, bank(**options)), "what was drawn before does not matter"
    others = [bank_of(seed=1, **form)(**options), bank_of(layer=1, **form)(**options), bank(temperature=5.0, step=4)]
    assert all(not torch.equal(first, other) for other in others)
    masks = (first != 0).any(0).any(1)
    assert not torch.equal(masks[0], masks[1]), "each expert has its own noise"


def test_a_bank_with_some_of_the_experts_uses_their_rows() -> None:
    """Experts 2 and, as padding, one behind the last, as on the second of two ranks."""
    whole, part = (bank_of(granularity="neuron", support_scope="per_expert") for _ in range(2))
    free = dict(part.named_parameters())["free"].detach()
    part.free = torch.nn.Parameter(torch.cat([free[:, 6:9], torch.zeros_like(free[:, 6:9])], dim=1))
    part.first_expert = 2
    for options in ({}, {"temperature": 1.0, "step": 0}):
        assert torch.equal(part(**options)[:, 0], whole(**options)[:, 2])
        assert not part(**options)[:, 1].any()


@pytest.mark.parametrize(("scope", "granularity"), itertools.product(("shared", "per_expert"), ("neuron", "element")))
def test_noise_is_drawn_in_training_alone(scope: str, granularity: str) -> None:
    model = learning(granularity=granularity, support_scope=scope)

    def logits(step: int, temperature: float | None = 5.0) -> Tensor:
        policy = RoutingPolicy(support_temperature=temperature, noise_step=step)
        logits: Tensor = model(tokens(), policy=policy).logits
        return logits.detach()

    model.eval()
    assert torch.equal(logits(0), logits(1))
    without_noise = logits(0)
    model.train()
    assert torch.equal(logits(0), logits(0))
    assert not torch.equal(logits(0), logits(1)) and not torch.equal(logits(0), without_noise)
    assert torch.equal(logits(0, temperature=None), without_noise)


def learning(*, dtype: torch.dtype = torch.float32, **options: Any) -> SRDEModel:
    """Three experts, five of twelve candidates."""
    form: dict[str, Any] = {"support_strategy": "learned", "density": 12 / 96, "target_density": 5 / 96} | options
    return randomize(tiny_srde(dtype=dtype, **form))


@pytest.mark.parametrize("reentrant", [True, False])
def test_recomputed_activations_draw_the_same_mask(reentrant: bool) -> None:
    gradients = []
    for checkpointing in (False, True):
        model = learning(support_scope="per_expert").train()
        policy = RoutingPolicy(
            support_temperature=1.0, noise_step=3, auxiliary_weights=AuxiliaryWeights(support_overlap=0.5)
        )
        if checkpointing:
            model.enable_gradient_checkpointing(use_reentrant=reentrant)
        model(tokens(), labels=tokens(), policy=policy).loss_sum.backward()
        gradients.append([parameter.grad for _, parameter in model.trainable_parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_every_expert_learns_among_the_same_candidates() -> None:
    generator = torch.Generator().manual_seed(0)
    weights = tuple(torch.randn(shape, generator=generator) for shape in ((24, 8), (24, 8), (8, 24)))

    def select(**options: Any) -> Tensor:
        config = adapter_config(**({"density": 0.5} | options))
        return select_support(config, weights, hidden=8, intermediate=24, seed=0, layer=0)  # type: ignore[arg-type]

    learned = select(support_strategy="learned", support_scope="per_expert")
    assert torch.equal(learned, select(support_strategy="magnitude").expand(3, 12))
    assert torch.equal(select(support_strategy="learned"), learned[0])


def test_experts_that_share_atoms_cannot_learn_supports_of_their_own() -> None:
    config = adapter_config(support_strategy="learned", support_scope="per_expert", num_atoms=2)
    with pytest.raises(SRDEError, match=r"num_atoms=2: .*use support_scope=shared or num_atoms=0"):
        check_support(config, 8, 24)


# --- overlap ---------------------------------------------------------------------------------------------------------


def relaxed(scores: Tensor, temperature: float, sums: Tensor) -> Tensor:
    """sigmoid((score - threshold) / temperature) with the threshold at which each row has its sum, by bisection."""
    low, high = torch.full_like(sums, -100.0), torch.full_like(sums, 100.0)
    for _ in range(100):
        middle = (low + high) / 2
        above = ((scores - middle[:, None]) / temperature).sigmoid().sum(1) > sums
        low, high = torch.where(above, middle, low), torch.where(above, high, middle)
    return ((scores - low[:, None]) / temperature).sigmoid()


def test_the_relaxed_gradient_is_that_of_rows_that_keep_their_sum() -> None:
    """Against finite differences of <upstream, s> + weight * mean of <s_e, s_f> / kept."""
    temperature, weight, kept = 0.7, 0.3, 2.5
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(3, 7, dtype=torch.float64, generator=generator, requires_grad=True)
    upstream = torch.randn(3, 7, dtype=torch.float64, generator=generator)
    threshold = torch.tensor([[0.2], [-0.3], [0.0]], dtype=torch.float64)
    soft = RelaxedTopK.apply(scores, threshold, temperature)
    torch.testing.assert_close(soft, 1 / (1 + (-(scores - threshold) / temperature).exp()))
    passed = OverlapLoss.apply(soft, weight, kept)
    assert torch.equal(passed, soft)
    (found,) = torch.autograd.grad(passed, scores, upstream)
    with torch.no_grad():

        def loss(scores: Tensor) -> Tensor:
            s = relaxed(scores, temperature, soft.sum(1))
            return (upstream * s).sum() + weight * ((s[0] @ s[1] + s[0] @ s[2] + s[1] @ s[2]) / 3 / kept)

        expected = torch.zeros_like(scores)
        for entry in itertools.product(range(3), range(7)):
            step = torch.zeros_like(scores)
            step[entry] = 1e-5
            expected[entry] += (loss(scores + step) - loss(scores - step)) / 2e-5
    torch.testing.assert_close(found, expected, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("granularity", ["neuron", "element"])
def test_the_overlap_weight_moves_the_overlap(granularity: str) -> None:
    """On nothing but this loss: with it the masks move apart, without it they stay."""
    overlaps = {}
    for weight in (0.0, 0.1):
        bank = bank_of(granularity=granularity, support_scope="per_expert")
        with torch.no_grad():
            bank.scores.copy_(bank.scores[:1].expand(E, -1))
        optimizer = torch.optim.AdamW([bank.scores], lr=0.05, weight_decay=0.0)
        for step in range(60):
            optimizer.zero_grad()
            deltas = bank(temperature=0.5, step=step, overlap_weight=weight)
            (deltas * 0).sum().backward()
            optimizer.step()
        assert bank.gate is not None
        kept = bank.gate.mask(bank.scores).double()
        overlaps[weight] = float(sum(kept[e] @ kept[f] for e, f in ((0, 1), (0, 2), (1, 2)))) / 3 / KEEP
    assert overlaps[0.0] == 1.0
    assert overlaps[0.1] < 0.7  # by chance KEEP / C = 0.47


# --- learning --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("granularity", "scope"), itertools.product(("neuron", "element"), ("shared", "per_expert")))
def test_scores_find_the_planted_candidates(granularity: str, scope: str) -> None:
    """A regression whose target uses planted candidates: they end in the mask, where chance finds one in four."""
    experts, candidates, keep, block = 2, (32 if granularity == "neuron" else 16 * 64), 8, 1
    if granularity == "element":
        keep, block = 4 * 64, 64
    config = AdapterConfig(num_experts=experts, granularity=granularity, support_scope=scope)  # type: ignore[arg-type]
    bank = build_deltas(
        config,
        hidden=8,
        size=candidates,
        seed=0,
        layer=0,
        storage=Storage(torch.float32, torch.device("cpu")),
        keep=keep,
    )
    generator = torch.Generator().manual_seed(0)
    blocks = candidates // block
    planted = torch.zeros(experts, blocks, dtype=torch.bool)
    for expert in range(experts):
        chosen = torch.randperm(blocks, generator=torch.Generator().manual_seed(expert if scope == "per_expert" else 0))
        planted[expert, chosen[: keep // block]] = True
    entries = planted.repeat_interleave(block, dim=1)
    target = torch.randn(bank.values().shape, generator=generator)
    target *= entries[:, None] if granularity == "neuron" else entries
    optimizer = torch.optim.AdamW(bank.parameters(), lr=0.02, weight_decay=0.0)
    steps = 300
    for step in range(steps):
        optimizer.zero_grad()
        deltas = bank(temperature=0.1 ** (step / steps), step=step)
        noise = 0.1 * torch.randn(deltas.shape, generator=generator)
        (deltas - target - noise).square().sum().backward()
        optimizer.step()
    assert bank.gate is not None
    found = bank.gate.mask(bank.scores).expand(experts, -1)
    assert float((found & entries).sum() / entries.sum()) > 0.9
