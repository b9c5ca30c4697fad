"""Experts of PEFT on bases whose projections keep packed buffers and no matrix, as those of GPTQ and AWQ.

The projections here are stand-ins for those of GPTQModel, whose `weight` is missing (AWQ) or no tensor (GPTQ).
"""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor, nn

from srde_ds.errors import SRDEError
from srde_ds.model.adapter import add_experts
from tests.helpers import adapter_config, randomize, tiny_llama, tokens
from tests.peft_helpers import NAMES, loaded, logits, saved, tiny_peft, with_gradients


class PackedLinear(nn.Module):
    """Whole numbers and a scale for each output, which only the forward puts together."""

    qweight: Tensor
    scales: Tensor

    def __init__(self, plain: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = plain.in_features, plain.out_features
        scales = plain.weight.abs().amax(1, keepdim=True) / 127
        self.register_buffer("qweight", (plain.weight / scales).round().to(torch.int8))
        self.register_buffer("scales", scales)

    def forward(self, x: Tensor) -> Tensor:
        return x @ (self.qweight * self.scales).T.to(x.dtype)


class DescribedLinear(PackedLinear):
    """One with a `weight` that only describes it."""

    @property
    def weight(self) -> Any:
        return SimpleNamespace(dtype=torch.float16, shape=(self.out_features, self.in_features), device="cpu")


KINDS = [PackedLinear, DescribedLinear]


@torch.no_grad()
def packed(kind: type[PackedLinear], *, seed: int = 0, dtype: torch.dtype = torch.float32) -> Any:
    """tiny_llama with such projections, as transformers loads a quantised checkpoint."""
    base: Any = tiny_llama(seed=seed, dtype=dtype)
    for layer in base.model.layers:
        for owner in (layer.self_attn, layer.mlp):
            for name, child in list(owner.named_children()):
                if isinstance(child, nn.Linear):
                    setattr(owner, name, kind(child))
    base.is_quantized = True
    base.hf_quantizer = SimpleNamespace(pre_quantized=True, is_compileable=False)
    return base


@torch.no_grad()
def unpacked(base: Any) -> Any:
    """The same values in plain matrices."""
    plain: Any = tiny_llama()
    for own, other in zip(plain.modules(), base.modules(), strict=True):
        assert type(own) is type(other) or isinstance(other, PackedLinear)
        if isinstance(other, PackedLinear):
            assert isinstance(own, nn.Linear)
            own.weight.copy_(other.qweight * other.scales)
    return plain


@pytest.mark.parametrize("kind", KINDS)
def test_experts_are_trained_saved_and_loaded(kind: type[PackedLinear], tmp_path: Path) -> None:
    model = with_gradients(packed(kind))
    expected = logits(model, tokens())
    again = PeftModel.from_pretrained(packed(kind), saved(model, tmp_path), is_trainable=True).eval()
    assert torch.equal(logits(again, tokens()), expected)
    generated = model.generate(input_ids=tokens(), max_new_tokens=3, do_sample=False, pad_token_id=0)
    assert torch.equal(generated, again.generate(input_ids=tokens(), max_new_tokens=3, do_sample=False, pad_token_id=0))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("granularity", ["neuron", "block", "element"])
def test_they_compute_what_they_would_on_plain_matrices(kind: type[PackedLinear], granularity: str) -> None:
    model = tiny_peft(packed(kind), granularity=granularity)
    whole = tiny_peft(unpacked(packed(kind)), granularity=granularity)
    for layer, other in zip(model.srde_model().layers, whole.srde_model().layers, strict=True):
        assert torch.equal(layer.support, other.support)  # chosen by the dequantised values
    torch.testing.assert_close(logits(model, tokens()), logits(whole, tokens()), rtol=1e-4, atol=1e-5)


def test_supports_are_read_in_the_dtype_of_the_base() -> None:
    half = tiny_peft(packed(PackedLinear, dtype=torch.bfloat16), density=0.25)
    whole = tiny_peft(packed(PackedLinear), density=0.25)
    for layer, other in zip(half.srde_model().layers, whole.srde_model().layers, strict=True):
        assert len(set(layer.support.tolist()) & set(other.support.tolist())) >= 20  # of 24, which rounding may swap


@pytest.mark.parametrize("kind", KINDS)
def test_merging_is_refused(kind: type[PackedLinear]) -> None:
    model = tiny_peft(packed(kind))
    expected = logits(model, tokens())
    line = rf"the expert cannot be merged: layer 0 of the base has quantised weights \({kind.__name__}\); load the base"
    with pytest.raises(SRDEError, match=line):
        model.merge_and_unload(expert="expert1")
    assert torch.equal(logits(model, tokens()), expected)


def test_the_base_is_recognised(tmp_path: Path) -> None:
    saved(tiny_peft(packed(PackedLinear)), tmp_path / "packed")
    PeftModel.from_pretrained(packed(DescribedLinear), tmp_path / "packed")  # another kernel for the same values
    for other in (packed(PackedLinear, seed=1), tiny_llama()):
        with pytest.raises(SRDEError, match="trained on an unnamed model .*, but the base given is an unnamed model"):
            PeftModel.from_pretrained(other, tmp_path / "packed")
    whole = saved(tiny_peft(), tmp_path / "whole")
    assert loaded(whole)
    with pytest.raises(SRDEError, match="trained on an unnamed model .*, but the base given is an unnamed model"):
        PeftModel.from_pretrained(packed(PackedLinear), whole)


@pytest.mark.parametrize("kind", KINDS)
def test_the_own_form_asks_for_a_random_support(kind: type[PackedLinear]) -> None:
    with pytest.raises(SRDEError, match="no plain weights of shapes .*use support_strategy=random"):
        add_experts(packed(kind), adapter_config(), expert_names=NAMES, seed=0)
    random = adapter_config(support_strategy="random")
    model = randomize(add_experts(packed(kind), random, expert_names=NAMES, seed=0))
    peft = tiny_peft(packed(kind), support_strategy="random")
    with torch.no_grad():
        assert torch.equal(model(tokens()).logits, logits(peft, tokens()))
    with pytest.raises(SRDEError, match=rf"quantised weights \({kind.__name__}\)"):
        model.merge_and_unload("expert1")
