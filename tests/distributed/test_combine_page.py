"""The whole way of docs/combine.md in small: its commands run, and its output is theirs."""

from __future__ import annotations

import os
import re
import shlex
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from srde_ds.cli.main import main
from srde_ds.compose.combine import combine_command
from srde_ds.compose.options import CombineOptions
from srde_ds.errors import SRDEError
from tests.cli_helpers import save_base
from tests.data_helpers import sums, write_jsonl
from tests.distributed.harness import run_distributed

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "combine.md"
SMALL = "--max_steps 4 --gradient_accumulation_steps 2 --bf16 false --max_length 128 --lr_schedule constant"
NUMBER = re.compile(r"\d+\.\d+(e[-+]\d+)?|\b[0-9a-f]{12}\b")


def commands(text: str) -> list[list[str]]:
    text = text.replace("--router_steps 20", "--router_steps 2")
    return [shlex.split(line) for line in re.findall(r"^    srde-ds (.+)$", text, re.MULTILINE)]


def run(arguments: list[str], folder: Path) -> str:
    """What a command prints; in a process of its own that has done the imports."""
    options = shlex.split(SMALL) if arguments[0] == "train" else []
    if arguments[0] == "train" and "--start_from" not in arguments:
        options += ["--density", "0.05"]
    (printed,) = run_distributed(printed_by, 1, [*arguments, *options], folder)
    return str(printed)


def printed_by(arguments: list[str], folder: Path) -> str:
    os.chdir(folder)
    with redirect_stdout(StringIO()) as printed:
        main(arguments)
    return printed.getvalue()


def shape_of(text: str) -> list[str]:
    """Lines without the numbers that rounding changes from machine to machine, nor the width of columns."""
    return [" ".join(NUMBER.sub("#", line).split()) for line in text.splitlines() if line.strip()]


def test_the_way_of_the_page(tmp_path: Path) -> None:
    page = PAGE.read_text(encoding="utf-8")
    save_base(tmp_path / "BASE")
    for domain in ("math", "code", "law"):
        write_jsonl(tmp_path / f"{domain}.jsonl", sums(domain, range(12)))
    write_jsonl(tmp_path / "few.jsonl", [*sums("math", range(20, 26)), *sums("code", range(20, 26))])
    outputs = {" ".join(arguments): run(arguments, tmp_path) for arguments in commands(page)}
    shown = [
        re.sub(r"^    ?", "", block, flags=re.MULTILINE) for block in re.findall(r"```text\n(.*?)```", page, re.DOTALL)
    ]
    assert shape_of(outputs["inspect both.safetensors"]) == shape_of(shown[0])
    history = run(["inspect", "fewer.safetensors"], tmp_path).partition("History\n")[2]
    assert shape_of(history) == shape_of(shown[1])
    both, law = load_file(tmp_path / "both.safetensors"), load_file(tmp_path / "runs/law/srde_weights.safetensors")
    for layer in range(2):
        name = f"layers.{layer}.deltas.free"
        assert torch.equal(law[name][:, :6], both[name])
        assert bool(law[name][:, 6:].any())
        name = f"layers.{layer}.router.weight"
        assert torch.equal(law[name][:2], both[name])
    tuned = load_file(tmp_path / "tuned.safetensors")
    assert tuned.keys() == both.keys()
    changed = {name for name in both if not torch.equal(both[name], tuned[name])}
    assert changed == {f"layers.{layer}.router.weight" for layer in range(2)}
    assert "train routers: steps 2; seed 0; data few.jsonl" in run(["inspect", "tuned.safetensors"], tmp_path)
    (error,) = run_distributed(refusal_of, 1, tmp_path)
    assert error.startswith("router_data=nowhere.jsonl: ")


def refusal_of(folder: Path) -> str:
    os.chdir(folder)
    options = CombineOptions(["runs/math", "runs/code"], "no.safetensors", top_k=2, router_data="nowhere.jsonl")
    with pytest.raises(SRDEError) as error:
        combine_command(options)
    assert not Path("no.safetensors").exists()
    return str(error.value)
