"""A trained model and its tokenizer, on the machine's best device."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import PreTrainedTokenizerBase

from srde_ds.data.manifest import check_trained_with
from srde_ds.data.tokenizer import load_tokenizer
from srde_ds.errors import SRDEError
from srde_ds.export.weights import weights_file
from srde_ds.model.adapter import SRDEModel, load_adapter
from srde_ds.weights.file import read_metadata


def load_model(
    weights: str | Path, *, base: str | None, bf16: bool, allow_download: bool = False
) -> tuple[SRDEModel, PreTrainedTokenizerBase]:
    """Base with experts in eval mode, on the GPU if there is one.

    Args:
        weights: whatever `locate_weights` takes; a checkpoint is converted.
        base: the base's id or folder; None: the one named in the weights, downloaded only with `allow_download`.

    Raises:
        SRDEError: see `weights_file` and `load_adapter`, or nothing names the base.
    """
    local = base is None and not allow_download
    dtype = torch.bfloat16 if bf16 else torch.float32
    with weights_file(weights) as path:
        metadata = read_metadata(path)
        if not (base or metadata.model_name):
            raise SRDEError(f"weights '{weights}': they do not name their base. Give its folder or Hub id as --base.")
        tokenizer = load_tokenizer(base or metadata.model_name, local_files_only=local)
        check_trained_with(metadata.history, tokenizer, weights)
        model = load_adapter(path, base=base, dtype=dtype, allow_download=allow_download)
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    return model.eval(), tokenizer
