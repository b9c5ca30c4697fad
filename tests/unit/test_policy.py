"""A forward's policy reaches its layers, its recomputation and nothing else."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor

from srde_ds.errors import SRDEError
from srde_ds.model.adapter import SRDEModel
from srde_ds.model.base import enable_checkpointing
from srde_ds.model.policy import AuxiliaryWeights, RoutingPolicy
from srde_ds.model.statistics import RoutingStatistics
from srde_ds.training.reporting.held_out import forced_experts
from tests.helpers import gradient_of, randomize, tiny_llama, tiny_srde, tokens


def forced(expert: int) -> RoutingPolicy:
    return RoutingPolicy(forced_experts=torch.full((2, 16), expert))


def gradients(model: SRDEModel) -> dict[str, Tensor]:
    found = {name: gradient_of(p).clone() for name, p in model.trainable_parameters()}
    model.zero_grad()
    return found


def loss(model: SRDEModel, policy: RoutingPolicy | None = None, seed: int = 0) -> Tensor:
    ids = tokens(seed=seed)
    found: Tensor = model(ids, labels=ids, policy=policy).loss_sum
    return found


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_forwards_with_different_policies_before_one_backward(use_reentrant: bool) -> None:
    """Each is recomputed under its own policy, in whatever order the backward comes to them."""
    results = []
    for checkpointing in (False, True):
        model = randomize(tiny_srde(dtype=torch.float64)).train()
        if checkpointing:
            model.enable_gradient_checkpointing(use_reentrant=use_reentrant)
        statistics = RoutingStatistics(2, 3)
        mask = torch.arange(16).expand(2, 16) < 11
        policies = [
            forced(2),
            RoutingPolicy(allowed_experts=torch.tensor([True, True, False]), token_mask=mask, statistics=statistics),
            RoutingPolicy(loss_scale=0.1, auxiliary_weights=AuxiliaryWeights(router_z=1.0, delta_size=0.1)),
            None,
        ]
        losses = [loss(model, policy, seed) for seed, policy in enumerate(policies)]
        with model.no_experts():
            losses.append(loss(model, seed=4))
        model.set_active_experts("expert1")
        torch.stack(losses).sum().backward()
        results.append((gradients(model), statistics.pop()))
    (plain, plain_sums), (recomputed, sums) = results
    for name in plain:
        torch.testing.assert_close(recomputed[name], plain[name], rtol=1e-10, atol=1e-10)
    for name in plain_sums:
        torch.testing.assert_close(sums[name], plain_sums[name], rtol=1e-10, atol=1e-10)
    assert plain_sums["tokens"].tolist() == [22, 22]


def test_nothing_of_a_policy_is_left_after_its_forward() -> None:
    model = randomize(tiny_srde())
    before = model(tokens()).logits
    assert not torch.equal(model(tokens(), policy=forced(1)).logits, before)
    assert torch.equal(model(tokens()).logits, before)
    with pytest.raises(IndexError):
        model(tokens() + 1000, policy=forced(1))
    assert torch.equal(model(tokens()).logits, before)
    assert torch.equal(model.base(tokens()).logits, before)


def test_a_policy_is_completed_by_what_the_user_switched_off() -> None:
    model = randomize(tiny_srde())
    choices: dict[int, Tensor] = {}
    model.set_active_experts(["expert0", "expert2"])
    model(tokens(), policy=RoutingPolicy(choices=choices))
    assert set(choices[0].flatten().tolist()) == {0, 2}
    model(tokens(), policy=RoutingPolicy(choices=choices, allowed_experts=torch.tensor([True, True, False])))
    assert set(choices[0].flatten().tolist()) == {0, 1}
    with model.no_experts():
        bare = model(tokens(), policy=forced(1)).logits
        model.set_active_experts(None)
    with model.no_experts():
        assert torch.equal(bare, model(tokens()).logits)
    assert model.active_experts == model.expert_names and model.routing.policy.active


def test_a_copy_of_a_model_has_its_own() -> None:
    model = randomize(tiny_srde())
    other = copy.deepcopy(model)
    assert all(layer.control is other.routing for layer in other.layers)
    before = model(tokens()).logits
    other.set_active_experts("expert1")
    with other.routing.running(forced(1)):
        assert torch.equal(model(tokens()).logits, before)


def test_a_compiled_base_follows_another_policy() -> None:
    model = randomize(tiny_srde(base=tiny_llama(num_hidden_layers=1))).eval()
    compiled = torch.compile(model.base, fullgraph=True, backend="eager")
    with torch.no_grad():
        for policy in (RoutingPolicy(), forced(1), RoutingPolicy(active=False)):
            with model.routing.running(policy):
                found = compiled(tokens(), use_cache=False).logits
            torch.testing.assert_close(found, model(tokens(), policy=policy).logits)
        with model.no_experts():
            torch.testing.assert_close(compiled(tokens(), use_cache=False).logits, found)


def test_recomputation_that_would_forget_the_policy_is_refused() -> None:
    model = randomize(tiny_srde()).train()
    enable_checkpointing(model.base, use_reentrant=False)
    with pytest.raises(SRDEError, match="call enable_gradient_checkpointing of the SRDEModel"):
        loss(model, forced(1))
    with torch.no_grad():
        loss(model, forced(1))
    model.enable_gradient_checkpointing()
    loss(model, forced(1)).backward()
    free = gradient_of(model.layers[0].deltas.free)
    assert (free[:, [0, 1, 2, 6, 7, 8]] == 0).all() and (free[:, 3:6] != 0).any()


def test_the_experts_of_rows_can_be_pinned(monkeypatch: pytest.MonkeyPatch) -> None:
    """They are one column, expanded. On the way to a GPU, torch copies them into memory with the same strides."""

    def pinned(self: Tensor) -> Tensor:
        elements = sum((size - 1) * stride for size, stride in zip(self.shape, self.stride(), strict=True)) + 1
        storage = torch.UntypedStorage(elements * self.element_size())
        return torch.empty(0, dtype=self.dtype).set_(storage, 0, self.shape, self.stride()).copy_(self)

    batch = {"domain": torch.tensor([1, 0]), "input_ids": tokens()}
    expected = torch.tensor([1, 0])[:, None].expand(2, 16)
    with pytest.raises(RuntimeError, match="single memory location"):
        pinned(expected)
    monkeypatch.setattr(Tensor, "pin_memory", pinned)
    monkeypatch.setattr(Tensor, "to", lambda self, device, non_blocking: self)
    moved = RoutingPolicy(forced_experts=forced_experts(batch, "domain")).to(torch.device("cuda"))
    assert moved.forced_experts is not None and torch.equal(moved.forced_experts, expected)
