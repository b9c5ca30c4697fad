"""benchmarks/learning/joint.py: two methods on a tiny base, and what the table says."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest

from benchmarks.learning import joint
from benchmarks.learning.combining_tables import Results
from benchmarks.learning.data import REAL_FOLDER
from benchmarks.learning.first_look import LOOKS
from benchmarks.learning.interference import losses_of
from benchmarks.learning.plan import Plan
from benchmarks.learning.store import read_records, run_missing
from srde_ds.config import DOMAINS
from tests.data_helpers import tiny_tokenizer
from tests.distributed.harness import run_forked
from tests.helpers import tiny_llama
from tests.unit.test_learning_benchmark import TEMPLATE

TWO = [joint.AGAINST, "SRDE, 0.02, discriminant routers"]


def try_briefly(base: Path, folder: Path, results: Path) -> None:
    budget = Plan("medium", lambda _: None).budget
    budget = replace(budget, train_items=8, validation_items=2, test_items=3, max_length=640)
    budget = replace(budget, rows_per_step=2, rows_at_once=1)
    todo = [(name, partial(joint.train_part, name, budget, 1, base, folder, steps=2)) for name in TWO]
    for _ in range(2):  # the second finds everything done
        run_missing(1, todo, results, losses_of)


@pytest.mark.skipif(
    not all((REAL_FOLDER / f"{domain}.jsonl.gz").exists() for domain in DOMAINS), reason="the real items are not here"
)
def test_methods_read_the_same_batches_and_start_as_the_base(tmp_path: Path) -> None:
    base, results, log = tmp_path / "base", tmp_path / "joint.jsonl", tmp_path / "log"
    tokenizer = tiny_tokenizer(TEMPLATE)
    tiny_llama(vocab_size=len(tokenizer), max_position_embeddings=640).save_pretrained(base)
    tokenizer.save_pretrained(base)
    assert run_forked(log, try_briefly, base, tmp_path, results) == 0, log.read_text()[-3000:]
    lora, srde = read_records(results)
    assert [lora["part"], srde["part"]] == TWO and len(lora["training"]) == 2
    assert lora["training"][0] == pytest.approx(srde["training"][0], rel=1e-2)
    assert set(lora["losses"]) == set(srde["losses"]) == set(DOMAINS)
    assert "usage" not in lora and set(srde["usage"]) == set(DOMAINS)


def test_the_table_pairs_test_rows_and_seeds() -> None:
    def record(seed: int, name: str, loss: float) -> dict[str, object]:
        rows = [[loss, 1], [2 * loss, 1]]
        return {"seed": seed, "part": name, "training": [9.0, loss], "losses": {domain: rows for domain in DOMAINS}}

    records = [record(seed, name, seed + place / 10) for seed in (1, 2) for place, name in enumerate(TWO)]
    results = Results(records, TWO)
    first, second = joint.table(results, TWO).splitlines()[2:]
    assert first.startswith(f"| {joint.AGAINST} | 1.500 | 2.250 |")
    assert second.startswith(f"| {TWO[1]} | 1.600 | 2.400 | +0.150 (+0.125 to +0.175) | +0.150 +0.150 |")
    assert set(joint.PARTS) <= LOOKS.keys()
