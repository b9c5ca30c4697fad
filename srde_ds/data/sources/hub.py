"""Uploads a built dataset. The token comes only from the environment."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi

from srde_ds.errors import SRDEError
from srde_ds.utils.retry import SourceError, with_retries

UPLOADED = ("README.md", "data.jsonl", "build.json", "sources.lock.json", "report/*", "tokenized/**")


def check_upload(repo: str, *, private: bool, sources: Iterable[dict[str, Any]]) -> None:
    """Check that the upload can work, and that the sources' licences allow it.

    Args:
        sources: with `name` and `redistributable`.

    Raises:
        SRDEError: there is no token, the name is not a repository's, or a public upload would pass on data whose
            licence does not allow that.
    """
    if not os.environ.get("HF_TOKEN"):
        raise SRDEError(f"push_to_hub={repo}: no token. Set the environment variable HF_TOKEN.")
    if repo.count("/") > 1 or not all(repo.split("/")):
        raise SRDEError(f"push_to_hub={repo}: must be a repository's name, like user/dataset.")
    kept = [source["name"] for source in sources if source["redistributable"] != "yes"]
    if kept and not private:
        raise SRDEError(
            f"push_to_hub={repo} with private=false: the licence of {', '.join(kept)} does not allow, or does not "
            "clearly allow, passing the data on. Leave --private on, or build without these sources."
        )


def push_to_hub(work_dir: Path, repo: str, *, private: bool) -> str:
    """Upload the dataset, its card and its report in one commit; returns the repository's address.

    Raises:
        SRDEError: the Hub refuses or cannot be reached.
    """
    api = HfApi(token=os.environ["HF_TOKEN"])

    def upload() -> str:
        url = api.create_repo(repo, repo_type="dataset", private=private, exist_ok=True)
        api.upload_folder(
            repo_id=url.repo_id,
            repo_type="dataset",
            folder_path=work_dir,
            allow_patterns=list(UPLOADED),
            commit_message="Dataset by srde-ds build_dataset",
        )
        return str(url)

    try:
        return with_retries(upload, repo)
    except SourceError as error:
        raise SRDEError(f"push_to_hub={repo}: {error}") from None
