"""SRDE as a method of PEFT: the behaviours that PEFT's own tests ask of its methods, and the project's own form."""

from __future__ import annotations

import copy
import doctest
import json
import re
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any, cast

import peft
import pytest
import torch
from peft import (
    AutoPeftModelForCausalLM,
    LoraConfig,
    PeftConfig,
    PeftModel,
    PeftType,
    get_peft_model,
    inject_adapter_in_model,
)

from srde_ds.compose.summary import inspect_weights
from srde_ds.errors import SRDEError
from srde_ds.model.adapter import add_experts
from srde_ds.model.prepared import Preparation
from srde_ds.peft import SRDEConfig, SRDETuner, registration
from tests.cli_helpers import save_base
from tests.helpers import adapter_config, randomize, tiny_llama, tiny_srde, tokens
from tests.peft_helpers import NAMES, loaded, logits, peft_config, saved, tiny_peft
from tests.unit.test_adapter import FORMS

ROOT = Path(__file__).parents[2]


def gradients(model: Any) -> dict[str, torch.Tensor]:
    return {name: p.grad for name, p in model.named_parameters() if p.requires_grad and p.grad is not None}


# The same as the project's own form


@pytest.mark.parametrize("form", FORMS)
def test_forward_and_gradients_are_those_of_the_own_form(form: dict[str, Any]) -> None:
    own, model = randomize(tiny_srde(**form)).train(), tiny_peft(**form).train()
    ids = tokens()
    own_logits, found = own(ids).logits, model(input_ids=ids).logits
    assert torch.equal(own_logits, found)
    own_logits.square().mean().backward()
    for config in model.peft_config.values():
        assert config.router_z_weight == 0.001
        config.router_z_weight = 0.0
    model(input_ids=ids).logits.square().mean().backward()
    expected = [p.grad for _, p in own.trainable_parameters()]
    assert len(gradients(model)) == len(expected)
    for gradient, other in zip(gradients(model).values(), expected, strict=True):
        assert other is not None and torch.equal(gradient, other)
    own.eval(), model.eval()
    with torch.no_grad():
        assert torch.equal(own(ids).logits, model(input_ids=ids).logits)


def test_new_experts_change_nothing() -> None:
    assert torch.equal(logits(tiny_peft(random=False), tokens()), logits(tiny_llama(), tokens()))


def test_the_model_as_an_own_form_shares_its_tensors() -> None:
    model = tiny_peft()
    view = model.srde_model()
    assert view.expert_names == NAMES and len(view.layers) == 2
    assert torch.equal(view(tokens()).logits, model(input_ids=tokens()).logits)
    one = dict(view.trainable_parameters())["layers.0.router.weight"]
    assert one is model.base_model.model.model.layers[0].mlp.srde_experts["default"].router.weight
    view.set_active_experts(["expert1"])
    own = randomize(tiny_srde())
    own.set_active_experts(["expert1"])
    assert torch.equal(logits(model, tokens()), logits(own, tokens()))
    with pytest.raises(SRDEError, match="call the method of the PEFT model"):
        view.merge_and_unload("expert1")


# Configuration and registration


def test_importing_the_room_makes_the_method_known(tmp_path: Path) -> None:
    folder = saved(tiny_peft(), tmp_path)
    assert PeftType("SRDE") is PeftConfig.from_pretrained(str(folder)).peft_type and "SRDE" in list(PeftType)
    registration.register(SRDEConfig, SRDETuner)  # a second time
    assert [kind for kind in PeftType].count(PeftType("SRDE")) == 1
    assert copy.deepcopy(PeftType("SRDE")) is PeftType("SRDE")
    program = (
        "import sys, srde_ds.peft; from peft import PeftConfig;"
        f"assert 'deepspeed' not in sys.modules; print(PeftConfig.from_pretrained({str(folder)!r}).num_experts)"
    )
    result = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert (result.returncode, result.stdout) == (0, "3\n"), result.stderr


