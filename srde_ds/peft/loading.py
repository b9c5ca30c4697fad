"""Loading a saved adapter: either all of it is loaded, or nothing, and one line says what is wrong with its files."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from peft import PeftConfig
from safetensors import SafetensorError

from srde_ds.errors import SRDEError
from srde_ds.peft.config import SRDEConfig
from srde_ds.weights.peft_folder import PEFT_TYPE, PEFT_WEIGHTS, read_peft_metadata

PICKLED = "adapter_model.bin"
"""The file that PEFT writes with `safe_serialization=False`"""


def load_values(
    model: Any, place: str | os.PathLike[str], adapter: str, load: Callable[[], Any], **options: Any
) -> Any:
    """Load an adapter into a PEFT model.

    Args:
        place: a folder, or a repository on the Hub.
        load: PEFT's own `load_adapter` with its arguments.
        options: the arguments of `load_adapter` that were given by keyword.

    Returns:
        The result of `load`.

    Raises:
        SRDEError: the folder lacks a file, a file is damaged, or the model already has another adapter of this name.
    """
    of_hub, _ = model._split_kwargs(options)
    folder = Path(place) / (of_hub.get("subfolder") or "")
    if folder.is_dir():
        read_peft_metadata(folder)
        if not (folder / PEFT_WEIGHTS).is_file() and not (folder / PICKLED).is_file():
            raise SRDEError(f"weights '{folder}': the folder holds no {PEFT_WEIGHTS}. Save the adapter again.")
    tuner, is_here = model.base_model, adapter in model.peft_config
    saved = PeftConfig.from_pretrained(str(place), **of_hub)
    if is_here and not isinstance(saved, SRDEConfig):
        raise SRDEError(
            f"weights '{folder}': an adapter of the PEFT method {saved.peft_type}; give one of {PEFT_TYPE}."
        )
    try:
        with tuner.metadata_of(saved, adapter, folder) if is_here else nullcontext():
            return load()
    except BaseException as error:
        if not is_here and adapter in model.peft_config:
            tuner.delete_adapter(adapter)
        if isinstance(error, SafetensorError):
            reason = " ".join(str(error).split())
            raise SRDEError(
                f"weights '{folder}': {PEFT_WEIGHTS} is not a readable safetensors file ({reason}). Save the adapter "
                "again."
            ) from None
        raise
