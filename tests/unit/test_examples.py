"""The files of `examples/` run on a tiny model."""

from __future__ import annotations

import doctest
import json
import os
import re
import runpy
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from srde_ds.cli.main import main
from srde_ds.optim import for_trainer
from srde_ds.peft.rows import by_domain, conversations_of
from tests.cli_helpers import DOMAINS, flags, save_base, write_records
from tests.data_helpers import write_jsonl

needs_trl = pytest.mark.skipif(find_spec("trl") is None, reason="trl is not installed: pip install srde-ds[trl]")

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("examples")
    save_base(folder / "base")
    write_records(folder / "train.jsonl")
    write_records(folder / "held_out.jsonl", first=100)
    return folder


def run(name: str, folder: Path, monkeypatch: pytest.MonkeyPatch, **options: Any) -> None:
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "argv", [name, *flags(options)])
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    runpy.run_path(str(EXAMPLES / name), run_name="__main__")


@pytest.fixture
def trained(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What sft_trl.py makes."""
    if not (folder / "sft").exists():
        options = {"base": "base", "data": "train.jsonl", "held_out": "held_out.jsonl", "domains": DOMAINS}
        run("sft_trl.py", folder, monkeypatch, **options, max_steps=2, batch_size=2)
    return folder / "sft"


def tensors(folder: Path) -> dict[str, Any]:
    return load_file(folder / "adapter_model.safetensors")


def differ(folder: Path, other: Path, part: str) -> bool:
    """Whether all tensors whose names end so do."""
    found, others = tensors(folder), tensors(other)
    return all(not torch.equal(found[name], others[name]) for name in found if name.endswith(part))


@needs_trl
def test_sft(trained: Path) -> None:
    assert all(bool(tensor.any()) for name, tensor in tensors(trained).items() if name.endswith("deltas.free"))


@needs_trl
def test_dpo(trained: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pairs = [{"prompt": f"{n}?", "chosen": "a" * n, "rejected": "b"} for n in range(1, 5)]
    write_jsonl(folder / "preferences.jsonl", pairs)
    run("dpo_trl.py", folder, monkeypatch, adapter="sft", data="preferences.jsonl", max_steps=1, batch_size=2)
    assert differ(folder / "dpo", trained, "deltas.free")


@needs_trl
def test_grpo(trained: Path, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    items = [{"prompt": f"{n}?", "response": "a", "answer": "a", "domain": "red"} for n in range(4)]
    write_jsonl(folder / "items.jsonl", items)
    short = {"generations": 2, "max_completion_length": 4, "max_steps": 1}
    run("grpo_trl.py", folder, monkeypatch, adapter="sft", items="items.jsonl", **short)
    assert "scorers that failed: 0" in capsys.readouterr().out
    assert differ(folder / "grpo", trained, "router.weight")  # all rewards are 0, but the router has its losses


@needs_trl
def test_thirty_lines(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its commands run here, which saves their imports."""

    real = subprocess.run

    def command(arguments: list[str], **options: Any) -> Any:
        if arguments[0] != "srde-ds":
            return real(arguments, **options)
        assert options == {"check": True} and main(arguments[1:]) == 0

    monkeypatch.setattr(subprocess, "run", command)
    run("thirty_lines.py", folder, monkeypatch)
    report = json.loads((folder / "adapter" / "evaluation.json").read_text())
    assert report
    assert os.listdir(folder / "moe")
    assert AutoModelForCausalLM.from_pretrained(folder / "moe").config.model_type == "granitemoeshared"


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.py")), ids=lambda path: path.name)
def test_an_example_is_short(path: Path) -> None:
    assert len(path.read_text().splitlines()) < (31 if path.name == "thirty_lines.py" else 80)


@needs_trl
def test_the_page_works_as_it_stands(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("base", "train.jsonl", "held_out.jsonl"):
        (tmp_path / name).symlink_to(folder / name)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    page = (EXAMPLES.parent / "docs/trl.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```python\n(.*?)^```", page, re.M | re.S)
    assert len(blocks) == 1
    names: dict[str, Any] = {}
    exec(blocks[0], names)
    assert (tmp_path / "adapter" / "adapter_model.safetensors").exists()
    logged = {key for line in names["trainer"].state.log_history for key in line}
    assert {"eval_red_loss", "eval_green_loss"} <= logged
    for function in (for_trainer, by_domain, conversations_of):
        test = doctest.DocTestFinder(recurse=False).find(function, globs={})
        assert doctest.DocTestRunner().run(test[0]).failed == 0 and test[0].examples