def test_another_peft_is_refused_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(PeftType._member_map_, "SRDE")
    monkeypatch.setattr(registration, "NEEDED", ("no_such_method",))
    with pytest.raises(
        SRDEError, match=rf"peft {peft.__version__}: .*no_such_method.*Install a version that was tested: "
    ):
        registration.register(SRDEConfig, SRDETuner)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"density": 2.0}, "density=2.0: must be at most 1.0"),
        ({"granularity": "row"}, "granularity='row': choose one of neuron, block, element"),
        ({"router_z_weight": -1}, "router_z_weight=-1.0: must be at least 0"),
        ({"support_strategy": "gradient"}, "support_strategy=gradient: needs data"),
        ({"target_modules": ["q_proj"]}, "target_modules=.*Leave it out"),
        ({"top_k": 4}, "top_k=4: must not exceed num_experts=3"),
        ({"expert_names": ["a"]}, "num_experts=3, but 1 expert names"),
        ({"support_scope": "per_expert", "density": 0.5}, "3 disjoint slices"),
    ],
)
def test_bad_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(SRDEError, match=message):
        tiny_peft(**options)


def form_of(model: Any) -> tuple[int, str]:
    config = model.peft_config["default"]
    return config.neuron_parts, config.support_strategy


@pytest.mark.parametrize(
    ("hidden", "options", "form"),
    [
        (32, {}, (4, "random")),
        (30, {}, (1, "magnitude")),
        (32, {"num_atoms": 2}, (1, "magnitude")),
        (32, {"density": 0.3}, (1, "magnitude")),
        (32, {"support_strategy": "magnitude"}, (1, "magnitude")),
        (32, {"neuron_parts": 2}, (2, "random")),
    ],
)
def test_the_form_follows_from_options_and_base_as_in_a_run(
    hidden: int, options: dict[str, Any], form: tuple[int, str]
) -> None:
    """Whether they are given at once or set afterwards."""
    base = partial(tiny_llama, hidden_size=hidden, num_attention_heads=1, num_key_value_heads=1)
    later = SRDEConfig(num_experts=3, density=0.05)
    for name, value in options.items():
        setattr(later, name, value)
    for config in (SRDEConfig(**{"num_experts": 3, "density": 0.05} | options), later):
        assert form_of(get_peft_model(base(), config)) == form


def test_options_that_a_saved_configuration_lacks_are_those_of_its_metadata(tmp_path: Path) -> None:
    model = get_peft_model(tiny_llama(), SRDEConfig(num_experts=3, density=0.05))
    model.save_pretrained(str(tmp_path))
    path = tmp_path / "adapter_config.json"
    options = json.loads(path.read_text())
    path.write_text(json.dumps({k: v for k, v in options.items() if k not in ("neuron_parts", "support_strategy")}))
    assert form_of(PeftModel.from_pretrained(tiny_llama(), tmp_path)) == (4, "random")


def test_an_adapter_that_is_older_than_parts_of_neurons_loads(tmp_path: Path) -> None:
    model = tiny_peft(support_strategy="random")  # a new one with these options would have quarters
    path = saved(model, tmp_path) / "adapter_config.json"
    options = json.loads(path.read_text())
    del options["neuron_parts"]
    path.write_text(json.dumps(options))
    assert form_of(loaded(tmp_path)) == (1, "random")
    assert torch.equal(logits(loaded(tmp_path), tokens()), logits(model, tokens()))


def test_a_configuration_serves_several_bases_and_stays_as_it_was() -> None:
    config = peft_config(expert_names=None)
    first, second = (get_peft_model(tiny_llama(seed=seed), config) for seed in (0, 1))
    assert config == peft_config(expert_names=None) and config.metadata is None
    assert first.srde_model().expert_names == ["expert_0", "expert_1", "expert_2"]
    assert first.srde_model().base_identity["hash"] != second.srde_model().base_identity["hash"]


def test_the_configuration_of_a_saved_adapter_alone_makes_no_model(tmp_path: Path) -> None:
    config = PeftConfig.from_pretrained(str(saved(tiny_peft(), tmp_path)))
    model = get_peft_model(tiny_llama(), config)
    with pytest.raises(SRDEError, match="its values were not loaded. Use PeftModel.from_pretrained"):
        logits(model, tokens())
    with pytest.raises(SRDEError, match="there is nothing to save"):
        model.save_pretrained(tmp_path / "again")


def test_other_models_and_bases_with_experts_are_refused() -> None:
    with pytest.raises(SRDEError, match="base of type Linear: give a decoder"):
        SRDETuner(torch.nn.Linear(2, 2), {"default": peft_config()}, "default")
    with pytest.raises(SRDEError, match="already carries experts"):
        get_peft_model(tiny_srde().base, peft_config())


