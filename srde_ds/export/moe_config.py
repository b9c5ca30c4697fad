"""Checks which bases a stock mixture of experts can express, and makes its configuration (docs/convert.md).

In each layer, GraniteMoeShared of transformers computes Llama's attention, then shared_mlp(x) + the sum over the top K
of p_e expert_e(x), where p is the softmax over the K chosen logits of a router without bias.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from transformers import GraniteMoeSharedConfig

from srde_ds.config.granularity import PLURALS
from srde_ds.errors import SRDEError
from srde_ds.model.adapter_source import AdapterSource
from srde_ds.model.base_files import BaseFiles

# Model types whose code was compared; everything else about a base shows in its tensors and configuration.
MODEL_TYPES = ("llama", "mistral", "ministral", "ministral3", "qwen2", "granite")
ATTENTION = tuple(f"self_attn.{part}_proj" for part in "qkvo")
KEYS_AND_VALUES, OUTPUT = ATTENTION[1:3], ATTENTION[3]
NORMS = ("input_layernorm.weight", "post_attention_layernorm.weight")
# Rotary embeddings whose frequencies do not depend on max_position_embeddings.
FREE_OF_LENGTH = ("default", "linear", "llama3", "yarn")
# Kernels of grouped matrix products and block-wise quantisation want an expert's width to be a multiple of this.
WIDTH_MULTIPLE = 32


@dataclass(frozen=True)
class Multipliers:
    """The factors that scale a decoder's parts."""

    attention: float
    embedding: float = 1.0
    residual: float = 1.0
    logits: float = 1.0


def check_expressible(adapter: AdapterSource, base: BaseFiles) -> None:
    """Refuse a model that GraniteMoeShared cannot compute.

    Raises:
        SRDEError: with the reason and, if there is one, the remedy.
    """
    config = adapter.metadata.config
    if config.granularity != "neuron":
        raise _refusal(
            f"granularity={config.granularity} changes {PLURALS[config.granularity]} all over the matrices, but "
            "its experts consist of whole neurons. Merge one expert with --to dense, or train with granularity=neuron"
        )
    biased = adapter.selection_biases()
    if biased and config.top_k < config.num_experts:
        raise _refusal(
            f"the routers of {len(biased)} layers (the first is {biased[0]}) choose experts with a selection bias "
            "(balancing_bias_rate), which its router lacks, so it would choose others. Use them in Python, "
            "merge one with --to dense, or train with balancing_bias_rate=0"
        )
    own = {name.removeprefix("layers.0.") for name in base.decoder_shapes if name.startswith("layers.0.")}
    places = {*NORMS, *base.roles.values()} | {f"{part}.{kind}" for part in ATTENTION for kind in ("weight", "bias")}
    if own - places:
        raise _refusal(
            f"the base's layers have {', '.join(sorted(own - places))}, which it lacks "
            "(such as norms of queries and keys, biases in feed-forward blocks or further norms)"
        )
    text = base.empty.config.get_text_config()
    if text.model_type not in MODEL_TYPES:
        raise _refusal(
            f"the base's layers are of type '{text.model_type}'; only these types are known to compute the same: "
            f"{', '.join(MODEL_TYPES)}"
        )
    rope = text.rope_parameters
    if context(base) < text.max_position_embeddings and rope["rope_type"] not in FREE_OF_LENGTH:
        raise _refusal(
            f"it equals the base for {context(base)} positions only, and rotary embeddings of type {rope['rope_type']} "
            "depend on the length of the context"
        )


def _refusal(reason: str) -> SRDEError:
    return SRDEError(f"to=moe: GraniteMoeShared cannot express this model: {reason}.")


