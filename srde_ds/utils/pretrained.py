"""Loading through transformers' Auto classes, with one clear error."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from srde_ds.errors import SRDEError


def load_pretrained(auto: Any, what: str, model_name: str | Path, **options: Any) -> Any:
    """`auto.from_pretrained(model_name, **options)`. Code that lies beside the weights never runs.

    Args:
        auto: an Auto class of transformers.
        what: what it loads, for the message.

    Raises:
        SRDEError: nothing of that kind can be loaded from `model_name`.
    """
    try:
        return auto.from_pretrained(str(model_name), trust_remote_code=False, **options)
    except (OSError, ValueError, SafetensorError) as error:
        reason = " ".join(str(error).split())
        raise SRDEError(
            f"model_name={str(model_name)!r}: cannot load the {what}; give a Hugging Face id or a folder written by "
            f"save_pretrained ({reason})"
        ) from error
