"""A trained model and its tokenizer, on the machine's best device."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import PreTrainedTokenizerBase

from srde_ds.data.manifest import check_trained_with
from srde_ds.data.tokenizer import load_tokenizer
from srde_ds.errors import SRDEError
from srde_ds.model.adapter import SRDEModel, load_adapter
from srde_ds.model.adapter_source import AdapterSource, open_adapter


def load_model(
    weights: str | Path | AdapterSource, *, base: str | None, bf16: bool, allow_download: bool = False
) -> tuple[SRDEModel, PreTrainedTokenizerBase]:
    """Base with experts in eval mode, on the GPU if there is one.

    Args:
        weights: whatever `load_adapter` takes.
        base: the base's id or folder; None: the one named in the weights, downloaded only with `allow_download`.

    Raises:
        SRDEError: see `load_adapter`, or nothing names the base.
    """
    local = base is None and not allow_download
    dtype = torch.bfloat16 if bf16 else torch.float32
    source = weights if isinstance(weights, AdapterSource) else open_adapter(weights)
    metadata = source.metadata
    if not (base or metadata.model_name):
        raise SRDEError(f"weights '{source.place}': they do not name their base. Give its folder or Hub id as --base.")
    tokenizer = load_tokenizer(base or metadata.model_name, local_files_only=local)
    check_trained_with(metadata.history, tokenizer, source.place)
    model = load_adapter(source, base=base, dtype=dtype, allow_download=allow_download)
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    return model.eval(), tokenizer