def context(base: BaseFiles) -> int:
    """The number of positions up to which the base attends to all earlier ones with equally scaled queries."""
    text = base.empty.config.get_text_config()
    limits = [text.max_position_embeddings]
    layers = getattr(text, "layer_types", None)
    window = getattr(text, "sliding_window", None)
    if window is not None and (layers is None or "sliding_attention" in layers):
        limits.append(window)
    if text.rope_parameters.get("llama_4_scaling_beta"):
        limits.append(text.rope_parameters["original_max_position_embeddings"])
    return int(min(limits))


def multipliers(base: BaseFiles) -> Multipliers:
    """The factors by which the base scales scores, embeddings, residuals and logits."""
    text = base.empty.config.get_text_config()
    if text.model_type == "granite":
        return Multipliers(
            text.attention_multiplier, text.embedding_multiplier, text.residual_multiplier, text.logits_scaling
        )
    return Multipliers(head_dim(base) ** -0.5)


def head_dim(base: BaseFiles) -> int:
    """The width of an attention head."""
    text = base.empty.config.get_text_config()
    return int(getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads)


def heads(base: BaseFiles) -> tuple[int, int]:
    """The number of heads of queries, and of keys and values: the base's, or more if this makes a head
    hidden_size / heads wide.

    vLLM and llama.cpp assume this width in GraniteMoeShared, but Ministral-3's heads have another. Additional heads of
    zeros have no effect.
    """
    text = base.empty.config.get_text_config()
    group = text.num_attention_heads // text.num_key_value_heads
    wanted = text.hidden_size // head_dim(base)
    fits = text.hidden_size % head_dim(base) == 0 and wanted % group == 0 and wanted > text.num_attention_heads
    return (wanted, wanted // group) if fits else (text.num_attention_heads, text.num_key_value_heads)


def has_usual_heads(base: BaseFiles) -> bool:
    """Whether the exported heads are hidden_size / heads wide."""
    return heads(base)[0] * head_dim(base) == base.empty.config.get_text_config().hidden_size


def moe_config(
    adapter: AdapterSource, base: BaseFiles, *, width: int, tied: bool, bias: bool, dtype: str
) -> dict[str, Any]:
    """The content of config.json.

    Args:
        width: number of neurons of an expert.
        tied: whether the output layer is the embedding.
        bias: whether the attention has biases.
    """
    text, scale, ours = base.empty.config.get_text_config(), multipliers(base), adapter.metadata.config
    rope = {k: v for k, v in text.rope_parameters.items() if k not in ("llama_4_scaling_beta", "type")}
    rope.pop("max_position_embeddings", None)  # Ministral3's copy of the value one level up
    values: dict[str, Any] = {
        "vocab_size": text.vocab_size,
        "hidden_size": text.hidden_size,
        "intermediate_size": width,
        "shared_intermediate_size": text.intermediate_size,
        "num_hidden_layers": text.num_hidden_layers,
        "num_attention_heads": heads(base)[0],
        "num_key_value_heads": heads(base)[1],
        "hidden_act": text.hidden_act,
        "rms_norm_eps": text.rms_norm_eps,
        "max_position_embeddings": context(base),
        "rope_parameters": rope,
        "attention_bias": bias,
        "tie_word_embeddings": tied,
        "attention_multiplier": scale.attention,
        "embedding_multiplier": scale.embedding,
        "residual_multiplier": scale.residual,
        "logits_scaling": scale.logits,
        "num_local_experts": ours.num_experts,
        "num_experts_per_tok": ours.top_k,
        "initializer_range": text.initializer_range,
        "architectures": ["GraniteMoeSharedForCausalLM"],
        "dtype": dtype,
    } | {key: getattr(text, key) for key in ("pad_token_id", "bos_token_id", "eos_token_id")}
    if not has_usual_heads(base):
        values["head_dim"] = head_dim(base)
    content: dict[str, Any] = GraniteMoeSharedConfig(**values).to_dict()
    return content


def padded(width: int) -> int:
    """The width, rounded up to a multiple of WIDTH_MULTIPLE."""
    return math.ceil(width / WIDTH_MULTIPLE) * WIDTH_MULTIPLE
