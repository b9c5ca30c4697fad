"""A tiny base on disk and command lines for the tests of the verbs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from srde_ds.cli.main import main
from tests.data_helpers import sums, tiny_tokenizer, write_jsonl
from tests.helpers import tiny_llama

DOMAINS = ["red", "green"]
POSITIONS = 128  # max_position_embeddings of tiny_llama


def save_base(folder: Path, **tokenizer: Any) -> Path:
    """tiny_llama and tiny_tokenizer as save_pretrained writes them."""
    words = tiny_tokenizer(**tokenizer)
    tiny_llama(vocab_size=len(words)).save_pretrained(folder)
    words.save_pretrained(folder)
    return folder


def write_records(path: Path, *, first: int = 0) -> Path:
    """Six records of each of DOMAINS."""
    numbers = range(first, first + 6)
    return write_jsonl(path, [record for domain in DOMAINS for record in sums(domain, numbers)])


def flags(values: dict[str, Any]) -> list[str]:
    """`--name value`, lists joined by commas; None leaves a flag out."""
    texts = {name: ",".join(v) if isinstance(v, list) else str(v) for name, v in values.items() if v is not None}
    return [text for name, value in texts.items() for text in (f"--{name}", value)]


def fails(capsys: pytest.CaptureFixture[str], arguments: list[str], *fragments: str) -> str:
    """The verb must end with status 2 and one error on stderr, a line that holds all fragments; returns the line."""
    capsys.readouterr()
    assert main(arguments) == 2
    *told, line = capsys.readouterr().err.splitlines()
    assert line.startswith("srde-ds: error: "), line
    assert all(other.startswith("srde-ds: ") and "error" not in other for other in told), told
    for fragment in fragments:
        assert fragment in line, line
    return line
