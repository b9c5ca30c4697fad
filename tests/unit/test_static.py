"""What is known of a training step without a GPU has not become worse than the committed record."""

from __future__ import annotations

import json
from importlib.metadata import version
from typing import Any

import pytest
import torch
from torch import nn

from benchmarks import static
from benchmarks.performance import FIRST_EXPERT_KERNELS

HOW = "If that is meant, run `python -m benchmarks.static`, commit its record and say why in the message."


@pytest.fixture(scope="module")
def recorded() -> dict[str, Any]:
    found: dict[str, Any] = json.loads(static.RECORD.read_text())
    return found


def test_nothing_has_become_worse(recorded: dict[str, Any]) -> None:
    for package in ("torch", "transformers"):  # other releases launch other kernels
        if version(package) != recorded["environment"]["versions"][package]:
            pytest.skip(f"the record is of {package} {recorded['environment']['versions'][package]}")
    found = static.cheap()
    worse = static.worse(found, recorded)
    assert not worse, "worse than recorded: " + "; ".join(worse) + f". {HOW}"


@pytest.mark.parametrize(("key", "recompute"), [("memory_14b", "full"), ("memory_14b_selective", "selective")])
def test_the_plan_knows_the_memory_of_the_14_b_shape(recorded: dict[str, Any], key: str, recompute: str) -> None:
    found = recorded[key]
    assert found["planned_gib"] == pytest.approx(found["counted_gib"], rel=0.03)
    planned = static.planned_memory(40, recompute)
    assert planned == pytest.approx(found["planned_gib"], rel=1e-3), f"the plan has changed. {HOW}"


def test_a_layer_of_the_14_b_shape_takes_what_the_plan_says() -> None:
    found = static.micro_step_memory(1)
    assert found["counted_gib"] == pytest.approx(found["planned_gib"], rel=0.03)


def test_the_plan_knows_the_bytes_of_collectives(recorded: dict[str, Any]) -> None:
    for found in recorded["collective_bytes"].values():
        assert found["planned"] == pytest.approx(found["counted"], rel=0.01)


def test_neuron_experts_wait_for_nothing(recorded: dict[str, Any]) -> None:
    waits = {form: found["waits"] for form, found in recorded["layer"].items()}
    assert not any(count for form, count in waits.items() if form not in ("blocks", "single weights"))


def test_a_decoded_token_fits_into_a_cuda_graph(recorded: dict[str, Any]) -> None:
    assert len(recorded["decoding"]) == 3
    assert not any(found["waits"] or found["graph_breaks"] for found in recorded["decoding"].values())


def test_with_kernels_the_experts_add_at_most_a_third_of_what_they_did(recorded: dict[str, Any]) -> None:
    base = recorded["layer"]["frozen base"]["kernels"]
    added = {form: found["kernels"] - base for form, found in recorded["layer"].items()}
    for with_kernels, form in static.WITH_KERNELS.items():
        assert added[with_kernels] <= FIRST_EXPERT_KERNELS / 3
        assert added[with_kernels] < added[form] < FIRST_EXPERT_KERNELS


def test_launches_of_the_experts_kernels_are_counted() -> None:
    model = static.small_llama(1, expert_kernels=True)
    found = static.micro_step(model, 1, 8, static.without_values(model))
    assert (found.kernels["experts_forward"], found.kernels["experts_backward"]) == (1, 1)
    model = static.small_llama(1)
    assert not static.micro_step(model, 1, 8, static.without_values(model)).kernels["experts_forward"]


def test_more_is_worse_and_less_is_not() -> None:
    recorded = {"layer": {"a": {"kernels": 100}}, "breaks": 0}
    assert static.worse({"layer": {"a": {"kernels": 100}}, "breaks": 0}, recorded) == []
    assert static.worse({"layer": {"a": {"kernels": 90}}, "breaks": 0}, recorded) == []
    assert static.worse({"layer": {"a": {"kernels": 102}}, "breaks": 1}, recorded) == [
        "layer.a.kernels: 102, recorded 100",
        "breaks: 1, recorded 0",
    ]
    assert static.worse({"new": 1}, recorded) == ["new: not recorded"]


def test_operators_are_counted() -> None:
    linear, x = nn.Linear(8, 4, bias=False), torch.ones(2, 8)
    with static.Operators() as found:
        product = linear(x).view(8)  # a view is no kernel
        bool(product.sum() > 0)
    assert found.kernels == {"mm": 1, "sum": 1, "gt": 1}
    assert found.waits == {"_local_scalar_dense": 1}


def test_bytes_are_counted_while_they_live() -> None:
    with static.Operators() as found:
        first = torch.ones(1000)
        second = first + 1
        del first
        third = second.view(10, 100) * 2
    assert (found.peak, found.live) == (8000, 8000)
    del second, third
    assert found.live == 0
