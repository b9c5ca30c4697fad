"""Configurations of tiny bases with layers that carry a state from token to token."""

from __future__ import annotations

from typing import Any

from transformers import (
    BambaConfig,
    FalconH1Config,
    Lfm2Config,
    PretrainedConfig,
    Qwen3_5TextConfig,
    Qwen3NextConfig,
)

SIZES: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}
LINEAR: dict[str, Any] = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "head_dim": 8,
    "layer_types": ["linear_attention", "full_attention"],
}
MAMBA: dict[str, Any] = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_n_groups": 1}


def qwen3_5(**changes: Any) -> PretrainedConfig:
    return Qwen3_5TextConfig(**SIZES | LINEAR | changes)


def qwen3_next() -> PretrainedConfig:
    return Qwen3NextConfig(**SIZES, **LINEAR, num_experts=0, mlp_only_layers=[0, 1])


def bamba() -> PretrainedConfig:
    return BambaConfig(**SIZES, **MAMBA, attn_layer_indices=[1])


def falcon_h1(**changes: Any) -> PretrainedConfig:
    return FalconH1Config(**SIZES, **MAMBA, mamba_d_ssm=64, **changes)


def lfm2() -> PretrainedConfig:
    return Lfm2Config(**SIZES, block_auto_adjust_ff_dim=False, layer_types=["conv", "full_attention"])


HYBRIDS = {"qwen3_5": qwen3_5, "qwen3_next": qwen3_next, "bamba": bamba, "falcon_h1": falcon_h1, "lfm2": lfm2}
