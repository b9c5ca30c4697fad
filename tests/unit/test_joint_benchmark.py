"""benchmarks/learning/joint.py: two methods on a tiny base, and what the table says."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import partial
from pathlib import Path
from unittest.mock import patch

import pytest
import torch

from benchmarks.learning import joint
from benchmarks.learning.data import REAL_FOLDER
from benchmarks.learning.first_look import LOOKS
from benchmarks.learning.interference import losses_of
from benchmarks.learning.plan import Plan
from benchmarks.learning.plots import plot_differences
from benchmarks.learning.store import read_records, run_missing
from srde_ds.config import DOMAINS
from tests.data_helpers import tiny_tokenizer
from tests.distributed.harness import run_forked
from tests.helpers import tiny_llama
from tests.unit.test_learning_benchmark import TEMPLATE

THREE = [joint.AGAINST, "SRDE, 0.02, discriminant routers", "SRDE, 0.02, one expert a text"]


def try_briefly(base: Path, folder: Path, results: Path) -> None:
    budget = Plan("medium", lambda _: None).budget
    budget = replace(budget, train_items=8, validation_items=2, test_items=3, max_length=640)
    budget = replace(budget, rows_per_step=2, rows_at_once=1)
    todo = partial(joint.parts, THREE, budget, 1, base=base, folder=folder, steps=2, dtype=torch.float32)
    for _ in range(2):  # the second finds everything done
        run_missing(1, todo(), results, losses_of)


@pytest.mark.skipif(
    not all((REAL_FOLDER / f"{domain}.jsonl.gz").exists() for domain in DOMAINS), reason="the real items are not here"
)
def test_methods_read_the_same_batches_and_start_as_the_base(tmp_path: Path) -> None:
    base, results, log = tmp_path / "base", tmp_path / "joint.jsonl", tmp_path / "log"
    tokenizer = tiny_tokenizer(TEMPLATE)
    tiny_llama(vocab_size=len(tokenizer), max_position_embeddings=640).save_pretrained(base)
    tokenizer.save_pretrained(base)
    assert run_forked(log, try_briefly, base, tmp_path, results) == 0, log.read_text()[-3000:]
    lora, srde, by_text = read_records(results)
    assert [lora["part"], srde["part"], by_text["part"]] == THREE and len(lora["training"]) == 2
    assert lora["training"][0] == pytest.approx(srde["training"][0], rel=1e-2)
    assert by_text["training"][0] == pytest.approx(srde["training"][0], rel=1e-5)
    assert by_text["training"][1] != srde["training"][1] and by_text["dtype"] == "float32"
    assert set(lora["losses"]) == set(srde["losses"]) == set(DOMAINS)
    assert "usage" not in lora and set(srde["usage"]) == set(DOMAINS)
    assert set(by_text["right"]) == set(DOMAINS) and "right" not in srde
    assert all(max(shares) < 1 for shares in srde["usage"].values())


def test_the_table_pairs_test_rows_and_seeds() -> None:
    def record(seed: int, name: str, loss: float) -> dict[str, object]:
        rows = [[loss, 1], [2 * loss, 1]]
        return {
            "seed": seed,
            "part": name,
            "training": [9.0, 9.0, loss, loss],
            "losses": {domain: rows for domain in DOMAINS},
        }

    measured = [(1, 0), (2, 0), (1, 1), (2, 1), (2, 2)]
    records = [record(seed, THREE[place], seed + place / 10) for seed, place in measured]
    records.append(record(3, "one delta, 0.01", 1.0))  # nothing to compare it with yet
    first, second, third = joint.table(records).splitlines()[2:]
    assert first.startswith(f"| {joint.AGAINST} | 2.250 | 1, 2 | 1.500 | 2.25 |")
    assert second.startswith(
        f"| {joint.shown(THREE[1])} | +0.150 (+0.125 to +0.175) | 1: +0.150, 2: +0.150 | +0.100 ± 0.000 | +0.15"
    )
    assert third.startswith(
        f"| {joint.shown(THREE[2])} | +0.300 (+0.250 to +0.350) | 2: +0.300 | +0.200 ± 0.000 | +0.30 |"
    )
    by_domain = [record(2, name, 1.0 + place) for place, name in enumerate(joint.PARTS[-2:])]
    other_loss = f"| {joint.AGAINST_BY_DOMAIN} | -1.500 (-1.750 to -1.250) | 2: -1.500 |  | -1.50"
    assert other_loss in joint.table(records + by_domain)
    _, second = joint.table(by_domain, joint.AGAINST_BY_DOMAIN).splitlines()[2:]
    assert second.startswith(
        f"| {joint.shown(joint.PARTS[-1])} | +1.500 (+1.250 to +1.750) | 2: +1.500 | +1.000 ± 0.000 |"
    )
    assert set(joint.PARTS) <= LOOKS.keys()
    assert joint.table(records[-1:]) == joint.table([]) == "not run"


def test_the_picture_has_what_is_near_and_compared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def record(seed: int, name: str, loss: float) -> str:
        return json.dumps({"seed": seed, "part": name, "losses": {domain: [[loss, 1]] for domain in DOMAINS}})

    monkeypatch.setattr(joint, "RESULTS", tmp_path)
    far, alone, other = "SRDE, 0.02", "one delta, 0.01", joint.PARTS[-1]
    lines = [record(1, joint.AGAINST, 1.0), record(1, THREE[1], 1.02), record(1, far, 1.5), record(2, alone, 1.0)]
    (tmp_path / "joint.jsonl").write_text("\n".join([*lines, record(1, other, 1.0)]) + "\n")
    (tmp_path / "joint_150.jsonl").write_text("\n".join([lines[0], record(1, THREE[1], 0.99)]) + "\n")
    with patch.object(joint, "plot_differences", wraps=plot_differences) as plot:
        joint.draw(tmp_path / "joint.png")
    name = joint.shown(THREE[1])
    assert list(plot.call_args.args[0]) == [f"{name} (150 steps, 1 seed)", f"{name} (40 steps, 1 seed)"]
    assert (tmp_path / "joint.png").stat().st_size > 0
