"""What the pages say of files is true, and the picture is what its script draws."""

from __future__ import annotations

import ast
import importlib
import re
import runpy
import subprocess
from pathlib import Path

import pytest

from tests.unit.test_imports import FLOORS

ROOT = Path(__file__).parents[2]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("cluster/*.md")])
# Where a page's short paths begin: `model/layer.py`, `results/parity.json`.
STARTS = ("", "srde_ds", "benchmarks", "docs", "tests")
FOLDERS = {path.name for start in STARTS for path in (ROOT / start).iterdir() if path.is_dir()}
MADE = {"data", "runs", "site", "build", "dist"}  # by users and by builds
CODE = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)
PATH = re.compile(r"`((?:[\w.-]+/)+[\w.-]+\.(?:py|yaml|yml|json|jsonl|sh|sbatch|toml|md))`")


def missing_files(text: str) -> list[str]:
    """Paths in backticks that begin at a folder of the repository and lead nowhere."""
    paths = [path for path in PATH.findall(text) if path.split("/")[0] in FOLDERS - MADE]
    return [path for path in paths if not any((ROOT / start / path).is_file() for start in STARTS)]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_file_that_a_page_names_is_there(page: Path) -> None:
    assert not missing_files(page.read_text(encoding="utf-8"))


def test_a_file_that_is_gone_is_found() -> None:
    text = "`model/layer.py`, `model/no_such.py`, `srde_ds/parallel/engine.py`, `runs/x/a.json`"
    assert missing_files(text) == ["model/no_such.py", "srde_ds/parallel/engine.py"]


def test_what_the_examples_import_is_there() -> None:
    blocks = [block for page in PAGES for block in CODE.findall(page.read_text(encoding="utf-8"))]
    imports = [node for block in blocks for node in ast.walk(ast.parse(block)) if isinstance(node, ast.ImportFrom)]
    every = {(str(one.module), name.name) for one in imports for name in one.names}
    own = {(module, name) for module, name in every if module.startswith("srde_ds")}
    assert len(own) >= 5
    missing = [(module, name) for module, name in sorted(own) if not hasattr(importlib.import_module(module), name)]
    assert not missing


def test_the_design_lists_the_floors_that_the_import_test_keeps() -> None:
    page = (ROOT / "docs/design.md").read_text(encoding="utf-8")
    listed = re.findall(r"^\| (\d+) \| `([\w.]+?)(?:/|\.py)` \|", page, re.MULTILINE)
    floors = [{room for floor, room in listed if int(floor) == number} for number in range(len(FLOORS))]
    assert floors == [floor - {"__init__"} for floor in FLOORS]


def test_the_readme_is_one_screen_before_any_table() -> None:
    lines = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    first_table = next((number for number, line in enumerate(lines) if line.startswith("|")), len(lines))
    assert min(first_table, len(lines)) >= 45


def test_a_word_of_the_glossary_stands_there_once() -> None:
    words = re.findall(r"^\| \*\*(.+?)\*\*", (ROOT / "docs/glossary.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert len(words) >= 20
    assert words == sorted(set(words), key=str.lower)


@pytest.mark.parametrize("name", ["picture", "logo"])
def test_the_committed_picture_is_what_the_script_draws(name: str) -> None:
    script = runpy.run_path(str(ROOT / "docs/make_picture.py"))
    file = {"picture": "srde.svg", "logo": "logo.svg"}[name]
    assert (ROOT / "docs/picture" / file).read_text(encoding="utf-8") == script[name]()


def test_git_ignores_no_file_of_the_package() -> None:
    """Such a file would be missing in every clone, although it is there for whoever wrote it."""
    answer = subprocess.run(
        ["git", "check-ignore", "--no-index", *(str(path) for path in sorted((ROOT / "srde_ds").rglob("*.py")))],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert answer.returncode == 1, answer.stdout + answer.stderr
