"""The examples in the docstrings of the public names work as they stand there."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from tests.docstring_examples import EXAMPLES

ROOT = Path(__file__).parents[2]


def test_every_public_name_has_an_example_that_works(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tests.docstring_examples", str(tmp_path)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stdout + result.stderr
    assert f"{len(EXAMPLES)} names; with examples that fail, or without any: []" in result.stdout
