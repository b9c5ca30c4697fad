"""Writes a GGUF file for llama.cpp, with its own converter, which reads GraniteMoeShared (docs/convert.md)."""

from __future__ import annotations

import json
import math
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from transformers import GraniteMoeSharedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from srde_ds.errors import SRDEError
from srde_ds.export.moe import moe_size, write_moe
from srde_ds.export.moe_config import has_usual_heads, head_dim
from srde_ds.export.streaming import complete_file
from srde_ds.model.adapter_source import AdapterSource
from srde_ds.model.base_files import BaseFiles

CONVERTER = "convert_hf_to_gguf.py"
ROPE_TYPES = ("default", "linear", "yarn")
OUTTYPES = {torch.float32: "f32", torch.bfloat16: "bf16", torch.float16: "f16"}


def write_gguf(
    adapter: AdapterSource, base: BaseFiles, output: str | Path, *, dtype: torch.dtype | None, converter: str | None
) -> Path:
    """Write the stock mixture of experts as one GGUF file.

    Args:
        dtype: dtype of the weights; None: the base's.
        converter: path of llama.cpp's convert_hf_to_gguf.py.

    Raises:
        SRDEError: the converter does not exist, fails or cannot express the base; see also `write_moe`.
    """
    script = Path(converter or CONVERTER)
    if not script.is_file():
        raise SRDEError(
            f"gguf_converter={script}: no such file. Give the {CONVERTER} of a llama.cpp checkout "
            "(https://github.com/ggml-org/llama.cpp)."
        )
    if not has_usual_heads(base):
        text = base.empty.config.get_text_config()
        raise SRDEError(
            f"to=gguf: the base's heads have {head_dim(base)} dimensions, not hidden_size / num_attention_heads = "
            f"{text.hidden_size // text.num_attention_heads}, and llama.cpp's converter ignores head_dim for this "
            "architecture. Use --to moe, or merge one expert with --to dense and convert that."
        )
    rope = base.empty.config.get_text_config().rope_parameters["rope_type"]
    if rope not in ROPE_TYPES:
        raise SRDEError(
            f"to=gguf: the base's rotary embeddings are of type {rope}; for this architecture llama.cpp's converter "
            f"knows only {', '.join(ROPE_TYPES)}. Use --to moe, or merge one expert with --to dense and convert that."
        )
    written = dtype or base.decoder_tensor("embed_tokens.weight").dtype
    target = Path(output)
    size = 2 * moe_size(adapter, base, dtype=dtype)  # the mixture in between is as large
    with complete_file(target, size) as partial, tempfile.TemporaryDirectory(dir=target.parent) as scratch:
        folder = write_moe(adapter, base, Path(scratch) / target.stem, dtype=dtype)
        _make_up_for_yarn(folder / "config.json")
        command = [sys.executable, str(script), str(folder), "--outfile", str(partial), "--outtype", OUTTYPES[written]]
        result = subprocess.run(command, capture_output=True, text=True)
        if result.returncode or not partial.is_file():
            lines = result.stderr.strip().splitlines() or ["it wrote nothing"]
            raise SRDEError(f"gguf_converter={script}: it failed: {lines[-1]}")
    return target


def _make_up_for_yarn(path: Path) -> None:
    """Divide the attention's scale by the factor with which llama.cpp's yarn multiplies queries and keys.

    transformers multiplies them by the configuration's attention factor, llama.cpp by 1 + 0.1 ln(factor).
    """
    config = GraniteMoeSharedConfig.from_pretrained(path.parent)
    rope: Any = config.rope_parameters
    if rope["rope_type"] != "yarn":
        return
    _, wanted = ROPE_INIT_FUNCTIONS["yarn"](config)
    given = 1 + 0.1 * math.log(rope["factor"])
    content = json.loads(path.read_text(encoding="utf-8"))
    content["attention_multiplier"] *= (wanted / given) ** 2
    path.write_text(json.dumps(content), encoding="utf-8")
