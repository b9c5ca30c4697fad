"""A base that is spread over several devices, or moved to another one.

No machine of the tests has two GPUs, so torch's fake tensors stand in: they compute nothing, but refuse operations on
tensors of different devices, as torch does.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import dispatch_model
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_map

from srde_ds.config import AdapterConfig
from srde_ds.errors import SRDEError
from srde_ds.inference.routing import RoutingRecord
from srde_ds.model.adapter import add_experts
from srde_ds.model.policy import RoutingPolicy
from srde_ds.model.prompt_routing import experts_of_prompts
from srde_ds.model.statistics import RoutingStatistics
from srde_ds.training import domain_statistics
from srde_ds.training.warm_start.token_sample import TokenSample
from srde_ds.weights.origins import DomainStatistics
from tests.helpers import tiny_llama, tiny_srde
from tests.peft_helpers import tiny_peft

FIRST, SECOND = torch.device("cpu"), torch.device("cpu:1")


def spread(base: Any) -> FakeTensorMode:
    """Put layer 1 on the second device and the rest on the first, as `device_map` does; inside the mode it can run."""
    mode, moved = FakeTensorMode(allow_non_fake_inputs=True), {}

    def fake(tensor: Tensor, device: torch.device) -> Tensor:
        if id(tensor) not in moved:
            with mode:
                found: Any = torch.empty(tensor.shape, dtype=tensor.dtype, device=device)
            if isinstance(tensor, nn.Parameter):
                found = nn.Parameter(found, requires_grad=tensor.requires_grad)
            vars(found).update({key: value for key, value in vars(tensor).items() if key.startswith("srde_")})
            moved[id(tensor)] = found
        return moved[id(tensor)]

    for name, module in base.named_modules():
        device = SECOND if name.startswith("model.layers.1") else FIRST
        for tensors in (module._parameters, module._buffers):
            tensors.update({key: fake(tensor, device) for key, tensor in tensors.items() if tensor is not None})
    for module, device in ((base.model.layers[1], SECOND), (base.model.norm, FIRST)):
        module.register_forward_pre_hook(
            lambda _, args, kwargs, device=device: tree_map(
                lambda value: value.to(device) if isinstance(value, Tensor) else value, (args, kwargs)
            ),
            with_kwargs=True,
        )
    return mode


def test_a_spread_base_is_trained_through_peft() -> None:
    model = tiny_peft(load_balancing_weight=0.1, router_z_weight=0.1).train()
    with spread(model.get_base_model()):
        ids = torch.ones(2, 16, dtype=torch.int64)
        for _ in range(2):  # the first has no shares yet to balance
            model.zero_grad()
            model(input_ids=ids, attention_mask=ids, labels=ids, use_cache=False).loss.backward()
            trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
            assert {p.device for p in trained} == {FIRST, SECOND}
            assert all(p.grad is not None and p.grad.device == p.device for p in trained)
        assert model.training_steps.expert_share is not None


def test_a_forced_expert_on_a_spread_base() -> None:
    model = tiny_srde().train()
    with spread(model.base):
        ids = torch.ones(2, 16, dtype=torch.int64)
        policy = RoutingPolicy(forced_experts=ids, statistics=RoutingStatistics(2, 3))
        logits = model(ids, policy=policy).logits
        assert logits is not None
        logits.sum().backward()
        assert policy.statistics is not None and not policy.statistics.is_empty


def test_prompts_choose_experts_and_routing_is_recorded_on_a_spread_base() -> None:
    model = tiny_srde().train()  # in eval mode, values decide how the experts are prepared
    with spread(model.base), torch.no_grad():
        ids, record = torch.ones(2, 16, dtype=torch.int64), RoutingRecord()
        found = experts_of_prompts(model, ids, ids.bool(), policy=RoutingPolicy())
        with record.recording(model, RoutingPolicy()) as policy:
            model(ids, policy=policy)
        assert (found.device, found.shape) == (FIRST, (2, 1))
        assert record.shares_TE.shape == record.weights_TE().shape == (32, 3)
        assert model.delta_norms().device == FIRST


def test_domains_are_measured_on_a_spread_base(monkeypatch: pytest.MonkeyPatch) -> None:
    def visit_inputs(*args: Any) -> None:
        for layer, device in enumerate((FIRST, SECOND)):
            args[-1](layer, torch.ones(2, model.layers[0].hidden, device=device), np.arange(2))

    monkeypatch.setattr(domain_statistics, "visit_inputs", visit_inputs)
    model, token = tiny_srde(), np.arange(2)
    sample = TokenSample(rows=token, row=token, position=token, domain=token)
    with spread(model.base):
        assert domain_statistics.sum_inputs(model, lambda _: None, [], sample, 2).device == FIRST


def test_statistics_follow_a_model_that_is_moved() -> None:
    statistics = RoutingStatistics(2, 3)
    assert statistics.is_empty
    statistics.sums(FIRST).add_(1)
    statistics.sums(SECOND).add_(2)
    assert not statistics.is_empty
    assert {float(own.unique()) for name, own in statistics.pop().items() if name != "entropy_sum"} == {3.0}
    assert statistics.is_empty and not any(own.any() for own in statistics.pop().values())
    assert statistics.sums(torch.device("meta")).device.type == "meta"
    assert statistics.pop()["tokens"].device.type == "meta"


@pytest.mark.parametrize("device", [FIRST, SECOND])
def test_new_statistics_of_domains_join_those_in_a_model(device: torch.device) -> None:
    """The model's are where it is, new ones come from host memory."""
    with FakeTensorMode():
        old, new = (DomainStatistics.independent(*torch.ones(2, 1, 8, device=place)) for place in (device, FIRST))
        joined = old.beside(new)
    assert {part.device for part in vars(joined).values()} == {device}
    assert joined.mean.shape == (2, 8)


def test_a_base_with_offloaded_layers_is_refused(tmp_path: Path) -> None:
    base = tiny_llama()
    names = [name for name, _ in base.model.named_children()]
    places = {f"model.{name}": "cpu" for name in names if name != "layers"} | {"lm_head": "cpu"}
    layers = {f"model.layers.{number}": "disk" if number else "cpu" for number in range(len(base.model.layers))}
    dispatch_model(base, places | layers, main_device="cpu", offload_dir=str(tmp_path), force_hooks=True)
    assert base.model.layers[1].mlp.up_proj.weight.is_meta
    with pytest.raises(SRDEError, match="^device_map: parts of the base are on disk, .* load it whole"):
        add_experts(base, AdapterConfig(num_experts=1, top_k=1), expert_names=["code"], seed=0)