def test_what_would_drop_the_tuner_is_refused() -> None:
    with pytest.raises(ValueError, match="uses shared state"):
        inject_adapter_in_model(peft_config(), tiny_llama())


# Saving and loading


@pytest.mark.parametrize("form", FORMS)
def test_what_was_saved_loads_bit_for_bit(form: dict[str, Any], tmp_path: Path) -> None:
    model = tiny_peft(**form)
    model.srde_model().layers[1].router.load_selection_bias(torch.tensor([0.5, -0.5, 0.0]))
    again = loaded(saved(model, tmp_path), is_trainable=True)  # torch multiplies frozen matrices in another order
    assert torch.equal(logits(again.eval(), tokens()), logits(model, tokens()))
    frozen = loaded(tmp_path)
    assert not frozen.training and not any(p.requires_grad for p in frozen.parameters())
    torch.testing.assert_close(logits(frozen, tokens()), logits(model, tokens()), rtol=1e-5, atol=1e-5)
    state = again.srde_model().adapter_tensors()
    assert all(torch.equal(state[name], tensor) for name, tensor in model.srde_model().adapter_tensors().items())
    assert again.srde_model().metadata() == model.srde_model().metadata()
    assert {path.name for path in tmp_path.iterdir()} >= {"adapter_config.json", "adapter_model.safetensors"}


def test_a_loaded_adapter_can_be_trained_on(tmp_path: Path) -> None:
    model = loaded(saved(tiny_peft(), tmp_path), is_trainable=True).train()
    model(input_ids=tokens(), labels=tokens()).loss.backward()
    assert len(gradients(model)) == 4


def test_the_base_of_the_configuration_is_loaded(tmp_path: Path) -> None:
    tiny_llama().save_pretrained(tmp_path / "base")
    base = type(tiny_llama()).from_pretrained(tmp_path / "base")
    model = tiny_peft(base)
    folder = saved(model, tmp_path / "adapter")
    again = AutoPeftModelForCausalLM.from_pretrained(folder)
    assert torch.equal(logits(again, tokens()), logits(model, tokens()))


def test_damaged_or_foreign_values_are_refused(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = saved(tiny_peft(), tmp_path)
    with pytest.raises(SRDEError, match="weights 'adapter 'default'': trained on"):
        PeftModel.from_pretrained(tiny_llama(seed=1), folder)
    file = folder / "adapter_model.safetensors"
    tensors = load_file(file)
    tensors["base_model.model.layers.0.support"] += 1
    save_file(tensors, file)
    with pytest.raises(SRDEError, match="the supports do not match support_hash"):
        loaded(folder)
    del tensors["base_model.model.layers.0.deltas.free"]
    save_file(tensors, file)
    with pytest.raises(SRDEError, match=r"tensor layers.0.deltas.free is missing"):
        loaded(folder)
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"top_k": 1}))
    with pytest.raises(SRDEError, match="top_k=1: the adapter was made with 2"):
        loaded(folder)


def test_empty_experts_are_refused(tmp_path: Path) -> None:
    folder = saved(tiny_peft(), tmp_path)
    with pytest.raises(SRDEError, match="low_cpu_mem_usage=True"):
        loaded(folder, low_cpu_mem_usage=True)
    with pytest.raises(SRDEError, match="low_cpu_mem_usage=True"):
        tiny_peft().load_adapter(folder, "other", low_cpu_mem_usage=True)


# Several adapters, none, one expert


def test_several_adapters_on_one_base(tmp_path: Path) -> None:
    model, other = tiny_peft(), tiny_peft(num_experts=2, granularity="element", expert_names=["a", "b"])
    first, second = logits(model, tokens()), logits(other, tokens())
    model.load_adapter(saved(other, tmp_path / "other"), "second")
    assert torch.equal(logits(model, tokens()), first)
    model.set_adapter("second")
    assert torch.equal(logits(model, tokens()), second)
    assert model.srde_model().expert_names == ["a", "b"]
    model.save_pretrained(tmp_path / "both")
    again = loaded(tmp_path / "both")
    again.load_adapter(tmp_path / "both" / "second", "second")
    assert torch.equal(logits(again, tokens()), first)
    again.set_adapter("second")
    assert torch.equal(logits(again, tokens()), second)
    model.delete_adapter("second")
    assert model.active_adapters == ["default"] and torch.equal(logits(model, tokens()), first)
    with pytest.raises(SRDEError, match="one adapter at a time"):
        again.base_model.set_adapter(["default", "second"])
    with pytest.raises(SRDEError, match="adapter_names: a forward uses the experts of one adapter"):
        again(input_ids=tokens(), adapter_names=["default", "second"])


