"""benchmarks/learning/interference.py: both methods on a tiny base, and what the table says."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch

from benchmarks.learning import interference
from benchmarks.learning.combining_tables import Results
from benchmarks.learning.data import REAL_FOLDER
from benchmarks.learning.interference import PAIR, Trial, losses_of
from benchmarks.learning.plan import Plan
from benchmarks.learning.store import read_records, run_missing
from srde_ds.config import DOMAINS
from tests.data_helpers import tiny_tokenizer
from tests.distributed.harness import run_forked
from tests.helpers import tiny_llama
from tests.unit.test_learning_benchmark import TEMPLATE

QUESTION = "What barks?\nA. a tree\nB. a dog\nAnswer with the letter."


def test_a_question_comes_in_both_domains() -> None:
    item = {"prompt": QUESTION, "response": "B", "answer": "B", "domain": "science", "split": "test"}
    letter, text = interference.pair_of(item)
    assert letter == item | {"domain": "letter"}
    assert text["answer"] == text["response"] == "a dog" and text["domain"] == "text" and text["split"] == "test"
    assert text["prompt"].startswith("What barks?\nA. a tree\nB. a dog\n") and "letter" not in text["prompt"]


def try_briefly(base: Path, folder: Path, results: Path) -> None:
    budget = replace(
        Plan("medium", lambda _: None).budget, train_items=40, validation_items=2, test_items=3, max_length=640
    )
    rates: dict[Any, float] = {"srde": 0.01, "lora": 0.003}
    with patch.multiple(interference, STEPS=2, WARMUP=1, ROWS=1, DENSITY=0.05):
        for _ in range(2):  # the second finds everything done
            run_missing(1, interference.parts(Trial(1, base, folder, budget, torch.float32), rates), results, losses_of)


@pytest.mark.skipif(
    not all((REAL_FOLDER / f"{domain}.jsonl.gz").exists() for domain in DOMAINS), reason="the real items are not here"
)
def test_both_methods_learn_one_domain_or_both(tmp_path: Path) -> None:
    base, results, log = tmp_path / "base", tmp_path / "interference.jsonl", tmp_path / "log"
    tokenizer = tiny_tokenizer(TEMPLATE)
    tiny_llama(vocab_size=len(tokenizer), max_position_embeddings=640).save_pretrained(base)
    tokenizer.save_pretrained(base)
    assert run_forked(log, try_briefly, base, tmp_path, results) == 0, log.read_text()[-3000:]
    records = {record["part"]: record for record in read_records(results)}
    assert set(records) == set(interference.wanted())
    for method in ("srde", "lora"):
        both = records[f"{method} both"]
        assert both["losses"].keys() == set(PAIR) and both["losses"]["text"] != both["losses"]["letter"]
        assert records[f"{method} alone, text"]["losses"].keys() == {"text"}
    assert records["srde both"]["usage"].keys() == set(PAIR)
    for part in (interference.COMBINED, interference.BY_PROMPT):
        assert records[part]["losses"].keys() == set(PAIR)
    assert records[interference.BY_PROMPT]["right"].keys() == set(PAIR)
    assert records["lora both"]["values"] > records["lora alone, text"]["values"]


@pytest.mark.parametrize("seeds", [[1], [1, 2]])
def test_what_the_table_says(seeds: list[int]) -> None:
    losses = dict.fromkeys(interference.wanted(), 1.0) | {"lora both": 1.5}
    records = [
        {"seed": seed, "part": part, "losses": {domain: [(10 * loss, 10), (loss, 1)] for domain in PAIR}}
        for part, loss in losses.items()
        for seed in seeds
    ]
    lines = interference.table(Results(records, interference.wanted(), PAIR)).splitlines()[2:]
    zero, less, more = (
        f"{value} ({value} to {value}" + ("; by seed " + " ".join([value] * 2) if len(seeds) > 1 else "") + ")"
        for value in ("+0.000", "-0.500", "+0.500")
    )
    assert lines[0] == f"| SRDE, an expert a domain | {zero} | {less} | 1.000 | 1.000 | 1.000 | 1.000 |"
    assert [line.split(" | ")[1] for line in lines[1:3]] == [zero, zero]
    assert lines[3] == f"| LoRA | {more} |  | 1.500 | 1.000 | 1.500 | 1.000 |"


def test_the_rate_with_the_lowest_loss_is_taken() -> None:
    records = [
        {"seed": 0, "part": f"{method} rate {rate}", "losses": {"text": [(1 + abs(rate - 0.01), 1)]}}
        for method, rates in interference.RATES.items()
        for rate in rates
    ]
    assert interference.chosen_rates(records) == {"srde": 0.01, "lora": 0.01}
