"""The adapter in PEFT's form: `adapter_config.json` and `adapter_model.safetensors` in a folder.

The tensors are those of `srde_weights.safetensors`, with names that begin with PEFT_PREFIX. The configuration contains
that file's metadata as a text, since PEFT would sort the keys of mappings. So each form can be made from the other
without a base, and reading does not need PEFT.
"""

from __future__ import annotations

import json
from pathlib import Path

from srde_ds.errors import SRDEError

PEFT_TYPE = "SRDE"
PEFT_CONFIG, PEFT_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PEFT_PREFIX = "base_model.model."
LARGEST_CONFIG = 4 * 2**20  # bytes


def is_peft_folder(folder: Path) -> bool:
    """Whether a folder holds an adapter of any PEFT method."""
    return (folder / PEFT_CONFIG).is_file() and (folder / PEFT_WEIGHTS).is_file()


def read_peft_metadata(folder: Path) -> tuple[str, str]:
    """The JSON text of the metadata in the folder's configuration, and PEFT's own note of the base's revision, or "".

    Raises:
        SRDEError: the configuration does not exist, cannot be read, belongs to another method, or has no metadata.
    """
    path = folder / PEFT_CONFIG
    try:
        with open(path, "rb") as file:
            content = file.read(LARGEST_CONFIG + 1)
        values = json.loads(content) if len(content) <= LARGEST_CONFIG else None
    except OSError as error:
        raise SRDEError(f"weights '{folder / PEFT_WEIGHTS}': '{path}' cannot be read: {error.strerror}.") from None
    except (ValueError, RecursionError):
        values = None
    if not isinstance(values, dict):
        raise SRDEError(
            f"weights '{path}': not a JSON object of at most {LARGEST_CONFIG} bytes. Save the adapter again."
        )
    if values.get("peft_type") != PEFT_TYPE:
        method = str(values.get("peft_type"))[:100]
        raise SRDEError(f"weights '{folder}': an adapter of the PEFT method {method}; give one of {PEFT_TYPE}.")
    if not isinstance(values.get("metadata"), str):
        raise SRDEError(f"weights '{path}': it holds no metadata. Save the adapter again with save_pretrained.")
    return values["metadata"], str(values.get("revision") or "")
