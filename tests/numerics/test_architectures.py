"""Every gated decoder is found by structure and keeps its logits; everything else says what was found."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers as t
from transformers import PreTrainedModel

from srde_ds.errors import SRDEError
from srde_ds.model.adapter import add_experts
from srde_ds.model.base import load_base
from srde_ds.model.feed_forward import find_feed_forward
from tests.helpers import SIZES, adapter_config, gemma4, randomize, tiny_mistral3, tokens

WITH_HEADS = SIZES | {"head_dim": 8}

SUPPORTED: dict[str, Callable[[], PreTrainedModel]] = {
    "llama": lambda: t.LlamaForCausalLM(t.LlamaConfig(**WITH_HEADS, mlp_bias=True)),
    "mistral": lambda: t.MistralForCausalLM(t.MistralConfig(**WITH_HEADS)),
    "ministral": lambda: t.MinistralForCausalLM(t.MinistralConfig(**WITH_HEADS)),
    "ministral3": lambda: t.Ministral3ForCausalLM(t.Ministral3Config(**WITH_HEADS)),
    "mistral3": tiny_mistral3,
    "qwen2": lambda: t.Qwen2ForCausalLM(t.Qwen2Config(**WITH_HEADS)),
    "qwen3": lambda: t.Qwen3ForCausalLM(t.Qwen3Config(**WITH_HEADS)),
    "gemma": lambda: t.GemmaForCausalLM(t.GemmaConfig(**WITH_HEADS, pad_token_id=0)),
    "gemma2": lambda: t.Gemma2ForCausalLM(t.Gemma2Config(**WITH_HEADS, pad_token_id=0)),
    "gemma3": lambda: t.Gemma3ForCausalLM(t.Gemma3TextConfig(**WITH_HEADS, pad_token_id=0)),
    "gemma4": lambda: t.Gemma4ForCausalLM(gemma4()),
    "granite": lambda: t.GraniteForCausalLM(t.GraniteConfig(**WITH_HEADS)),
}


def build(name: str) -> PreTrainedModel:
    torch.manual_seed(0)
    return SUPPORTED[name]().eval()


@pytest.mark.parametrize("name", SUPPORTED)
def test_supported(name: str) -> None:
    base, ids = build(name), tokens(vocabulary=100)
    ids[ids == 5] = 6  # 5 stands for an image in mistral3
    expected = base(input_ids=ids).logits
    blocks = find_feed_forward(base)
    assert [(b.hidden, b.intermediate) for b in blocks] == [(32, 96)] * 2
    assert all(
        b.roles | {"act": ""} == {"gate": "gate_proj", "up": "up_proj", "down": "down_proj", "act": ""} for b in blocks
    )
    model = add_experts(base, adapter_config(), expert_names=["a", "b", "c"], seed=0)
    assert torch.equal(model(ids).logits, expected)
    randomize(model)
    with torch.no_grad():
        # A whole-sequence forward and one that ends on a cached prefix agree: generation is routed too.
        whole = model(ids).logits
        prefix = model(ids[:, :-1], use_cache=True)
        last = model(ids[:, -1:], past_key_values=prefix.past_key_values, use_cache=True).logits
    assert not torch.equal(whole, expected)
    torch.testing.assert_close(last[:, 0], whole[:, -1], rtol=1e-3, atol=1e-3)
    model(ids, labels=ids).loss_sum.backward()
    assert all(p.grad is not None and (p.grad != 0).any() for n, p in model.trainable_parameters() if "free" in n)


@pytest.mark.parametrize("name", ["llama", "mistral3"])
def test_supported_from_a_folder(name: str, tmp_path: Path) -> None:
    base = build(name)
    base.save_pretrained(tmp_path)
    loaded = load_base(str(tmp_path), dtype=torch.float32)
    assert type(loaded) is type(base)
    assert torch.equal(loaded(input_ids=tokens() % 5 + 6).logits, base(input_ids=tokens() % 5 + 6).logits)


UNSUPPORTED: dict[str, tuple[Callable[[], PreTrainedModel], str]] = {
    "mixtral": (
        lambda: t.MixtralForCausalLM(t.MixtralConfig(**WITH_HEADS, num_local_experts=4)),
        r"layer 0 \(MixtralDecoderLayer\).*found 0 in:.*mlp MixtralSparseMoeBlock \(.*MixtralExperts",
    ),
    "phi3": (
        lambda: t.Phi3ForCausalLM(t.Phi3Config(**(SIZES | {"head_dim": 8}), pad_token_id=0)),
        r"layer 0 \(Phi3DecoderLayer\).*found 0 in:.*Phi3MLP \(gate_up_proj Linear 32 -> 192, down_proj Linear 96",
    ),
    "gpt2": (
        lambda: t.GPT2LMHeadModel(t.GPT2Config(vocab_size=101, n_embd=32, n_layer=2, n_head=2)),
        r"layer 0 \(GPT2Block\).*found 0 in:.*GPT2MLP",
    ),
}


@pytest.mark.parametrize("name", UNSUPPORTED)
def test_unsupported_says_what_was_found(name: str) -> None:
    make, message = UNSUPPORTED[name]
    with pytest.raises(SRDEError, match=message) as error:
        find_feed_forward(make())
    assert "\n" not in str(error.value)
