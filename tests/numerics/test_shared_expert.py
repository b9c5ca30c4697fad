"""The shared expert: its layer against the reference, its neurons, and every form in which it is saved or merged."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.func import functional_call
from transformers import AutoModelForCausalLM

from srde_ds.compose.combine import combine
from srde_ds.compose.summary import inspect_weights
from srde_ds.errors import SRDEError
from srde_ds.export.dense import write_dense
from srde_ds.export.moe import write_moe
from srde_ds.export.weights import write_peft, write_weights
from srde_ds.model.adapter import load_adapter
from srde_ds.model.adapter_source import open_adapter, select_experts
from srde_ds.model.base_files import BaseFiles
from srde_ds.model.policy import RoutingPolicy
from srde_ds.model.reference import reference_forward
from srde_ds.model.supports.selection import check_support
from srde_ds.weights.file import read_weights, save_weights
from tests.convert_helpers import save_base, trained
from tests.helpers import adapter_config, randomize, tiny_llama, tiny_srde, tokens
from tests.peft_helpers import loaded, logits, saved, tiny_peft

SHARED: dict[str, Any] = {"shared_expert_density": 0.1}
FORMS: list[dict[str, Any]] = [
    {},
    {"support_scope": "per_expert"},
    {"num_atoms": 4, "atom_mixing": "softmax"},
    {"support_strategy": "random", "top_k": 1},
]


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("form", FORMS)
def test_the_layer_equals_the_reference(form: dict[str, Any], bias: bool) -> None:
    base = tiny_llama(dtype=torch.float64, mlp_bias=bias, num_hidden_layers=1)
    layer = randomize(tiny_srde(base=base, **SHARED, **form)).layers[0]
    x = torch.randn(2, 4, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    expected = reference_forward(layer, x.view(8, 32), top_k=layer.router.top_k).view_as(x)
    torch.testing.assert_close(layer(x), expected, rtol=1e-10, atol=1e-10)
    with torch.no_grad():  # prepared for decoding
        torch.testing.assert_close(layer(x), expected, rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(layer(x[:1, :1]), expected[:1, :1], rtol=1e-10, atol=1e-10)
        assert layer.shared_expert is not None
        layer.shared_expert.delta.zero_()
        assert (layer(x) - expected).abs().max() > 1e-2


def test_it_starts_as_the_base_and_its_gradient_is_that_of_finite_differences() -> None:
    model = tiny_srde(**SHARED)
    assert torch.equal(model(tokens()).logits, tiny_llama()(tokens()).logits)
    with randomize(model).no_experts():
        assert torch.equal(model(tokens()).logits, tiny_llama()(tokens()).logits)
    base = tiny_llama(
        dtype=torch.float64, hidden_size=4, intermediate_size=8, num_attention_heads=2, num_hidden_layers=1
    )
    layer = randomize(tiny_srde(base=base, density=0.3, shared_expert_density=0.3)).layers[0]
    names, values = zip(*((n, p) for n, p in layer.named_parameters() if p.requires_grad), strict=True)
    assert "shared_expert.delta" in names
    x = torch.randn(1, 3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(4), requires_grad=True)

    def function(x: Tensor, *parameters: Tensor) -> Tensor:
        return functional_call(layer, dict(zip(names, parameters, strict=True)), (x,))

    assert torch.autograd.gradcheck(function, (x, *values))


@pytest.mark.parametrize("form", FORMS)
def test_its_neurons_are_the_largest_that_no_routed_expert_changes(form: dict[str, Any]) -> None:
    for layer in tiny_srde(**SHARED, **form).layers:
        assert layer.shared_expert is not None
        neurons, routed = layer.shared_expert.neurons.tolist(), set(layer.support.flatten().tolist())
        assert len(neurons) == round(0.1 * layer.intermediate) and neurons == sorted(set(neurons) - routed)
        if "support_strategy" not in form:
            gate, up, down = (getattr(layer.block, layer.roles[role]).weight for role in ("gate", "up", "down"))
            sizes = gate.square().sum(1) + up.square().sum(1) + down.square().sum(0)
            left = [n for n in range(layer.intermediate) if n not in routed | set(neurons)]
            assert sizes[neurons].min() >= sizes[left].max()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"granularity": "element"}, "shared_expert_density=0.1 with granularity=element: a shared expert changes"),
        ({"support_strategy": "activation"}, "shared_expert_density=0.1 with support_strategy=activation"),
        ({"shared_expert_density": 0.97}, "shared_expert_density=0.97: 93 neurons of the shared expert and 5 of the"),
    ],
)
def test_where_there_is_no_place_for_it(options: dict[str, Any], message: str) -> None:
    with pytest.raises(SRDEError, match=message):
        check_support(adapter_config(**(SHARED | options)), 32, 96)


@pytest.mark.parametrize("form", FORMS[:2])
def test_files_keep_it(form: dict[str, Any], tmp_path: Path) -> None:
    made = trained(save_base("llama", tmp_path / "base"), tmp_path, **SHARED, **form)
    expected = made.model(tokens()).logits
    written = write_peft(open_adapter(made.weights), tmp_path / "peft", dtype=None)
    again = write_weights(open_adapter(written), tmp_path / "again.safetensors", dtype=None)
    for place in (made.weights, written, again):
        assert torch.equal(load_adapter(place, base=made.base)(tokens()).logits, expected)
    summary = inspect_weights(made.weights)
    assert summary.values == sum(parameter.numel() for _, parameter in made.model.trainable_parameters())
    assert len(summary.shared_expert_norms) == summary.layers
    assert "a shared expert of density 0.1, used by every token" in summary.describe()
    few = write_weights(
        select_experts(open_adapter(made.weights), ["blue", "red"]), tmp_path / "f.safetensors", dtype=None
    )
    made.model.set_active_experts(["red", "blue"])
    torch.testing.assert_close(load_adapter(few, base=made.base)(tokens()).logits, made.model(tokens()).logits)


@pytest.mark.parametrize("form", FORMS[:2])
def test_dense_and_stock_models_have_it_merged(form: dict[str, Any], tmp_path: Path) -> None:
    made = trained(save_base("llama", tmp_path / "base"), tmp_path, **SHARED, **form)
    adapter, base = open_adapter(made.weights), BaseFiles(made.base)
    stock = AutoModelForCausalLM.from_pretrained(write_moe(adapter, base, tmp_path / "moe", dtype=None)).eval()
    with torch.no_grad():
        torch.testing.assert_close(stock(tokens()).logits, made.model(tokens()).logits, rtol=1e-4, atol=1e-5)
        forced = RoutingPolicy(forced_experts=torch.full((2, 16), 1))
        expected = made.model(tokens(), policy=forced).logits
        dense = write_dense(adapter, base, tmp_path / "dense", expert="green", dtype=None)
        merged = made.model.merge_and_unload("green")
        for model in (AutoModelForCausalLM.from_pretrained(dense).eval(), merged):
            torch.testing.assert_close(model(tokens()).logits, expected, rtol=1e-4, atol=1e-5)


def test_peft_trains_saves_and_loads_it(tmp_path: Path) -> None:
    model = tiny_peft(**SHARED)
    assert any("shared_expert" in name for name, parameter in model.named_parameters() if parameter.requires_grad)
    model(tokens(), labels=tokens()).loss.backward()
    experts = model.srde_model().layers[0].shared_expert
    assert bool(experts.delta.grad.any())
    again = loaded(saved(model, tmp_path / "adapter"))
    assert torch.equal(logits(again, tokens()), logits(model, tokens()))
    assert torch.equal(again.srde_model().layers[0].shared_expert.neurons, experts.neurons)


def test_adapters_with_it_are_not_combined(tmp_path: Path) -> None:
    made = trained(save_base("llama", tmp_path / "base"), tmp_path, **SHARED)
    with pytest.raises(SRDEError, match=r"were trained beside a shared expert \(shared_expert_density=0.1\)"):
        combine([open_adapter(made.weights)] * 2)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("missing", "layers.1.shared_expert.neurons is missing"),
        ("overlap", "layers.1.shared_expert.neurons names neurons of the routed experts"),
        ("range", "layers.1.shared_expert.neurons holds the index 96, the base has 96 neurons"),
        ("twice", "layers.1.shared_expert.neurons do not ascend"),
        ("shape", r"layers.1.shared_expert.delta has shape \[32, 3, 9\], expected \[32, 3, 10\]"),
    ],
)
def test_damaged_files_are_refused(change: str, message: str, tmp_path: Path) -> None:
    made = trained(save_base("llama", tmp_path / "base"), tmp_path, **SHARED)
    file = read_weights(made.weights)
    tensors = {name: tensor.load() for name, tensor in file.tensors.items()}
    neurons, delta = "layers.1.shared_expert.neurons", "layers.1.shared_expert.delta"
    if change == "missing":
        del tensors[neurons]
    elif change == "shape":
        tensors[delta] = tensors[delta][..., 1:]
    else:
        value = {"overlap": int(tensors["layers.1.support"][0]), "range": 96, "twice": int(tensors[neurons][1])}
        tensors[neurons] = tensors[neurons].clone()
        tensors[neurons][0] = value[change]
        tensors[neurons] = tensors[neurons].sort().values
    save_weights(tmp_path / "damaged.safetensors", tensors, file.metadata)
    with pytest.raises(SRDEError, match=message):
        load_adapter(tmp_path / "damaged.safetensors", base=made.base)
