"""Uploads a folder to a repository of the Hugging Face Hub."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from huggingface_hub import HfApi

from srde_ds.errors import SRDEError
from srde_ds.utils.retry import LOADING_ERRORS, SourceError, with_retries


@dataclass(frozen=True)
class Upload:
    """Where a folder goes.

    Attributes:
        repo: name of the repository; without an owner, one of the token's user.
        private: whether only its owner may see what is uploaded.
        token: None: there is none.
        asked: what the caller was given, for messages.
    """

    repo: str
    kind: Literal["model", "dataset"]
    private: bool
    token: str | None
    asked: str

    def check(self, *, remedy: str = "Set the environment variable HF_TOKEN.") -> None:
        """Check what can be known without the Hub.

        Args:
            remedy: what to do without a token.

        Raises:
            SRDEError: the name is not a repository's, or there is no token.
        """
        if self.repo.count("/") > 1 or not all(self.repo.split("/")):
            raise SRDEError(f"{self.asked}: must be a repository's name, like user/{self.kind}.")
        if not self.token:
            raise SRDEError(f"{self.asked}: no token. {remedy}")

    def refuse_public(self) -> None:
        """Raise an SRDEError if the Hub says by now that `send` would publish what is to be private.

        Whatever else is wrong with the Hub may pass until then.
        """
        public = False
        with suppress(*LOADING_ERRORS):
            public = "/" in self.repo and self._is_public(self.repo)
        if public:
            raise self._publishes()

    def send(self, folder: str | Path, message: str, patterns: Sequence[str] | None = None) -> str:
        """Upload a folder in one commit, creating the repository if needed; returns its address.

        Args:
            patterns: the files that are uploaded; None: all.

        Raises:
            SRDEError: what is to be private would become public, or the Hub refuses or cannot be reached.
        """
        api = HfApi(token=self.token)

        def upload() -> str:
            url = api.create_repo(self.repo, repo_type=self.kind, private=self.private, exist_ok=True)
            if self._is_public(url.repo_id):  # it existed: the Hub leaves its visibility as it is
                raise self._publishes()
            api.upload_folder(
                repo_id=url.repo_id,
                repo_type=self.kind,
                folder_path=folder,
                allow_patterns=None if patterns is None else list(patterns),
                commit_message=message,
            )
            return str(url)

        try:
            return with_retries(upload, self.repo)
        except SourceError as error:
            raise SRDEError(f"{self.asked}: {error}") from None

    def _is_public(self, repo: str) -> bool:
        """Whether a repository that is to be private is not."""
        return self.private and not HfApi(token=self.token).repo_info(repo, repo_type=self.kind).private

    def _publishes(self) -> SRDEError:
        return SRDEError(
            f"{self.asked} with private=true: the repository exists and is public. Make it private on the Hub, choose "
            "another name, or, where that can be given, private=false to publish."
        )
