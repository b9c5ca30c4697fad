"""Puts an adapter with its model card into a folder, or into a repository of the Hugging Face Hub."""

from __future__ import annotations

import tempfile
from pathlib import Path

from huggingface_hub import get_token
from torch import Tensor

from srde_ds.hub.card import CARD, model_card
from srde_ds.utils.files import write_text
from srde_ds.weights.file import AdapterMetadata, save_weights
from srde_ds.weights.locate import WEIGHTS


def save_adapter(
    folder: Path, tensors: dict[str, Tensor], metadata: AdapterMetadata, *, run: Path | None, repo: str | None = None
) -> Path:
    """Write weights and model card into a folder; returns the weights' path. For the arguments see `model_card`."""
    card = model_card(metadata, repo=repo, run=run)
    folder.mkdir(parents=True, exist_ok=True)
    save_weights(folder / WEIGHTS, tensors, metadata)
    write_text(folder / CARD, card)
    return folder / WEIGHTS


def push_adapter(
    repo: str, tensors: dict[str, Tensor], metadata: AdapterMetadata, *, run: Path | None, private: bool
) -> str:
    """Upload weights and model card in one commit, creating the repository if needed; returns its address.

    Raises:
        SRDEError: there is no token or no such run, the name is bad or, with `private`, that of a public repository, or
            the Hub refuses or cannot be reached.
    """
    from srde_ds.utils.upload import Upload  # late: it loads the datasets library

    upload = Upload(repo, "model", private, get_token(), f"push_to_hub('{repo}')")
    upload.check(remedy="Set the environment variable HF_TOKEN, or log in with `hf auth login`.")
    with tempfile.TemporaryDirectory() as temporary:
        save_adapter(Path(temporary), tensors, metadata, run=run, repo=repo)
        return upload.send(temporary, "Adapter by srde_ds")
