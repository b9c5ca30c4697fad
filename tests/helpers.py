"""Tiny models for the tests."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma4TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    Mistral3Config,
    Mistral3ForConditionalGeneration,
    PreTrainedModel,
)

from srde_ds.config import AdapterConfig
from srde_ds.model.adapter import SRDEModel, add_experts

SIZES: dict[str, Any] = {
    "vocab_size": 101,
    "hidden_size": 32,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "initializer_range": 0.2,  # at the default 0.02 a tiny model's logits hardly depend on its layers
}
"""of a tiny base of any family"""


def tiny_mistral3(**text: Any) -> PreTrainedModel:
    """An image encoder beside the text decoder, which the files keep under another name."""
    vision = {
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "head_dim": 8,
        "image_size": 28,
        "patch_size": 14,
        "model_type": "pixtral",
    }
    decoder = SIZES | {"model_type": "ministral3", "head_dim": 8} | text
    return Mistral3ForConditionalGeneration(Mistral3Config(vision_config=vision, text_config=decoder))


def tiny_llama(*, seed: int = 0, dtype: torch.dtype = torch.float32, **overrides: Any) -> PreTrainedModel:
    """Two layers, D 32, F 96, vocabulary 101; random weights, frozen, eval mode."""
    values = SIZES | {"tie_word_embeddings": True, "attn_implementation": "sdpa"} | overrides
    torch.manual_seed(seed)
    model: Any = LlamaForCausalLM(LlamaConfig(**values))
    return model.to(dtype).requires_grad_(False).eval()


def gemma4(**changes: Any) -> Gemma4TextConfig:
    """A tiny base whose first layer has heads of 8 values, and its second of 16."""
    own = {"head_dim": 8, "global_head_dim": 16, "layer_types": ["sliding_attention", "full_attention"]}
    per_layer = {"hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": SIZES["vocab_size"]}
    return Gemma4TextConfig(**SIZES | own | per_layer | {"pad_token_id": 0} | changes)


@contextmanager
def counted_measurements() -> Iterator[list[str]]:
    """A list that gets an entry for each base that is built without weights in order to measure it."""
    from srde_ds.model import base_shape

    built: list[str] = []
    build = AutoModelForCausalLM.from_config

    def noted(config: Any, **options: Any) -> Any:
        built.append(config.name_or_path)
        return build(config, **options)

    base_shape._measure.cache_clear()  # of what other tests have measured
    with patch.object(AutoModelForCausalLM, "from_config", noted):
        yield built


def adapter_config(**overrides: Any) -> AdapterConfig:
    """Three experts, two a token, five of tiny_llama's 96 neurons."""
    return AdapterConfig(**({"num_experts": 3, "top_k": 2, "density": 0.05} | overrides))


def tiny_srde(
    *,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    base: PreTrainedModel | None = None,
    target_density: float | None = None,
    **overrides: Any,
) -> SRDEModel:
    """tiny_llama with experts; `overrides` go to the adapter config."""
    config = adapter_config(**overrides)
    names = [f"expert{e}" for e in range(config.num_experts)]
    base = base or tiny_llama(dtype=dtype)
    return add_experts(base, config, expert_names=names, seed=seed, target_density=target_density)


def randomize(model: SRDEModel, *, seed: int = 1, scale: float = 0.3) -> SRDEModel:
    """Random deltas and routers far from their initial values, in place."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for _, parameter in model.trainable_parameters():
            noise = torch.randn(parameter.srde_shape, generator=generator)
            parameter[: parameter.srde_shape[0]] += (scale * noise).to(parameter.dtype)
    return model


def tokens(batch: int = 2, length: int = 16, *, vocabulary: int = 101, seed: int = 0) -> torch.Tensor:
    return torch.randint(1, vocabulary, (batch, length), generator=torch.Generator().manual_seed(seed))


def gradient_of(parameter: torch.Tensor) -> torch.Tensor:
    """Its gradient, which must be there."""
    assert parameter.grad is not None
    return parameter.grad
