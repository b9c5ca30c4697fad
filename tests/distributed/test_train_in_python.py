"""`srde_ds.train` in a Python process that goes on."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from tests.cli_helpers import save_base, write_records

ROOT = Path(__file__).parents[2]
PROGRAM = """
import gc, os, sys
from srde_ds import SRDEModel, evaluate, train
os.chdir(sys.argv[1])
options = dict(model_name="base", jsonl_data="train.jsonl", domains=["red", "green"], density=0.05, bf16=False)
options |= dict(max_steps=2, gradient_accumulation_steps=1, lr_schedule="constant")
weights = [train(options, output_dir=name) for name in ("first", "second")]
assert weights[0].read_bytes() == weights[1].read_bytes()
gc.collect()
assert not [thing for thing in gc.get_objects() if isinstance(thing, SRDEModel)]  # their memory is free again
assert train(options, max_steps=3, output_dir="second", resume_from="latest") == weights[1]
assert weights[0].read_bytes() != weights[1].read_bytes()
evaluate("second", "train.jsonl", max_samples=2, bf16=False)
"""


def test_a_process_may_train_again(tmp_path: Path) -> None:
    save_base(tmp_path / "base")
    write_records(tmp_path / "train.jsonl")
    result = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(tmp_path)], cwd=ROOT, capture_output=True, text=True, timeout=300
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert (tmp_path / "second" / "evaluation.json").exists()
