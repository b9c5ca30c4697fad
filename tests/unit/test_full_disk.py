"""A disk that is full or read-only: each verb ends with one line, and nothing half-written is left."""

from __future__ import annotations

import errno
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from srde_ds.cli.main import VERBS, main
from srde_ds.errors import SRDEError
from tests.cli_helpers import DOMAINS, POSITIONS, fails, flags, save_base, write_records
from tests.convert_helpers import save_base as save_llama
from tests.convert_helpers import trained


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(folder)], capture_output=True)
    if mounted.returncode:
        pytest.skip("no disk of a fixed size: mount needs root")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def spoil(disk: Path, how: str) -> None:
    """Fill the disk, or make it read-only."""
    if how == "full":
        with open(disk / "filler", "wb", buffering=0) as file:
            while True:
                try:
                    file.write(bytes(4096))
                except OSError:
                    return
    subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)


@pytest.mark.parametrize("error", [SRDEError("no answer", may_pass=True), OSError(errno.EIO, "no answer")])
def test_storage_that_may_be_back_is_no_bad_input(
    error: Exception, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def verb(arguments: Any) -> int:
        raise error

    monkeypatch.setitem(VERBS, "train", verb)
    assert main(["train"]) == 1
    assert capsys.readouterr().err == "srde-ds: error: no answer\n"


@pytest.mark.parametrize("how", ["full", "read-only"])
def test_each_verb(how: str, disk: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base, records = save_base(tmp_path / "base"), write_records(tmp_path / "train.jsonl")
    made = trained(save_llama("llama", tmp_path / "llama"), tmp_path / "made")
    inputs: dict[str, Any] = {"model_name": base, "jsonl_data": records, "domains": DOMAINS, "max_length": POSITIONS}
    spoil(disk, how)
    kept = sorted(disk.rglob("*"))
    commands = {
        "train": flags(inputs | {"output_dir": disk / "run", "num_experts": 2, "max_steps": 3}),
        "build_dataset": flags(inputs | {"work_dir": disk / "data"}),
        "convert": [str(made.weights), "--output", str(disk / "weights.safetensors")],
    }
    for verb, words in commands.items():
        line = fails(capsys, [verb, *words])
        told = ("No space left", "Read-only", "not writable", "Free space")
        assert any(reason in line for reason in told), (verb, line)
        if verb == "build_dataset":  # finished artifacts stay for the next build; nothing else does
            assert not (disk / "data/tokenized").exists() and not list(disk.rglob("*.tmp"))
            shutil.rmtree(disk / "data", ignore_errors=True)
        assert sorted(disk.rglob("*")) == kept, verb
    dense = ["--to", "dense", "--expert", "green", "--output", str(disk / "dense")]
    assert main(["convert", str(made.weights), *dense]) == 2
    assert sorted(disk.rglob("*")) == kept
    capsys.readouterr()
