"""A trained model and its tokenizer, on the machine's best device."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import PreTrainedTokenizerBase

from srde_ds.data.tokenizer import load_tokenizer
from srde_ds.errors import SRDEError
from srde_ds.model.adapter import SRDEModel, load_adapter
from srde_ds.weights.file import WEIGHTS, folder_weights, read_metadata


def find_weights(path: str | Path) -> Path:
    """The weights that `path` names: the file itself, or a run folder that holds it.

    Raises:
        SRDEError: there are none.
    """
    path = Path(path)
    if path.is_file():
        return path
    if not path.is_dir():
        raise SRDEError(f"'{path}': no such file or folder. Give {WEIGHTS} or the folder of a finished run.")
    weights = folder_weights(path)
    if weights is None:
        raise SRDEError(
            f"'{path}': holds no {WEIGHTS} of a finished run. Make a file from its checkpoint: "
            f"srde-ds convert --checkpoint {path} --output_file FILE"
        )
    return weights


def load_model(
    weights: Path, *, base: str | None, bf16: bool, allow_download: bool = False
) -> tuple[SRDEModel, PreTrainedTokenizerBase]:
    """Base with experts in eval mode, on the GPU if there is one.

    Args:
        base: None: the base named in the weights, which is fetched from the Hub only with `allow_download`.
    """
    local = base is None and not allow_download
    tokenizer = load_tokenizer(base or read_metadata(weights).model_name, local_files_only=local)
    dtype = torch.bfloat16 if bf16 else torch.float32
    model = load_adapter(weights, base=base, dtype=dtype, allow_download=allow_download)
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    return model.eval(), tokenizer
