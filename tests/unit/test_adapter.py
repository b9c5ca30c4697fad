"""Attaching, saving, loading, and the errors of all three."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from srde_ds.errors import SRDEError
from srde_ds.model.adapter import SRDEModel, add_experts, load_adapter
from srde_ds.model.base import Sharding
from srde_ds.model.parameter_table import parameter_table
from srde_ds.model.policy import RoutingPolicy
from srde_ds.model.statistics import RoutingStatistics
from srde_ds.weights.file import read_metadata, save_weights
from srde_ds.weights.schema import support_hash
from tests.helpers import adapter_config, gradient_of, randomize, tiny_llama, tiny_srde, tokens

D, F, E = 32, 96, 3
FORMS = [
    {"granularity": granularity, "support_scope": scope} | atoms
    for granularity in ("neuron", "block", "element")
    for scope in ("shared", "per_expert")
    for atoms in ({"num_atoms": 0}, {"num_atoms": 4}, {"num_atoms": 4, "atom_mixing": "softmax"})
]


def expected_shapes(form: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    neuron, atoms = form["granularity"] == "neuron", form["num_atoms"]
    size = {"neuron": 5, "block": round(0.05 * 3 * D * F / 256), "element": round(0.05 * 3 * D * F)}[
        form["granularity"]
    ]
    shapes: dict[str, tuple[int, ...]] = {"router.weight": (E, D)}
    shapes["support"] = (size,) if form["support_scope"] == "shared" else (E, size)
    if form["granularity"] == "block":
        size *= 256
    if atoms == 0:
        shapes["deltas.free"] = (D, 3 * E, size) if neuron else (E, size)
    else:
        shapes["deltas.atoms"] = (D, 12, size) if neuron else (size, 1, 4)
        shapes["deltas.importance"] = (E, 3, D, size) if neuron else (E, size)
        shapes["deltas.mixing"] = (E, 4)
    return {f"layers.{layer}.{name}": shape for layer in range(2) for name, shape in shapes.items()}


@pytest.mark.parametrize("form", FORMS)
def test_tensors_have_the_documented_names_and_shapes(form: dict[str, Any]) -> None:
    model = tiny_srde(**form)
    tensors = model.adapter_tensors()
    assert {name: tuple(t.shape) for name, t in tensors.items()} == expected_shapes(form)
    trainable = dict(model.trainable_parameters())
    assert set(tensors) - set(trainable) == {"layers.0.support", "layers.1.support"}
    assert {id(p) for p in trainable.values()} == {id(p) for p in model.parameters() if p.requires_grad}
    assert all(layer.delta_square_norms().tolist() == [0, 0, 0] for layer in model.layers)


@pytest.mark.parametrize("form", FORMS)
def test_parameters_say_what_they_are(form: dict[str, Any]) -> None:
    for name, parameter in tiny_srde(**form).trainable_parameters():
        kind = "router" if "router" in name else name.split(".")[-1]
        axis = None if kind in ("router", "atoms") else 1 if kind == "free" and form["granularity"] == "neuron" else 0
        assert (parameter.srde_kind, parameter.srde_expert_axis) == (kind, axis)
        assert parameter.srde_shape == tuple(parameter.shape)
        if axis is not None:
            assert parameter.shape[axis] == (3 * E if axis == 1 else E)


@pytest.mark.parametrize("form", FORMS)
def test_padding_rows_change_nothing_and_get_no_gradient(form: dict[str, Any]) -> None:
    config = adapter_config(**form)
    plain, padded = (
        add_experts(tiny_llama(), config, expert_names=["a", "b", "c"], seed=0, sharding=Sharding(pad_to=multiple))
        for multiple in (1, 7)
    )
    for model in (randomize(plain), randomize(padded)):
        model(tokens(), labels=tokens()).loss_sum.backward()
    ours = dict(padded.trainable_parameters())
    for name, parameter in plain.trainable_parameters():
        other = ours[name]
        padded_kind = parameter.srde_kind == "atoms" or (parameter.dim() == 3 and parameter.srde_kind == "free")
        assert other.shape[0] == (-(-parameter.shape[0] // 7) * 7 if padded_kind else parameter.shape[0])
        assert other.srde_shape == parameter.shape
        assert torch.equal(gradient_of(other)[: other.srde_shape[0]], gradient_of(parameter))
        assert (gradient_of(other)[other.srde_shape[0] :] == 0).all() and (other[other.srde_shape[0] :] == 0).all()
    pairs = zip(plain.adapter_tensors().items(), padded.adapter_tensors().items(), strict=True)
    assert all(a == b and torch.equal(s, t) for (a, s), (b, t) in pairs)


def test_delta_norms() -> None:
    model = randomize(tiny_srde())
    free = [layer.deltas.free for layer in model.layers]
    expected = [torch.cat([f[:, 3 * e : 3 * e + 3].flatten() for f in free]).norm().item() for e in range(E)]
    torch.testing.assert_close(model.delta_norms(), torch.tensor(expected))


def test_generation_with_a_cache_equals_generation_without() -> None:
    model = randomize(tiny_srde())
    arguments: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    with torch.no_grad():
        policy = RoutingPolicy(statistics=RoutingStatistics(2, E))
        # Its mask must not reach generate.
        model(tokens(), token_mask=torch.ones(2, 16, dtype=torch.bool), policy=policy)
        cached, recomputed = (model.generate(tokens(2, 5), use_cache=cache, **arguments) for cache in (True, False))
        assert torch.equal(cached, recomputed) and cached.shape == (2, 11)
        with model.no_experts():
            assert not torch.equal(model.generate(tokens(2, 5), **arguments), cached)


def test_labels_select_the_loss() -> None:
    model = randomize(tiny_srde())
    ids, labels = tokens(2, 16), tokens(2, 16).clone()
    labels[0, :9] = -100
    labels[1, 4:] = -100
    output = model(ids, labels=labels)
    logits = model(ids).logits[:, :-1]
    losses = torch.nn.functional.cross_entropy(logits.transpose(1, 2), labels[:, 1:], reduction="none")
    torch.testing.assert_close(output.loss_sum, losses.sum())
    assert output.label_count == 7 + 3 and output.loss_sum.dtype == torch.float32


@pytest.mark.parametrize("length", [1, 8])
def test_a_batch_without_labels_still_runs_backward(length: int) -> None:
    model = tiny_srde()
    output = model(tokens(2, length), labels=torch.full((2, length), -100))
    output.loss_sum.backward()
    assert output.loss_sum == 0 and output.label_count == 0
    assert all((gradient_of(p) == 0).all() for _, p in model.trainable_parameters())


def test_all_experts_locked_is_refused() -> None:
    model = tiny_srde()
    policy = RoutingPolicy(allowed_experts=torch.zeros(E, dtype=torch.bool))
    with pytest.raises(SRDEError, match="all experts are locked"):
        model(tokens(), policy=policy)


def test_the_config_must_fit_the_names() -> None:
    with pytest.raises(SRDEError, match="num_experts=3, but 2 expert names"):
        add_experts(tiny_llama(), adapter_config(), expert_names=["a", "b"], seed=0)
    with pytest.raises(SRDEError, match="top_k=4"):
        add_experts(tiny_llama(), adapter_config(top_k=4), expert_names=["a", "b", "c"], seed=0)


def test_the_parameter_table_adds_up() -> None:
    model = tiny_srde(num_atoms=4)
    lines = [line.split() for line in parameter_table(model).splitlines()[1:]]
    values = {line[0]: int(line[-2].replace(",", "")) for line in lines}
    assert values["trainable"] == sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert values["frozen"] == sum(p.numel() for p in model.parameters() if not p.requires_grad)
    assert values["atoms"] == 2 * D * 12 * 5 and values["router"] == 2 * E * D


def saved(model: SRDEModel, folder: Path) -> Path:
    path = folder / "srde_weights.safetensors"
    save_weights(path, model.adapter_tensors(), model.metadata())
    return path


@pytest.mark.parametrize("form", FORMS)
def test_a_round_trip_is_exact(form: dict[str, Any], tmp_path: Path) -> None:
    model = randomize(tiny_srde(**form))
    path = saved(model, tmp_path)
    loaded = load_adapter(path, base=tiny_llama())
    assert torch.equal(loaded(tokens()).logits, model(tokens()).logits)
    assert loaded.metadata() == model.metadata() == read_metadata(path)
    assert [p.name for p in tmp_path.iterdir()] == ["srde_weights.safetensors"]


def test_selection_biases_are_stored_where_they_are_not_zero(tmp_path: Path) -> None:
    model = randomize(tiny_srde())
    without = model.metadata()
    model.layers[1].router.load_selection_bias(torch.tensor([0.0, 5.0, -1.0]))
    assert set(model.common_tensors()) == {"layers.0.support", "layers.1.support", "layers.1.router_bias"}
    path = saved(model, tmp_path)
    assert read_metadata(path) == without
    loaded = load_adapter(path, base=tiny_llama())
    assert [layer.router.selection_bias.tolist() for layer in loaded.layers] == [[0, 0, 0], [0, 5, -1]]
    expected = model(tokens()).logits
    assert torch.equal(loaded(tokens()).logits, expected)
    model.load_common_tensors({})
    assert not model.layers[1].router.selection_bias.any()
    assert not torch.equal(model(tokens()).logits, expected)


def test_the_base_named_in_the_file_is_loaded(tmp_path: Path) -> None:
    tiny_llama().save_pretrained(tmp_path / "base")
    base = type(tiny_llama()).from_pretrained(tmp_path / "base").eval()
    model = randomize(tiny_srde(base=base))
    loaded = load_adapter(saved(model, tmp_path))
    assert torch.equal(loaded(tokens()).logits, model(tokens()).logits)
    assert not SRDEModel.from_pretrained(tiny_llama().train(), saved(model, tmp_path)).training
    narrow = load_adapter(saved(model, tmp_path), dtype=torch.bfloat16)
    assert {p.dtype for p in narrow.parameters()} == {torch.bfloat16}


def test_another_base_is_refused_by_name(tmp_path: Path) -> None:
    path = saved(tiny_srde(), tmp_path)
    with pytest.raises(SRDEError, match=r"trained on an unnamed model \(LlamaForCausalLM, hash .*base given is"):
        load_adapter(path, base=tiny_llama(seed=1))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"layers.1.router.weight": None}, r"tensor layers\.1\.router\.weight is missing"),
        ({"layers.1.support": None}, r"tensor layers\.1\.support is missing"),
        ({"layers.2.support": torch.zeros(5)}, r"tensor layers\.2\.router\.weight is missing"),
        ({"layers.4.support": torch.zeros(5)}, r"tensor layers\.2\.support is missing"),
        ({"layers.1.deltas.atoms": torch.zeros(5)}, r"unknown tensor 'layers\.1\.deltas\.atoms'"),
        ({"layers.01.support": torch.zeros(5)}, r"unknown tensor 'layers\.01\.support'"),
        ({"layers.0.deltas.free": torch.zeros(D, 9, 5, dtype=torch.int32)}, "dtype int32, expected a floating-point"),
        (
            {"layers.0.deltas.free": torch.zeros(D, 9, 5).to(torch.float8_e4m3fn)},
            "dtype F8_E4M3, which adapters do not use",
        ),
        ({"layers.0.support": torch.zeros(5)}, "dtype float32, expected int32"),
        ({"layers.0.support": torch.tensor([-1, 0, 1, 2, 3], dtype=torch.int32)}, r"support holds the index -1\."),
        ({"layers.0.support": torch.tensor([0, 1, 2, 3, 3], dtype=torch.int32)}, "layers.0.support do not ascend"),
        ({"layers.0.support": torch.tensor([3, 0, 1, 2, 4], dtype=torch.int32)}, "layers.0.support do not ascend"),
        (
            {"layers.0.support": torch.tensor(3, dtype=torch.int32)},
            r"free has .* expected \[32, 9, 0\]",
        ),
        ({"layers.0.deltas.free": torch.zeros(D, 9, 4)}, r"free has shape \[32, 9, 4\], expected \[32, 9, 5\]"),
        ({"layers.0.deltas.free": torch.full((D, 9, 5), float("nan"))}, "not finite"),
        ({"layers.0.support": torch.arange(5, dtype=torch.int32)}, "do not match support_hash"),
        ({"layers.0.router_bias": torch.zeros(2)}, r"router_bias has shape \[2\], expected \[3\]"),
        ({"layers.0.router_bias": torch.full((3,), float("nan"))}, "router_bias holds values that are not finite"),
    ],
)
def test_tensors_that_do_not_fit_are_refused(
    change: dict[str, torch.Tensor | None], message: str, tmp_path: Path
) -> None:
    model = tiny_srde()
    path = tmp_path / "weights.safetensors"
    tensors = {name: t for name, t in (model.adapter_tensors() | change).items() if t is not None}
    save_weights(path, tensors, model.metadata())
    with pytest.raises(SRDEError, match=message):
        load_adapter(path, base=tiny_llama())


def test_a_base_of_other_sizes_is_refused(tmp_path: Path) -> None:
    model = tiny_srde()
    metadata = model.metadata()
    tensors = model.adapter_tensors() | {"layers.1.support": torch.tensor([1, 2, 3, 4, 96], dtype=torch.int32)}
    metadata.support_hash = support_hash([tensors[f"layers.{layer}.support"] for layer in range(2)])
    path = tmp_path / "weights.safetensors"
    save_weights(path, tensors, metadata)
    with pytest.raises(SRDEError, match=r"layers\.1\.support holds the index 96, the base has 96 neurons in a layer"):
        load_adapter(path, base=tiny_llama())
    one_layer = {name: tensor for name, tensor in tensors.items() if name.startswith("layers.0")}
    metadata.support_hash = support_hash([tensors["layers.0.support"]])
    save_weights(path, one_layer, metadata)
    with pytest.raises(SRDEError, match=r"1 layers, but the base has 2 \(layers\.1\.support is missing\)"):
        load_adapter(path, base=tiny_llama())


def test_files_that_are_not_ours_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "weights.safetensors"
    with pytest.raises(SRDEError, match="no such file"):
        read_metadata(path)
    path.write_bytes(b"no tensors")
    with pytest.raises(SRDEError, match="not a readable safetensors file"):
        read_metadata(path)
    save_file({"a": torch.zeros(1)}, path)
    with pytest.raises(SRDEError, match="without SRDE metadata"):
        read_metadata(path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format_version": 99}, "format_version=99, but this program reads 1"),
        ({"base": None}, "lack 'base'"),
        ({"config": {"top_kk": 1}}, "unknown adapter option 'top_kk'.*top_k"),
        ({"config": {"granularity": "row"}}, "granularity='row'"),
        ({"config": {"num_experts": 10**9}}, "num_experts=1000000000, but 3 expert names"),
        ({"config": {"num_experts": 3, "top_k": 4}}, "top_k=4 exceeds num_experts=3"),
        ({"config": {"num_experts": 3, "num_atoms": 10**12}}, r"tensor layers\.0\.deltas\.\w+ is missing"),
        ({"config": [1]}, "must be a mapping"),
        ({"config": {"density": [[]]}}, "not a value of an option"),
        ({"format_version": True}, "format_version=True, but this program reads 1"),
        ({"more": 1}, "unknown key 'more'"),
        ({"expert_names": ["a", "b", "a"]}, "2 experts are called 'a'"),
        ({"expert_names": ["a", "b", "c\x1b[2J"]}, r"expert name 'c\\x1b\[2J' is not printable text"),
        ({"expert_names": ["a", "b", " "]}, "expert name ' ' is not printable text"),
        ({"expert_names": "abc"}, "but 1 expert names"),
        ({"expert_names": ["a", "b", 3]}, "expert name 3 is not printable text"),
        ({"model_name": "a\nb"}, "model_name='a.*b' in the metadata must be printable"),
        ({"base": {"name": "a", "architecture": "b"}}, "must give name, architecture, hash as text"),
    ],
)
def test_metadata_that_do_not_fit_are_refused(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    path = saved(tiny_srde(), tmp_path)
    values = read_metadata(path).to_dict() | change
    values = {name: value for name, value in values.items() if value is not None}
    save_file(load_file(path), path, metadata={"srde": json.dumps(values)})
    with pytest.raises(SRDEError, match=message):
        read_metadata(path)


def test_metadata_survive_json() -> None:
    metadata = tiny_srde(num_atoms=4).metadata()
    assert type(metadata).from_dict(json.loads(json.dumps(metadata.to_dict()))) == metadata
    assert dataclasses.asdict(metadata)["config"]["num_atoms"] == 4
