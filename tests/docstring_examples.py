"""Runs the examples in the docstrings of the public names, in a folder with the files that they name.

It needs a process of its own: training changes its environment.
"""

from __future__ import annotations

import doctest
import io
import os
from collections.abc import Callable
from contextlib import redirect_stdout
from functools import wraps
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

import srde_ds
import srde_ds.api
from srde_ds.config import AdapterConfig
from srde_ds.evaluation import rewards
from srde_ds.model.adapter import add_experts
from srde_ds.model.base import load_base
from srde_ds.training.trainer import train as train_experts
from tests.cli_helpers import DOMAINS, save_base, write_records
from tests.helpers import randomize

EXAMPLES: dict[str, Any] = {
    name: getattr(srde_ds, name) for name in srde_ds.__all__ if name not in ("SRDEError", "__version__")
}
EXAMPLES |= {made.__name__: made for made in (rewards.prompts_of, rewards.AnswerReward, rewards.FormatReward)}


def make_files(folder: Path) -> None:
    """`base`, `train.jsonl`, `held_out.jsonl`, and the experts of a run in `trained`."""
    base = save_base(folder / "base")
    write_records(folder / "train.jsonl")
    write_records(folder / "held_out.jsonl", first=100)
    config = AdapterConfig(num_experts=2, density=0.05)
    model = randomize(add_experts(load_base(base, dtype=torch.float32), config, expert_names=DOMAINS, seed=0))
    model.save_pretrained(folder / "trained")


def quietly(function: Callable[..., Any]) -> Callable[..., Any]:
    """A training run prints its table of parameters and its progress: no result of an example."""

    @wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        with redirect_stdout(io.StringIO()):
            return function(*args, **kwargs)

    return run


def run_examples() -> dict[str, tuple[int, int]]:
    """Public name -> examples that failed, and examples."""
    patch.object(srde_ds.api, "train_experts", quietly(train_experts)).start()
    runner, finder = doctest.DocTestRunner(), doctest.DocTestFinder(recurse=False)
    results = {}
    for name, public in EXAMPLES.items():
        failed = tried = 0
        for test in finder.find(public, name, globs={}):
            outcome = runner.run(test)
            failed, tried = failed + outcome.failed, tried + outcome.attempted
        results[name] = failed, tried
    return results


def main(folder: Path) -> int:
    make_files(folder)
    os.chdir(folder)
    outcomes = run_examples()
    wrong = [name for name, (failed, tried) in outcomes.items() if failed or not tried]
    print(f"{len(outcomes)} names; with examples that fail, or without any: {wrong}")
    return bool(wrong)
