"""A trained model and its tokenizer, on the machine's best device."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from srde_ds.config import ModelConfig
from srde_ds.data.manifest import check_trained_with
from srde_ds.data.tokenizer import load_tokenizer
from srde_ds.errors import SRDEError
from srde_ds.inference.options import ModelOptions
from srde_ds.model.adapter import SRDEModel, load_adapter
from srde_ds.model.adapter_source import AdapterSource, open_adapter
from srde_ds.model.base import load_base
from srde_ds.model.base_shape import measure
from srde_ds.model.quantization import check_float8, check_quantized
from srde_ds.utils.dtypes import warn_of_slow_bfloat16
from srde_ds.utils.pretrained import base_to_load


def load_model(options: ModelOptions, source: AdapterSource | None = None) -> tuple[SRDEModel, PreTrainedTokenizerBase]:
    """Base with experts in eval mode, on the GPU if there is one.

    Args:
        options: say which. Without `base` it is the one named in the weights, downloaded only with `allow_download`.
        source: what `open_adapter` gives for the weights, if it is open already.

    Raises:
        SRDEError: see `load_adapter`; nothing names the base; or it cannot be quantised so.
    """
    source = open_adapter(options.weights) if source is None else source
    named = source.metadata.model_name
    if not (options.base or named):
        raise SRDEError(f"weights '{source.place}': they do not name their base. Give its folder or Hub id as --base.")
    revision = source.metadata.model_revision
    name, loading = base_to_load(options.base, named, revision, allow_download=options.allow_download)
    tokenizer = load_tokenizer(name, **loading)
    check_trained_with(source.metadata.history, tokenizer, source.place)
    warn_of_slow_bfloat16(options.bf16 and options.base_quantization != "fp8")
    base = _load_base(name, options, **loading)
    model = load_adapter(source, base=base, dtype=_dtype(options)).eval()
    model.route_by = options.route_by
    return model, tokenizer


def _load_base(
    name: str | Path, options: ModelOptions, *, revision: str | None, local_files_only: bool
) -> PreTrainedModel:
    quantization = options.base_quantization
    if quantization != "none":
        config = ModelConfig(
            model_name=str(name), model_revision=revision, base_quantization=quantization, bf16=options.bf16
        )
        shape = measure(config, local_files_only=local_files_only)
        check_float8(config, shape.packing, shape.linear)
        check_quantized(config, shape.packing)
    return load_base(
        name,
        dtype=_dtype(options),
        revision=revision,
        local_files_only=local_files_only,
        # There at once: a quantised base cannot be moved, and a plain one may be larger than the host's memory.
        device=_device(),
        quantization=quantization,
    )


def _dtype(options: ModelOptions) -> torch.dtype:
    return torch.bfloat16 if options.bf16 else torch.float32


def _device() -> torch.device:
    # With its number, since loading takes a mere "cuda" for the first GPU.
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
