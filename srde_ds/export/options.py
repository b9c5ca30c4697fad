"""The options of `srde-ds convert`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from srde_ds.config.values import option, weights_option


@dataclass(frozen=True)
class ConvertOptions:
    """What to convert, into what, and where."""

    weights: str = weights_option()
    to: Literal["weights", "peft", "dense", "moe", "gguf"] = option(
        "weights",
        "weights: the adapter in one file; peft: the adapter in a folder for PEFT; dense: the base with one expert "
        "merged; moe: a stock mixture of experts for transformers and vLLM; gguf: the same for llama.cpp",
    )
    output: str | None = option(
        None,
        "file to write, or folder for peft, dense and moe (default: srde_weights.safetensors, peft, dense, moe or "
        "model.gguf)",
        metavar="PATH",
        aliases=("output_file",),
    )
    dtype: Literal["float32", "bfloat16"] | None = option(
        None,
        "dtype of the written values (default: float32 for weights, unchanged for peft, otherwise the base's)",
        metavar="float32|bfloat16",
    )
    experts: list[str] | None = option(None, "keep only these experts (default: all)", metavar="NAME,...")
    expert: str | None = option(None, "dense: the expert to merge", metavar="NAME")
    base: str | None = option(None, "folder or Hub id of the base (default: where it was in training)", metavar="BASE")
    allow_download: bool = option(
        False, "download the base that the weights name from the Hub, if it is not on this machine"
    )
    gguf_converter: str | None = option(None, "gguf: llama.cpp's convert_hf_to_gguf.py", metavar="FILE")
