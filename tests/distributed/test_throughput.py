"""benchmarks/throughput.py on a tiny base: every method runs, and all compute the same thing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks.throughput import METHODS, Options, measure, record, table
from tests.distributed.harness import Ranks


def measured() -> dict[str, Any]:
    return measure(Options("tiny", checkpointing=(False,), length=32, repeats=1, density=0.05, experts=3))


def test_the_methods_side_by_side(one_rank: Ranks, tmp_path: Path) -> None:
    result = one_rank(measured)[0]
    cases = {row["case"]: row for row in result["cases"]}
    ways = [(method, way) for method in METHODS for way in ("plain", "engine")]
    assert list(cases) == [f"{method}, {way}" for method, way in ways if way == "plain" or method.startswith("SRDE")]
    # Adapters begin as the base, and the engine computes what the plain loop computes.
    losses = [row["loss"] for row in cases.values()]
    assert losses == pytest.approx([losses[0]] * len(losses), rel=1e-5)
    values = {name: row["trained_values"] for name, row in cases.items()}
    assert values["frozen base, plain"] == 0
    assert values["PEFT LoRA, feed-forward, plain"] == pytest.approx(values["SRDE neuron, plain"], rel=0.1)
    assert values["SRDE neuron, engine"] == values["SRDE neuron, plain"]
    assert all(row["median_seconds"] > 0 and row["peak_mib"] > 0 for row in cases.values())
    assert all(0 < row["utilisation"] < 1 for row in cases.values())
    assert cases["frozen base, plain"]["of_frozen"] == 1
    assert all(name in table(result) for name in cases)
    path = tmp_path / "throughput.json"
    for repeats in (1, 2):  # the same case again takes the place of the first
        record(result | {"options": result["options"] | {"repeats": repeats}}, path)
    assert [one["options"]["repeats"] for one in json.loads(path.read_text())["results"]] == [2]
