"""Experts of PEFT on bases that bitsandbytes has quantised."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, prepare_model_for_kbit_training
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from srde_ds.errors import SRDEError
from srde_ds.model.adapter import add_experts
from srde_ds.model.base import base_identity
from srde_ds.model.quantization import dense_weight, keep_differentiable
from tests.helpers import adapter_config, tiny_llama, tokens
from tests.peft_helpers import NAMES, loaded, logits, saved, tiny_peft, with_gradients

pytestmark = pytest.mark.skipif(find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed")

KINDS: list[dict[str, Any]] = [
    {"load_in_8bit": True},
    {"load_in_4bit": True, "bnb_4bit_compute_dtype": torch.float32},
    {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("base")
    tiny_llama(hidden_size=64, intermediate_size=128).save_pretrained(path)
    return path


def quantized(folder: Path, kind: dict[str, Any]) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, quantization_config=BitsAndBytesConfig(**kind))


@pytest.mark.parametrize("kind", KINDS)
def test_experts_are_trained_and_saved(kind: dict[str, Any], folder: Path, tmp_path: Path) -> None:
    base = prepare_model_for_kbit_training(quantized(folder, kind), use_gradient_checkpointing=False)
    model = with_gradients(base)
    with pytest.raises(SRDEError, match="expert cannot be merged: .*quantised"):
        model.merge_and_unload(expert="expert1")
    again = PeftModel.from_pretrained(quantized(folder, kind), saved(model, tmp_path))
    state = again.srde_model().adapter_tensors()
    assert all(torch.equal(state[name], tensor) for name, tensor in model.srde_model().adapter_tensors().items())


@pytest.mark.parametrize(
    "form",
    [{}, {"shared_expert_density": 0.1}, {"granularity": "element"}, {"granularity": "block", "density": 0.25}],
)
def test_experts_train_under_autocast_on_a_base_in_4_bits(form: dict[str, Any], folder: Path) -> None:
    kind = {"load_in_4bit": True, "bnb_4bit_compute_dtype": torch.bfloat16}
    base = prepare_model_for_kbit_training(quantized(folder, kind), use_gradient_checkpointing=False)
    model = tiny_peft(base, **form).train()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = model(input_ids=tokens(), labels=tokens()).loss
    loss.backward()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in trained)


def test_the_support_is_chosen_by_the_quantised_values(folder: Path) -> None:
    whole = tiny_peft(AutoModelForCausalLM.from_pretrained(folder), density=0.25)
    model = tiny_peft(quantized(folder, KINDS[0]), density=0.25)
    for layer, other in zip(model.srde_model().layers, whole.srde_model().layers, strict=True):
        assert len(set(layer.support.tolist()) & set(other.support.tolist())) >= 30  # of 32, which rounding may swap


def test_an_adapter_of_the_whole_base_fits_the_quantised_one(folder: Path, tmp_path: Path) -> None:
    whole = tiny_peft(AutoModelForCausalLM.from_pretrained(folder))
    saved(whole, tmp_path)
    base = quantized(folder, KINDS[0])
    model = PeftModel.from_pretrained(base, tmp_path)
    own = quantized(folder, KINDS[0])
    assert not torch.equal(logits(model, tokens()), logits(own, tokens()))
    model.load_adapter(tmp_path, "second")
    other = tiny_llama(hidden_size=64, intermediate_size=128, seed=1)
    other.save_pretrained(tmp_path / "other")
    saved(tiny_peft(AutoModelForCausalLM.from_pretrained(tmp_path / "other")), tmp_path / "foreign")
    with pytest.raises(SRDEError, match="'third'': trained on"):
        model.load_adapter(tmp_path / "foreign", "third")
    with pytest.raises(SRDEError, match="the base given is"):
        loaded(tmp_path)


@pytest.mark.parametrize("kind", KINDS[:2])
def test_the_own_form_has_the_same_support_and_gradients(kind: dict[str, Any], folder: Path) -> None:
    model = add_experts(quantized(folder, kind), adapter_config(), expert_names=NAMES, seed=0)
    peft = tiny_peft(quantized(folder, kind))
    for layer, other in zip(model.layers, peft.srde_model().layers, strict=True):
        assert torch.equal(layer.support, other.support)
    assert model.base_identity == base_identity(tiny_llama(hidden_size=64, intermediate_size=128)) | {
        "name": str(folder)
    }
    embedded = model.base.get_input_embeddings()(tokens()).requires_grad_()
    for train in (False, True):  # a forward in eval mode changes nothing
        output = model.train(train).base(inputs_embeds=embedded).logits
    assert float(torch.autograd.grad(output.square().sum(), embedded)[0].abs().min()) > 0


def test_a_base_that_was_repacked_for_inference(
    folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    base = quantized(folder, KINDS[1])
    projection = base.model.layers[0].mlp.up_proj
    keep_differentiable(base)
    assert not caplog.text and dense_weight(projection) is not None
    monkeypatch.setattr(projection.weight.quant_state, "packing_format_for_cpu", True, raising=False)
    keep_differentiable(base)
    assert dense_weight(projection) is None
    assert "No gradient passes them: to train, load the base again" in caplog.text
