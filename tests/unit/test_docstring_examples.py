"""The examples in the docstrings of the public names work as they stand there."""

from __future__ import annotations

from pathlib import Path

from tests.distributed.harness import run_forked
from tests.docstring_examples import EXAMPLES, main


def test_every_public_name_has_an_example_that_works(tmp_path: Path) -> None:
    status = run_forked(tmp_path / "log", main, tmp_path)
    printed = (tmp_path / "log").read_text()
    assert status == 0 and f"{len(EXAMPLES)} names; with examples that fail, or without any: []" in printed, printed
