"""benchmarks/learning/combining.py: all parts of a tiny base, and what the tables say of them."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest

from benchmarks.learning import combining, combining_answers, combining_tables, plots
from benchmarks.learning.combining_tables import Results
from benchmarks.learning.store import read_records
from srde_ds.config import DOMAINS
from tests.data_helpers import tiny_tokenizer
from tests.distributed.harness import run_forked
from tests.helpers import tiny_llama
from tests.unit.test_learning_benchmark import TEMPLATE

ROOT = Path(__file__).parents[2]
MERGES = [("cat", 1.0), ("dare_ties", 0.5)]


def measure_briefly(arguments: list[str]) -> None:
    short: dict[str, Any] = {"STEPS": 2, "WARMUP": 1, "MERGES": MERGES, "SWEEP_DOMAINS": ("code",)}
    short["RATES"] = {"srde": (0.01,), "lora": (0.003,)}
    with patch.multiple(combining, **short), patch.object(sys, "argv", ["combining", *arguments]):
        combining.main()


def answer_briefly(arguments: list[str]) -> None:
    with patch.object(combining_answers, "BEST_MERGE", MERGES[0]), patch.object(sys, "argv", ["answers", *arguments]):
        combining_answers.main()


def measure_twice_and_answer(places: list[str], results: Path, answers: Path) -> None:
    """In one process, whose imports take as long as half of the runs; the second time everything is done."""
    common = [*places, "--seeds", "1", "--budget", "toy"]
    for _ in range(2):
        measure_briefly([*common, "--results", str(results)])
    answer_briefly([*common, "--results", str(answers)])


def test_all_parts_of_a_tiny_base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base, results, log = tmp_path / "base", tmp_path / "combining.jsonl", tmp_path / "log"
    tokenizer = tiny_tokenizer(TEMPLATE)
    tiny_llama(vocab_size=len(tokenizer), max_position_embeddings=640).save_pretrained(base)
    tokenizer.save_pretrained(base)
    places, answers = ["--base", str(base), "--folder", str(tmp_path)], tmp_path / "answers.jsonl"
    assert run_forked(log, measure_twice_and_answer, places, results, answers) == 0, log.read_text()[-3000:]
    records = read_records(results)
    parts = [record["part"] for record in records if record["seed"] == 1]
    assert len(set(parts)) == len(parts) == 6 + 4 + 5 + 1 + 6 + len(MERGES) + 6
    found: dict[str, Any] = {record["part"]: record for record in records if record["seed"] == 1}
    for domain in DOMAINS:  # the same batches and the same loss: before its first update every method is the base
        srde, lora = found[f"srde alone, {domain}"], found[f"lora alone, {domain}"]
        assert srde["training"][0] == pytest.approx(lora["training"][0], rel=1e-3)
        assert "usage" not in srde and all(count for _, count in srde["losses"][domain])
    assert len(found["srde turn 3"]["usage"]["code"]) == 3 and len(found["srde combined"]["usage"]["math"]) == 6
    assert found["lora turn 6"]["values"] == pytest.approx(found["srde joint"]["values"], rel=0.2)
    monkeypatch.setattr(combining_tables, "MERGES", MERGES)
    table = combining_tables.apart(Results(records, combining_tables.parts_apart()))
    assert len(table.splitlines()) == 2 + 5 + len(MERGES) + 2
    by_prompt = found["srde combined, by prompt"]
    assert all(0 <= right <= count and count for right, count in by_prompt["right"].values())
    assert by_prompt["losses"].keys() == found["srde combined"]["losses"].keys()
    assert len(combining_tables.added(Results(records, combining_tables.parts_of_turns())).splitlines()) == 2 + 3
    answered = {record["part"]: record["right"] for record in read_records(answers)}
    monkeypatch.setattr(combining_tables, "BEST_MERGE", MERGES[0])
    assert answered.keys() == set(combining_tables.parts_of_accuracy())
    assert [len(right) for right in answered["base"].values()] == [2] * 6 and answered["lora alone, code"].keys() == {
        "code"
    }


def rows(loss: float) -> dict[str, list[tuple[float, int]]]:
    return {domain: [(10 * loss, 10), (loss, 1)] for domain in DOMAINS}


def test_what_tables_and_pictures_say(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(combining_tables, "MERGES", MERGES)
    losses = {
        "base": 3.0,
        "srde joint": 1.0,
        "srde combined": 1.25,
        "srde combined, by prompt": 1.0,
        "srde combined, top 2": 1.25,
    }
    losses["srde alone, math"] = 1.5
    losses |= {f"lora merged, {kind}, {weight}": 2.0 for kind, weight in MERGES}
    losses |= {f"srde turn {turn}": 1.5 for turn in range(2, 7)}
    losses |= {f"lora turn {turn}": 1 + turn / 10 for turn in range(1, 7)}
    records = [{"seed": 1, "part": part, "losses": rows(loss)} for part, loss in losses.items()]
    results = Results([*records, {"seed": 2, "part": "base", "losses": rows(9.0)}], losses)
    assert results.seeds == [1]  # the second has one part only
    total, limits, by_seed = results.difference("srde combined", "srde joint")
    assert total == pytest.approx(0.25) and limits == pytest.approx([0.25, 0.25]) and by_seed == [total]
    assert combining_tables.forgetting(results, "srde") == pytest.approx(dict.fromkeys(DOMAINS[:-1], 0.0))
    assert combining_tables.forgetting(results, "lora")["code"] == pytest.approx(0.3)
    assert "| LoRA, trained on | +0.300 | 1.600 |" in combining_tables.turns(results)

    losses |= {f"{method} alone, {domain}": 1.0 for method in ("srde", "lora") for domain in DOMAINS}
    records = [{"seed": 1, "part": part, "losses": rows(loss)} for part, loss in losses.items()]
    by_prompt = next(record for record in records if record["part"] == "srde combined, by prompt")
    by_prompt["right"] = {"math": [1500, 2000], "code": [200, 200]}
    of_apart = combining_tables.apart(Results(records, losses))
    assert "chosen by its prompt (the right one for 1,700 of 2,200 texts) | 1.000 | +0.000" in of_apart
    assert (
        "| SRDE, six experts trained apart, then combined: one a token | 1.250 | +0.250 (+0.250 to +0.250) |"
        in of_apart
    )
    assert of_apart.count("| LoRA, of each domain its own adapter | 1.000 | +0.000 (+0.000 to +0.000) |  |") == 1
    with patch.object(combining_tables, "plot_differences", wraps=plots.plot_differences) as plot:
        combining_tables.draw_apart(Results(records, losses), tmp_path / "apart.png")
    drawn = plot.call_args.args[0]
    assert len(drawn) == 5 and not any("merged" in name for name in drawn)  # merges and base are too far away
    combining_tables.draw_turns(results, tmp_path / "turns.png")
    assert {path.name for path in tmp_path.iterdir()} == {"apart.png", "turns.png"}


def test_what_the_table_of_right_answers_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(combining_tables, "BEST_MERGE", MERGES[0])
    right = {part: [0, 0, 0, 1] for part in combining_tables.parts_of_accuracy()} | {"srde combined": [1, 1, 0, 1]}
    records = [{"seed": 1, "part": part, "right": dict.fromkeys(DOMAINS, own)} for part, own in right.items()]
    results = Results(combining_tables.answers_as_losses(records), combining_tables.parts_of_accuracy())
    lines = combining_tables.accuracy(results).splitlines()
    assert len(lines) == 2 + len(combining_tables.of_accuracy())
    assert "one a token | 75.0% | +50.0 (" in lines[2] and lines[2].endswith("| 75% | 75% | 75% | 75% | 75% | 75% |")


def test_the_rate_with_the_lowest_loss_is_taken() -> None:
    records = [
        {"part": f"lora rate {rate}, {domain}", "losses": rows(1 + abs(rate - 0.003))}
        for rate in combining.RATES["lora"]
        for domain in combining.SWEEP_DOMAINS
    ]
    assert combining.chosen_rates(records, ["lora"]) == {"lora": 0.003}


def test_a_form_of_srde_has_its_own_tables() -> None:
    records = [{"seed": 1, "part": part} for part in ("base", "lora alone, math", "srde joint", "quarters joint")]
    for method in ("srde", "quarters"):
        own = combining_tables.of_form([record | {"from": record["part"]} for record in records], method)
        assert [record["part"] for record in own] == ["base", "lora alone, math", "srde joint"]
        assert own[-1]["from"] == f"{method} joint"