def test_an_added_adapter_is_frozen_until_it_is_chosen() -> None:
    model = tiny_peft()
    model.add_adapter("second", peft_config())
    trained = {name.split(".srde_experts.")[1].split(".")[0] for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {"default"}
    model.set_adapter("second")
    trained = {name.split(".srde_experts.")[1].split(".")[0] for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {"second"}


def test_disabled_and_unloaded_it_is_the_base() -> None:
    model, bare = tiny_peft(), logits(tiny_llama(), tokens())
    assert not torch.equal(logits(model, tokens()), bare)
    with model.disable_adapter():
        assert torch.equal(logits(model, tokens()), bare)
    assert not torch.equal(logits(model, tokens()), bare)
    base = model.unload()
    assert torch.equal(logits(base, tokens()), bare) and not hasattr(base, "peft_config")
    assert base.state_dict().keys() == tiny_llama().state_dict().keys()


@pytest.mark.parametrize("form", FORMS)
def test_one_expert_is_merged_and_all_are_refused(form: dict[str, Any]) -> None:
    model = tiny_peft(**form)
    with pytest.raises(
        SRDEError, match=r"cannot all be merged into a dense model. Give one with expert=... \(expert0, "
    ):
        model.merge_and_unload()
    with pytest.raises(SRDEError, match="expert 'expert4'"):
        model.merge_and_unload(expert="expert4")
    with pytest.raises(SRDEError, match="no single change of the weights"):
        model.merge_adapter()
    with pytest.raises(SRDEError, match="adapter_names=no_such: give one of default"):
        model.merge_and_unload(adapter_names=["no_such"], expert="expert1")
    merged = model.merge_and_unload(expert="expert1", safe_merge=True)
    expected = randomize(tiny_srde(**form)).merge_and_unload("expert1")
    assert torch.equal(logits(merged, tokens()), logits(expected, tokens()))
    get_peft_model(merged, LoraConfig(target_modules=["q_proj"]))  # an ordinary base again


def test_a_safe_merge_refuses_values_that_are_not_finite() -> None:
    model = tiny_peft()
    with torch.no_grad():
        model.srde_model().layers[0].deltas.free[0] = float("nan")
    with pytest.raises(SRDEError, match="not finite"):
        model.merge_and_unload(expert="expert1", safe_merge=True)


# Training


def test_the_count_of_trainable_parameters(capsys: pytest.CaptureFixture[str]) -> None:
    model = tiny_peft()
    trainable = sum(p.numel() for _, p in model.srde_model().trainable_parameters())
    total = sum(p.numel() for p in tiny_llama().parameters()) + trainable
    assert model.get_nb_trainable_parameters() == (trainable, total)
    model.print_trainable_parameters()
    assert f"trainable params: {trainable:,d} || all params: {total:,d}" in capsys.readouterr().out


@pytest.mark.parametrize("task_type", ["CAUSAL_LM", None])
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing_changes_no_gradient(task_type: str | None, use_reentrant: bool) -> None:
    found = []
    mask = torch.ones(2, 16, dtype=torch.long)
    mask[1, 9:] = 0
    for checkpointing in (False, True):
        model = tiny_peft(task_type=task_type, load_balancing_weight=0.5, router_z_weight=0.5).train()
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": use_reentrant})
            model.enable_input_require_grads()
        labels = tokens().masked_fill(mask == 0, -100)
        model(input_ids=tokens(), attention_mask=mask, labels=labels).loss.backward()
        sums = model.training_steps.finish()
        assert sums["tokens"].tolist() == [25, 25]
        model(input_ids=tokens(), attention_mask=mask, labels=labels).loss.backward()
        found.append(gradients(model))
    for name, gradient in found[0].items():
        assert gradient.isfinite().all() and gradient.any()
        torch.testing.assert_close(found[1][name], gradient, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_experts_are_trained_in_float32_on_a_base_in_half_precision(dtype: torch.dtype, tmp_path: Path) -> None:
    model = tiny_peft(tiny_llama(dtype=dtype))
    base, adapter = tiny_llama(dtype=dtype), adapter_config()
    own = randomize(add_experts(base, adapter, expert_names=NAMES, seed=0, dtype=torch.float32))
    assert {p.dtype for _, p in model.srde_model().trainable_parameters()} == {torch.float32}
    found = logits(model, tokens())
    assert found.dtype == dtype and found.isfinite().all() and torch.equal(found, logits(own, tokens()))
    again = PeftModel.from_pretrained(tiny_llama(dtype=dtype), saved(model, tmp_path), autocast_adapter_dtype=False)
    assert {p.dtype for _, p in again.srde_model().trainable_parameters()} == {dtype}
    model.train()(input_ids=tokens(), labels=tokens()).loss.backward()
    assert all(gradient.isfinite().all() for gradient in gradients(model).values())


def test_training_lowers_the_loss_and_leaves_the_base_alone() -> None:
    model = tiny_peft(random=False).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.02)
    losses = []
    for _ in range(8):
        loss = model(input_ids=tokens(), labels=tokens()).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0] - 0.1
    with model.disable_adapter():
        assert torch.equal(logits(model, tokens()), logits(tiny_llama(), tokens()))


# Use


def test_generation_follows_the_experts() -> None:
    model, own, base = tiny_peft(), randomize(tiny_srde()), cast("Any", tiny_llama())
    options: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    expected = own.generate(tokens(1, 5), **options)
    assert torch.equal(model.generate(input_ids=tokens(1, 5), **options), expected)
    assert torch.equal(model.generate(tokens(1, 5), **options), expected)
    assert not torch.equal(base.generate(tokens(1, 5), **options), expected)


def test_rollouts_in_train_mode_use_what_is_prepared_for_decoding(monkeypatch: pytest.MonkeyPatch) -> None:
    model, prepared = tiny_peft(), []
    options: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    expected = model.generate(tokens(1, 5), **options)
    put = Preparation.put

    def counted(preparation: Preparation, *made: Any) -> Any:
        prepared.append(preparation)
        return put(preparation, *made)

    monkeypatch.setattr(Preparation, "put", counted)
    model.train()
    versions = [parameter._version for parameter in model.parameters()]
    for gradients in (False, True):
        prepared.clear()
        with torch.set_grad_enabled(gradients):
            assert torch.equal(model.generate(tokens(1, 5), **options), expected)
        assert len(set(map(id, prepared))) == len(prepared) == 2  # each layer once, not for each token
        assert all(module.training for module in model.modules())
    assert [parameter._version for parameter in model.parameters()] == versions
    assert model.training_steps._statistics.is_empty
    with pytest.raises(ValueError, match="max_new_tokens"):
        model.generate(tokens(1, 5), max_new_tokens=-1)
    assert all(module.training for module in model.modules())


def test_a_compiled_model_gives_the_same_gradients() -> None:
    found = []
    for compiled in (False, True):
        model = tiny_peft(tiny_llama(num_hidden_layers=1), router_z_weight=0.5).train()
        run: Any = torch.compile(model, backend="aot_eager") if compiled else model
        run(input_ids=tokens(), labels=tokens()).loss.backward()
        assert model.training_steps.finish()["tokens"].tolist() == [32]
        found.append(gradients(model))
    assert len(found[0]) == 2
    for name, gradient in found[0].items():
        torch.testing.assert_close(found[1][name], gradient, rtol=1e-5, atol=1e-6)


def test_a_copy_of_the_model_is_its_own() -> None:
    model = tiny_peft()
    other = copy.deepcopy(model)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(0.5)
    assert torch.equal(logits(other, tokens()), logits(tiny_peft(), tokens()))


# The page and the example


def test_the_page_works_as_it_stands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_base(tmp_path / "base")
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"^```python\n(.*?)^```", (ROOT / "docs/peft.md").read_text(encoding="utf-8"), re.M | re.S)
    names: dict[str, Any] = {}
    for block in blocks:
        exec(block, names)
    assert len(blocks) == 4 and names["statistics"].keys() >= {"tokens", "assignments"}
    assert not any("srde" in name for name in names["dense"].state_dict())
    assert inspect_weights("adapter").domain_tokens == {"red": 3, "green": 3}
    test = doctest.DocTestFinder(recurse=False).find(SRDEConfig, "SRDEConfig", globs={})
    assert doctest.DocTestRunner().run(test[0]).failed == 0 and test[0].examples
