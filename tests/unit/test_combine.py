"""Adapters put together, experts renamed and taken out: each expert computes what it did."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor
from transformers import AutoModelForCausalLM

from srde_ds.cli.main import main
from srde_ds.compose.combine import combine
from srde_ds.config import resolve
from srde_ds.errors import SRDEError
from srde_ds.export.weights import write_peft, write_weights
from srde_ds.inference.load import load_model
from srde_ds.inference.options import ModelOptions
from srde_ds.model.adapter import SRDEModel, add_experts, load_adapter
from srde_ds.model.adapter_source import open_adapter
from srde_ds.model.policy import RoutingPolicy
from srde_ds.model.supports.selection import check_support
from srde_ds.training.run_inputs import read_run_inputs
from srde_ds.weights.file import read_weights, save_weights
from srde_ds.weights.origins import DomainStatistics
from tests.cli_helpers import fails
from tests.cli_helpers import save_base as save_base_with_tokenizer
from tests.convert_helpers import save_base
from tests.data_helpers import sums, write_jsonl
from tests.helpers import adapter_config, randomize, tiny_llama, tokens
from tests.unit.test_convert_command import CONVERTER
from tests.unit.test_inspect import stored, with_statistics

NEURONS: list[dict[str, Any]] = [
    {"density": 0.02},
    {"density": 0.05, "num_atoms": 2, "support_strategy": "random"},
    {"density": 0.1, "num_atoms": 3, "atom_mixing": "softmax", "support_scope": "per_expert"},
]
ELEMENTS = [form | {"granularity": "element", "density": form["density"] / 10} for form in NEURONS]

PARTS = [form | {"neuron_parts": 2} for form in NEURONS]
BLOCKS = [form | {"granularity": "block"} for form in NEURONS]


def made(folder: Path, names: list[str], *, seed: int, base: Any = None, **form: Any) -> tuple[Path, SRDEModel]:
    """An adapter with random experts and statistics of their domains."""
    config = adapter_config(**({"num_experts": len(names), "top_k": min(2, len(names))} | form))
    model = randomize(add_experts(base or tiny_llama(), config, expert_names=names, seed=seed), seed=seed)
    with_statistics(model, *names, seed=seed)
    model.origins.history[0]["seed"] = seed
    return stored(model, folder / f"{names[0]}.safetensors"), model


def alone(model: SRDEModel, expert: str) -> Tensor:
    """Logits if all tokens go to one expert."""
    model.set_active_experts([expert])
    with torch.no_grad():
        return model(tokens()).logits


@pytest.mark.parametrize("forms", [NEURONS, PARTS, BLOCKS, ELEMENTS], ids=["neuron", "parts", "block", "element"])
@pytest.mark.parametrize("training", [False, True])
def test_each_expert_alone_computes_what_it_did(forms: list[dict[str, Any]], training: bool, tmp_path: Path) -> None:
    names = [["math", "code"], ["law"], ["red", "green", "blue"]]
    pairs = zip(names, forms, strict=True)
    sources = [made(tmp_path, own, seed=seed, **form) for seed, (own, form) in enumerate(pairs, 1)]
    path = tmp_path / "all.safetensors"
    combined = combine([open_adapter(file) for file, _ in sources])
    large = combined.tensors["layers.0.support"], combined.tensors["layers.0.deltas.free"]
    assert all(tensor.load() is not tensor.load() for tensor in large)  # read anew, so memory holds one layer
    write_weights(combined, path, dtype=torch.float32)
    model = load_adapter(path, base=tiny_llama()).train(training)
    assert model.expert_names == [name for own in names for name in own]
    assert (model.config.num_experts, model.config.top_k, model.config.num_atoms) == (6, 2, 0)
    assert model.config.support_scope == "per_expert"
    for _, source in sources:
        source.train(training)
        for expert in source.expert_names:
            torch.testing.assert_close(alone(model, expert), alone(source, expert), rtol=1e-5, atol=2e-5)
    assert model.origins.domain_tokens == {k: v for _, m in sources for k, v in m.origins.domain_tokens.items()}


@torch.no_grad()
def test_filled_up_entries_change_no_bit() -> None:
    """Deltas of zero on any entries of a support give what the support without them gives."""
    narrow, wide = ({"num_experts": 1, "top_k": 1, "density": density} for density in (0.05, 0.2))
    one = randomize(add_experts(tiny_llama(), adapter_config(**narrow), expert_names=["law"], seed=0))
    other = add_experts(tiny_llama(), adapter_config(**wide), expert_names=["law"], seed=0).train()
    for ours, theirs in zip(other.layers, one.layers, strict=True):
        kept = torch.isin(ours.support, theirs.support)
        assert int(kept.sum()) == len(theirs.support) < len(ours.support)
        ours.deltas.free[..., kept] = theirs.deltas.free
    ids = tokens()
    torch.testing.assert_close(other(ids).logits, one.train()(ids).logits, rtol=1e-6, atol=1e-5)
    for layer in other.layers:
        layer.deltas.free.zero_()
    assert torch.equal(other(ids).logits, tiny_llama()(ids).logits)


@torch.no_grad()
def test_equal_supports_stay_one_and_equal_shapes_give_equal_bits(tmp_path: Path) -> None:
    first, math = made(tmp_path, ["math"], seed=1)
    second, law = made(tmp_path, ["law"], seed=2)
    combined = combine([open_adapter(first), open_adapter(second)])
    assert combined.metadata.config.support_scope == "shared"
    model = load_adapter(write_weights(combined, tmp_path / "all", dtype=torch.float32), base=tiny_llama())
    for layer in range(2):
        free = model.layers[layer].deltas.free.unflatten(1, (2, 3))
        assert torch.equal(free[:, 0], math.layers[layer].deltas.free)
        assert torch.equal(free[:, 1], law.layers[layer].deltas.free)


@torch.no_grad()
def test_experts_that_leave_no_room_for_disjoint_ones_load_and_go_on(tmp_path: Path) -> None:
    parts = [
        made(tmp_path, names, seed=seed, density=density)[0]
        for seed, (names, density) in enumerate([(["math", "code"], 0.3), (["law", "art"], 0.2)])
    ]
    combined = combine([open_adapter(part) for part in parts])
    config = combined.metadata.config
    assert config.support_scope == "per_expert" and config.num_experts * config.density > 1
    path = write_weights(combined, tmp_path / "all", dtype=torch.float32)
    own = load_adapter(path, base=tiny_llama())
    peft = PeftModel.from_pretrained(tiny_llama(), write_peft(combined, tmp_path / "peft", dtype=None))
    torch.testing.assert_close(peft(input_ids=tokens()).logits, own(tokens()).logits)
    started = resolve({}, {"start_from": str(path)}, read_inputs=read_run_inputs)
    assert started.adapter.support_strategy == "random"
    check_support(started.adapter, tiny_llama().config.hidden_size, tiny_llama().config.intermediate_size)


@torch.no_grad()
def test_the_router_sends_each_domain_to_its_expert(tmp_path: Path) -> None:
    sources = [made(tmp_path, [name], seed=seed)[0] for seed, name in enumerate(["math", "code", "law"], 1)]
    model = load_adapter(
        write_weights(combine([open_adapter(file) for file in sources], top_k=2), tmp_path / "all", dtype=None),
        base=tiny_llama(),
    )
    assert model.config.top_k == 2
    generator = torch.Generator().manual_seed(9)
    for layer, statistics in zip(model.layers, model.origins.statistics, strict=True):
        for expert in range(3):
            noise = torch.randn(200, 32, generator=generator)
            logits = layer.router(statistics.mean[expert] + statistics.spread[expert] * noise)
            assert float((logits.argmax(1) == expert).float().mean()) > 0.95
            top = logits.topk(2).values
            assert 0.5 < float((top[:, 0] - top[:, 1]).median()) < 6  # nats, see clustering.TARGET_GAP


def test_the_verb_and_what_its_result_serves_for(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = save_base("llama", tmp_path / "base")
    model = AutoModelForCausalLM.from_pretrained
    forms: list[dict[str, Any]] = [{"density": 0.02}, {"density": 0.05, "num_atoms": 2, "support_strategy": "random"}]
    places = [
        str(made(tmp_path, ["math", "code"][: 2 - i], seed=i + 1, base=model(base), **form)[0])
        for i, form in enumerate(forms)
    ]
    fails(capsys, ["combine", *places, "--output", str(tmp_path / "no")], "expert 'math'", "--rename 2:math=NAME")
    (tmp_path / "second").mkdir()
    places[1] = str(Path(places[1]).rename(tmp_path / "second" / "srde_weights.safetensors"))
    places[0] = str(made(tmp_path, ["math", "code"], seed=1, base=model(base), **forms[0])[0])
    path = str(tmp_path / "all.safetensors")
    assert main(["combine", *places, "--rename", "2:math=law", "--output", path, "--top_k", "2"]) == 0
    assert capsys.readouterr().out.splitlines() == [path]
    combined = load_adapter(path, base=str(base))
    assert combined.expert_names == ["math", "code", "law"]
    assert main(["inspect", path, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [entry["verb"] for entry in found["history"]] == ["train", "train", "rename", "combine"]
    assert list(found["domain_tokens"]) == ["math", "code", "law"]
    (tmp_path / "converter.py").write_text(CONVERTER)
    moe, gguf, dense = (str(tmp_path / name) for name in ("moe", "m.gguf", "dense"))
    assert main(["convert", path, "--to", "moe", "--output", moe]) == 0
    assert main(["convert", path, "--to", "dense", "--expert", "law", "--output", dense]) == 0
    script = str(tmp_path / "converter.py")
    assert main(["convert", path, "--to", "gguf", "--output", gguf, "--gguf_converter", script]) == 0
    with torch.no_grad():
        ids = tokens()
        torch.testing.assert_close(model(moe)(ids).logits, combined(ids).logits, rtol=1e-5, atol=1e-4)
        torch.testing.assert_close(model(dense)(ids).logits, alone(combined, "law"), rtol=1e-5, atol=1e-4)
    assert Path(gguf).exists()


def test_inference_and_evaluation_take_it(tmp_path: Path) -> None:
    base = save_base_with_tokenizer(tmp_path / "base")
    load = AutoModelForCausalLM.from_pretrained
    places = [made(tmp_path, [name], seed=i, base=load(base))[0] for i, name in enumerate(["red", "green"])]
    assert main(["combine", *map(str, places), "--output", str(tmp_path / "all")]) == 0
    model, _ = load_model(ModelOptions(str(tmp_path / "all"), str(base), bf16=False))
    assert model.expert_names == ["red", "green"] and model.config.top_k == 1
    policy = RoutingPolicy(choices={})
    with torch.no_grad():
        model(tokens(), policy=policy)
    assert policy.choices is not None and len(policy.choices) == 2
    items = write_jsonl(tmp_path / "items.jsonl", [item for name in ("red", "green") for item in sums(name, range(3))])
    found = tmp_path / "evaluation.json"
    options = ["--eval_file", str(items), "--output_file", str(found), "--bf16", "false", "--max_new_tokens", "2"]
    assert main(["evaluate", str(tmp_path / "all"), *options]) == 0
    usage = json.loads(found.read_text())["usage"]
    assert usage["experts"] == usage["domains"] == ["red", "green"]


def test_what_does_not_fit_together_is_refused_by_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    math, model = made(tmp_path, ["math"], seed=1)
    element = made(tmp_path, ["element"], seed=2, granularity="element", density=0.002)[0]
    other = made(tmp_path, ["other"], seed=2, base=tiny_llama(seed=5))[0]
    parts = made(tmp_path, ["parts"], seed=2, neuron_parts=2)[0]
    model.origins.domain_tokens, model.origins.statistics = {}, []
    unknown = stored(with_names(model, "unknown"), tmp_path / "unknown")
    code = str(made(tmp_path, ["code"], seed=3)[0])
    output = ["--output", str(tmp_path / "all")]
    for places, options, fragments in (
        ([math, other], [], ["other.safetensors", "trained on", "adapters of one base"]),
        ([math, element], [], ["element.safetensors", "granularity=element"]),
        ([math, parts], [], ["parts.safetensors", "neuron_parts=2", "has 1"]),
        ([math, unknown], [], ["unknown", "no statistics of a domain 'unknown'", "srde-ds remove"]),
        ([math, math], [], ["expert 'math'", "--rename 2:math=NAME"]),
        ([math], [], ["only one adapter"]),
        ([math, code], ["--top_k", "3"], ["top_k=3", "number of experts, 2"]),
        ([math, code], ["--rename", "lore=law"], ["rename=lore=law", "0 of the adapters"]),
        ([math, math], ["--rename", "math=law"], ["2 of the adapters", "1:math=law or 2:math=law"]),
        ([math, code], ["--rename", "3:math=law"], ["there are 2 adapters"]),
        ([math, code], ["--rename", "math"], ["old=new"]),
        ([math, code], ["--rename", "math=code"], ["expert 'code'"]),
        ([math, tmp_path / "none"], [], ["none'"]),
        ([math, code], ["--router_steps", "5"], ["router_steps=5 without router_data: give --router_data"]),
        ([math, code], ["--base", "b"], ["base=b without router_data"]),
        ([math, code], ["--router_data", "few.jsonl"], ["router_data with top_k=1", "Give --top_k 2"]),
    ):
        fails(capsys, ["combine", *map(str, places), *output, *options], *fragments)
    fails(capsys, ["combine", *output], "weights is missing")
    fails(capsys, ["combine", str(math), code], "output is missing: give --output FILE")
    assert not (tmp_path / "all").exists()


def with_names(model: SRDEModel, *names: str) -> SRDEModel:
    model.expert_names = list(names)
    return model


def test_domains_that_are_alike_are_refused(tmp_path: Path) -> None:
    places = []
    for name in ("math", "code"):
        path, model = made(tmp_path, [name], seed=1)
        same = [DomainStatistics.independent(torch.ones(1, 32), torch.zeros(1, 32)) for _ in model.layers]
        model.origins.update({name: 5}, same)
        save_weights(path, model.adapter_tensors(), model.metadata())
        places.append(open_adapter(path))
    with pytest.raises(SRDEError, match="layer 0: the statistics of the domains math, code are too similar"):
        combine(places)


def test_rename_and_remove(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, model = made(tmp_path, ["math", "code", "law"], seed=1, support_scope="per_expert")
    new, less = str(tmp_path / "new"), str(tmp_path / "less")
    assert main(["rename", str(path), "--names", "math=algebra,law=math", "--output", new]) == 0
    assert capsys.readouterr().out.splitlines() == [new]
    before, after = read_weights(path), read_weights(new)
    assert after.metadata.expert_names == list(after.metadata.domain_tokens) == ["algebra", "code", "math"]
    assert all(torch.equal(before.tensors[name].load(), after.tensors[name].load()) for name in before.tensors)
    assert main(["remove", new, "--experts", "code", "--output", less]) == 0
    loaded = load_adapter(less, base=tiny_llama())
    assert loaded.expert_names == ["algebra", "math"]
    assert [entry["verb"] for entry in loaded.origins.history] == ["train", "rename", "remove"]
    model.set_active_experts(["math", "law"])
    with torch.no_grad():
        torch.testing.assert_close(loaded(tokens()).logits, model(tokens()).logits, rtol=1e-5, atol=1e-5)
    for verb, options, fragments in (
        ("rename", ["--names", "maths=x"], ["has no expert 'maths'", "Did you mean 'math'?"]),
        ("rename", ["--names", "math=law"], ["would be called 'law'"]),
        ("rename", ["--names", "math"], ["rename=math", "old=new"]),
        ("rename", ["--names", "math=a,math=b"], ["given twice"]),
        ("remove", ["--experts", "maths"], ["expert 'maths'", "Did you mean 'math'?"]),
        ("remove", ["--experts", "math,code,law"], ["would be left"]),
    ):
        fails(capsys, [verb, str(path), *options, "--output", str(tmp_path / "no")], *fragments)
    assert not (tmp_path / "no").exists()
