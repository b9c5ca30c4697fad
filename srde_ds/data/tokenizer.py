"""The tokenizer of a base."""

from __future__ import annotations

from pathlib import Path

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from srde_ds.utils.pretrained import load_pretrained


def load_tokenizer(model_name: str | Path, *, revision: str | None = None) -> PreTrainedTokenizerBase:
    """The tokenizer of a Hugging Face id or local folder.

    Raises:
        SRDEError: there is none.
    """
    tokenizer: PreTrainedTokenizerBase = load_pretrained(AutoTokenizer, "tokenizer", model_name, revision=revision)
    return tokenizer
