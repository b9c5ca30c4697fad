"""Experts that change parts of neurons, against experts of whole neurons whose other values are zero."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch

from srde_ds.model.adapter import SRDEModel
from srde_ds.model.adapter_source import open_adapter
from srde_ds.model.layer import SRDEFeedForward
from srde_ds.model.policy import RoutingPolicy
from srde_ds.model.reference import reference_forward
from tests.helpers import gradient_of, randomize, tiny_llama, tiny_srde, tokens

PARTS = 4
FORMS: list[dict[str, Any]] = [
    {"support_scope": scope, **atoms}
    for scope, atoms in itertools.product(("shared", "per_expert"), ({}, {"num_atoms": 4}))
]


def in_parts(**overrides: Any) -> SRDEModel:
    """Of tiny_llama's 96 neurons with 32 weights a side, an expert changes 8 of those of 19."""
    return randomize(tiny_srde(neuron_parts=PARTS, **({"dtype": torch.float64} | overrides)))


def whole(model: SRDEModel) -> SRDEModel:
    """The same experts, of free deltas for whole neurons."""
    config = model.config
    density = model.layers[0].support.shape[-1] / 96
    plain = tiny_srde(dtype=torch.float64, support_scope=config.support_scope, density=density)
    with torch.no_grad():
        for source, target in zip(model.layers, plain.layers, strict=True):
            target.router.load_state_dict(source.router.state_dict())
            target.support.copy_(source.support)
            target.deltas.free.copy_(source.deltas.whole().flatten(1, 2))
    return plain


def inputs() -> torch.Tensor:
    return torch.randn(2, 4, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("form", FORMS)
def test_each_layer_has_four_times_the_neurons_and_the_next_quarter_of_each(form: dict[str, Any]) -> None:
    model, plain = in_parts(**form), tiny_srde(**form)
    values = [sum(p.numel() for name, p in m.trainable_parameters() if "deltas" in name) for m in (model, plain)]
    assert values[0] == pytest.approx(values[1], rel=0.06)
    for number, layer in enumerate(model.layers):
        deltas = layer.deltas.whole()
        assert deltas.shape[0] == 32 and deltas.shape[3] == layer.support.shape[-1] == 19
        own = slice(8 * number, 8 * number + 8)
        assert torch.equal(deltas[own], layer.deltas()) and bool(deltas[own].all())
        assert deltas.count_nonzero() == deltas[own].numel()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("number", [0, 1])
def test_a_layer_equals_the_reference(number: int, form: dict[str, Any]) -> None:
    layer, x = in_parts(**form).layers[number], inputs()
    expected = reference_forward(layer, x.view(8, 32), top_k=2).view_as(x)
    assert (expected - layer.block(x)).abs().max() > 1e-2
    torch.testing.assert_close(layer(x), expected, rtol=1e-10, atol=1e-10)
    with torch.no_grad():  # on prepared deltas
        for rows, columns in ((2, 4), (1, 1)):
            actual = layer(x[:rows, :columns])
            torch.testing.assert_close(actual, expected[:rows, :columns], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("scope", ["shared", "per_expert"])
def test_a_few_tokens_of_many_experts_read_their_own_alone(scope: str) -> None:
    layer = in_parts(num_experts=16, support_scope=scope, support_strategy="random").layers[1]
    x = inputs().view(8, 32)
    expected = reference_forward(layer, x, top_k=2)
    with torch.no_grad():
        for count in (0, 1, 3, 8):  # eight tokens choose as many experts as there are
            torch.testing.assert_close(layer(x[:count]), expected[:count], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("form", FORMS)
def test_values_and_gradients_are_those_of_whole_neurons(form: dict[str, Any]) -> None:
    model = in_parts(**form)
    found = []
    for one in (model, whole(model)):
        x = one.base.get_input_embeddings()(tokens()).requires_grad_()
        logits = one.base(inputs_embeds=x).logits
        logits.square().mean().backward()
        found.append([logits, gradient_of(x), *(gradient_of(layer.router.weight) for layer in one.layers)])
        if not form.get("num_atoms"):
            found[-1] += [_own(layer) for layer in one.layers]
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)


def _own(layer: SRDEFeedForward) -> torch.Tensor:
    gradient = gradient_of(layer.deltas.free)
    return gradient if layer.deltas.parts > 1 else gradient[8 * layer.layer : 8 * layer.layer + 8]


@torch.no_grad()
def test_an_expert_alone_equals_its_merged_model() -> None:
    model = in_parts()
    logits = model(tokens(), policy=RoutingPolicy(forced_experts=torch.full((2, 16), 1))).logits
    merged = model.merge_and_unload(expert="expert1")
    torch.testing.assert_close(merged(tokens()).logits, logits, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("form", FORMS)
def test_a_saved_adapter_is_the_same(form: dict[str, Any], tmp_path: Path) -> None:
    model = in_parts(dtype=torch.float32, **form)
    base = tmp_path / "base"
    tiny_llama().save_pretrained(base)
    model.save_pretrained(tmp_path / "adapter")
    loaded = SRDEModel.from_pretrained(base, tmp_path / "adapter")
    assert torch.equal(loaded(tokens()).logits, model(tokens()).logits)
    source = open_adapter(tmp_path / "adapter")
    for number, layer in enumerate(model.layers):
        torch.testing.assert_close(source.deltas(number), layer.deltas.whole())
