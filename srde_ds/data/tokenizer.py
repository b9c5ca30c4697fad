"""The tokenizer of a base."""

from __future__ import annotations

from pathlib import Path

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from srde_ds.utils.pretrained import load_pretrained


def load_tokenizer(
    model_name: str | Path, *, revision: str | None = None, local_files_only: bool = False
) -> PreTrainedTokenizerBase:
    """The tokenizer of a Hub id or local folder; with `local_files_only` nothing is downloaded.

    Raises:
        SRDEError: there is no tokenizer.
    """
    tokenizer: PreTrainedTokenizerBase = load_pretrained(
        AutoTokenizer, "tokenizer", model_name, revision=revision, local_files_only=local_files_only
    )
    return tokenizer
