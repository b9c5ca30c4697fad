"""Uploads a built dataset. The token comes only from the environment."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from srde_ds.errors import SRDEError
from srde_ds.utils.upload import Upload

UPLOADED = ("README.md", "data.jsonl", "build.json", "sources.lock.json", "report/*", "tokenized/**")


def check_upload(repo: str, *, private: bool, sources: Iterable[dict[str, Any]]) -> None:
    """Check that the upload can work, and that the sources' licences allow it.

    Args:
        sources: with `name` and `redistributable`.

    Raises:
        SRDEError: there is no token, the name is not a repository's or, with `private`, is that of a public one, or a
            public upload would pass on data whose licence does not allow that.
    """
    upload = _upload(repo, private=private)
    upload.check()
    kept = [source["name"] for source in sources if source["redistributable"] != "yes"]
    if kept and not private:
        raise SRDEError(
            f"push_to_hub={repo} with private=false: the licence of {', '.join(kept)} does not allow, or does not "
            "clearly allow, passing the data on. Leave --private on, or build without these sources."
        )
    upload.refuse_public()


def push_to_hub(work_dir: Path, repo: str, *, private: bool) -> str:
    """Upload the dataset, its card and its report in one commit; returns the repository's address.

    Raises:
        SRDEError: it is to be private and the repository is public, or the Hub refuses or cannot be reached.
    """
    return _upload(repo, private=private).send(work_dir, "Dataset by srde-ds build_dataset", UPLOADED)


def _upload(repo: str, *, private: bool) -> Upload:
    return Upload(repo, "dataset", private, os.environ.get("HF_TOKEN"), f"push_to_hub={repo}")
