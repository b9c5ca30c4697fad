"""Adapters as others get them: folders with a model card, repositories of the Hugging Face Hub."""

from __future__ import annotations

import tempfile
from pathlib import Path

from huggingface_hub import HfApi, get_token, hf_hub_download
from torch import Tensor

from srde_ds.errors import SRDEError
from srde_ds.hub.card import CARD, model_card
from srde_ds.weights.file import WEIGHTS, AdapterMetadata, folder_weights, save_weights


def find_adapter(adapter: str | Path, *, revision: str | None = None) -> Path:
    """The weights file that `adapter` names: the file, a folder that holds it, or a repository of the Hub.

    Raises:
        SRDEError: there is none.
    """
    path = Path(adapter)
    if path.is_file():
        return path
    if path.is_dir():
        weights = folder_weights(path)
        if weights is None:
            raise SRDEError(
                f"adapter '{path}': the folder holds no {WEIGHTS} of a finished run; make a file from its checkpoint: "
                f"srde-ds convert --checkpoint {path} --output FILE"
            )
        return weights
    try:
        return Path(hf_hub_download(str(adapter), WEIGHTS, revision=revision))
    except (OSError, ValueError) as error:  # the Hub's own errors are one or the other
        reason = " ".join(str(error).split())
        raise SRDEError(
            f"adapter '{adapter}': no such file or folder, and the Hub does not give it ({reason}). Give a weights "
            "file, a folder of save_pretrained or a repository of the Hub."
        ) from None


def save_adapter(
    folder: Path, tensors: dict[str, Tensor], metadata: AdapterMetadata, *, run: Path | None, repo: str | None = None
) -> Path:
    """Write weights and model card into a folder; returns the weights' path. Arguments as of `model_card`."""
    card = model_card(metadata, repo=repo, run=run)
    folder.mkdir(parents=True, exist_ok=True)
    save_weights(folder / WEIGHTS, tensors, metadata)
    (folder / CARD).write_text(card, encoding="utf-8")
    return folder / WEIGHTS


def push_adapter(
    repo: str, tensors: dict[str, Tensor], metadata: AdapterMetadata, *, run: Path | None, private: bool
) -> str:
    """Upload weights and model card in one commit, creating the repository if needed; returns its address.

    Raises:
        SRDEError: no token, a bad name, no such run, or the Hub refuses or cannot be reached.
    """
    from srde_ds.utils.retry import SourceError, with_retries  # late: it loads the datasets library

    if repo.count("/") > 1 or not all(repo.split("/")):
        raise SRDEError(f"push_to_hub('{repo}'): must be a repository's name, like user/model.")
    if not get_token():
        raise SRDEError(
            f"push_to_hub('{repo}'): no token. Set the environment variable HF_TOKEN, or log in with `hf auth login`."
        )
    api = HfApi()
    with tempfile.TemporaryDirectory() as temporary:
        save_adapter(Path(temporary), tensors, metadata, run=run, repo=repo)

        def upload() -> str:
            url = api.create_repo(repo, private=private, exist_ok=True)
            api.upload_folder(repo_id=url.repo_id, folder_path=temporary, commit_message="Adapter by srde_ds")
            return str(url)

        try:
            return with_retries(upload, repo)
        except SourceError as error:
            raise SRDEError(f"push_to_hub('{repo}'): {error}") from None
