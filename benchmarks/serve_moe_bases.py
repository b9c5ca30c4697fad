"""Small random bases with what inference servers may get wrong: biases, narrow heads, kinds of rotary embeddings.

    python -m benchmarks.serve_moe_bases FOLDER

writes one folder a base; the tokenizer is that of the quick start's base. serve_moe.py serves them.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import Any

import torch
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    Ministral3Config,
    Ministral3ForCausalLM,
    PreTrainedModel,
)

TOKENIZER = Path(__file__).resolve().parents[1] / "runs/quickstart-inputs/base"
SIZES: dict[str, Any] = {
    "vocab_size": 49152,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "initializer_range": 0.08,  # at the default 0.02 a tiny model's logits hardly depend on its layers
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 2,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
LINEAR = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}


def llama(**options: Any) -> PreTrainedModel:
    model = LlamaForCausalLM(LlamaConfig(**SIZES, max_position_embeddings=1024, **options))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(std=0.5)
    return model


def narrow_ministral3() -> PreTrainedModel:
    """As in Ministral-3-14B, heads times their width are less than hidden_size."""
    return Ministral3ForCausalLM(Ministral3Config(**(SIZES | {"num_attention_heads": 2, "num_key_value_heads": 1})))


BASES = {
    "ministral3-narrow-heads": narrow_ministral3,
    "llama-biases": lambda: llama(attention_bias=True),
    "llama-rope-llama3": lambda: llama(rope_parameters=LLAMA3),
    "llama-rope-linear": lambda: llama(rope_parameters=LINEAR),
}


def main() -> None:
    for name, make in BASES.items():
        torch.manual_seed(0)
        folder = Path(sys.argv[1]) / name
        make().save_pretrained(folder)
        for file in TOKENIZER.iterdir():
            if file.name.startswith(("tokenizer", "chat_template")):
                shutil.copyfile(file, folder / file.name)
        print(folder)


if __name__ == "__main__":
    main()
