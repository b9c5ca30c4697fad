"""YAML of others: what it may cost, and that one reader reads all of it."""

from __future__ import annotations

import os
import resource
import time
from pathlib import Path

import pytest

from srde_ds.cli.main import main
from srde_ds.config.values import load_yaml
from srde_ds.errors import SRDEError
from srde_ds.utils.yaml_files import DEEPEST, LONGEST_FILE, MOST_VALUES, parse_yaml, read_yaml

PACKAGE = Path(__file__).parents[2] / "srde_ds"
SECONDS, BYTES = 5.0, 300 << 20


def _bomb(step: str) -> str:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{n}: &a{n} " + step.replace("?", f"*a{n - 1}") for n in range(1, 12)]
    return "\n".join(lines)


HOSTILE = {
    "aliases": _bomb("[?, ?, ?, ?, ?, ?, ?, ?, ?]"),
    "aliases as values": _bomb("{b: ?, c: ?, d: ?, e: ?}"),
    "merges": "a0: &a0 {k: 1}\n" + "\n".join(f"a{n}: &a{n} {{<<: [*a{n - 1}, *a{n - 1}]}}" for n in range(1, 40)),
    "circle": "a: &a [*a]",
    "circle of mappings": "a: &a {b: *a}",
    "deep lists": "a: " + "[" * 10_000,
    "deep mappings": "a: " + "{b: " * 10_000,
    "deep blocks": "\n".join(" " * n + "a:" for n in range(600)),
    "deep dashes": "- " * 50_000,
    "long number": "a: " + "9" * 100_000,
    "sexagesimal": "a: 1" + ":59" * 30_000,
    "long float": "a: 1." + "9" * 100_000,
    "many values": "a: [" + "1," * (MOST_VALUES + 1) + "]",
    "large": "a: " + "x" * LONGEST_FILE,
    "number by tag": "a: !!int abc",
    "date by tag": "a: !!timestamp abc",
    "truth by tag": "a: !!bool maybe",
    "object by tag": "a: !!python/object/apply:os.system ['true']",
    "list as a key": "? [a]\n: 1",
    "mapping as a key": "? {a: 1}\n: 1",
    "two documents": "a: 1\n---\nb: 2",
    "control characters": "a: \x00\x1b[31m",
    "merge of a word": "a: {<<: b}",
    "odd number": "a: 0x_",
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_files_are_refused_in_time_memory_and_one_line(name: str, tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(HOSTILE[name])
    started, before = time.process_time(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(SRDEError) as caught:
        load_yaml(path)
    assert time.process_time() - started < SECONDS
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 < BYTES
    assert str(path) in str(caught.value) and "\n" not in str(caught.value) and len(str(caught.value)) < 1000


@pytest.mark.parametrize("name", ["aliases", "deep lists", "long number", "date by tag"])
def test_every_file_goes_through_the_same_reader(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "own.yaml"
    path.write_text(HOSTILE[name])
    commands = [
        ["doctor", "--config", str(path)],
        ["plan", "--config", str(path)],
        ["train", "--config", str(path)],
        ["build_dataset", "--list_sources", "--sources_file", str(path)],
    ]
    for command in commands:
        assert main(command) == 2
        error = capsys.readouterr().err
        assert error.startswith("srde-ds: error: ") and error.count("\n") == 1 and str(path) in error


def test_only_one_file_of_the_package_reads_yaml() -> None:
    readers = [
        p.name for p in PACKAGE.rglob("*.py") if "yaml.safe_load" in p.read_text() or "yaml.load" in p.read_text()
    ]
    assert readers == []
    users = [p.name for p in PACKAGE.rglob("*.py") if "yaml.SafeLoader" in p.read_text()]
    assert users == ["yaml_files.py"]


@pytest.mark.parametrize("date", ["2024-01-01", "2001-99-99", "0000-00-00", "2001-01-01t99:99:99+99:99"])
def test_dates_are_text(date: str) -> None:
    assert parse_yaml(f"a: {date}", "test") == {"a": date}


def test_ordinary_files_are_read_as_before(tmp_path: Path) -> None:
    text = "a: &a {b: 1, c: 1.5e-3, d: yes, e: ~, f: 0x10, g: 1_000, h: [.inf, 'x: y']}\n"
    text += "z: {<<: *a, b: 2}\nt: |\n  x\n  y\n"
    a = {"b": 1, "c": 1.5e-3, "d": True, "e": None, "f": 16, "g": 1000, "h": [float("inf"), "x: y"]}
    assert parse_yaml(text, "test") == {"a": a, "z": a | {"b": 2}, "t": "x\ny\n"}
    path = tmp_path / "bom.yaml"
    path.write_bytes(b"\xef\xbb\xbfa: 1\n")
    assert read_yaml(path, "test") == {"a": 1}
    assert parse_yaml("[" * DEEPEST + "]" * DEEPEST, "test")


def test_a_pipe_is_refused_and_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", Path("/dev/zero")):
        with pytest.raises(SRDEError, match="not an ordinary file"):
            read_yaml(path, f"config: '{path}'")
