"""benchmarks/learning/first_look.py: what is put beside the experts, and what its table says."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.learning import first_look
from benchmarks.learning.first_look import LOOKS, Look, difference, factor, table, train, with_experts
from benchmarks.learning.plan import Plan
from benchmarks.learning.rivals import Masters
from benchmarks.learning.store import RESULTS, read_records
from srde_ds.config import AdapterConfig
from srde_ds.config.values import checked
from tests.helpers import tiny_llama, tokens

SMALL: dict[str, Any] = {"num_experts": 2, "density": 0.05}


@pytest.mark.parametrize("attention", [0, 3])
def test_what_is_put_beside_the_experts_starts_as_the_base_and_learns(attention: int) -> None:
    base = tiny_llama()
    ids = tokens()
    with torch.no_grad():
        expected = base(ids).logits
    look = Look(rates={"muon_lr": 0.01}, adapter=SMALL, attention=attention)
    trainee = with_experts(look, base, inputs=None, seed=0)  # type: ignore[arg-type]  # only six experts read rows
    experts = sum(parameter.numel() for _, parameter in trainee.model.trainable_parameters())
    config = base.config
    head = config.hidden_size // config.num_attention_heads
    keys = config.num_key_value_heads * head
    widths = 2 * (config.hidden_size + config.num_attention_heads * head) + 2 * (config.hidden_size + keys)
    beside = config.num_hidden_layers * attention * widths
    assert sum(parameter.numel() for parameter in trainee.parameters) == experts + beside
    torch.testing.assert_close(trainee.model(ids).logits, expected)
    trainee.model(ids, labels=ids).loss_sum.backward()
    for optimizer in trainee.optimizers:
        optimizer.step()
    moved = [parameter for parameter in trainee.parameters if parameter.grad is not None and parameter.grad.any()]
    assert len(moved) >= len(trainee.optimizers) and not torch.allclose(trainee.model(ids).logits, expected)
    trained = {id(parameter) for parameter in trainee.parameters}
    assert all(id(parameter) in trained for parameter in trainee.model.base.parameters() if parameter.requires_grad)


class Stream:
    """Rows that depend on the step."""

    def micro_batch(self, step: int, micro: int, **_: int) -> dict[str, Tensor]:
        ids = tokens(seed=step)
        places = torch.arange(ids.shape[1]).expand_as(ids)
        mask, domain = torch.ones_like(ids).bool(), torch.zeros(len(ids), dtype=torch.long)
        return {"input_ids": ids, "labels": ids, "position_ids": places, "token_mask": mask, "domain": domain}


@pytest.mark.parametrize("masters", [False, True])
def test_a_stopped_run_goes_on_as_if_it_had_not_stopped(
    masters: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(first_look, "SAVE_STEPS", 2)

    def run(steps: int, resumable: Path | None) -> list[float]:
        torch.manual_seed(0)
        trainee = with_experts(Look(rates={"muon_lr": 0.01}, adapter=SMALL), tiny_llama(), None, seed=0)  # type: ignore[arg-type]
        if masters:
            copies = Masters(trainee.parameters)
            optimizer = torch.optim.AdamW(copies.values, lr=0.01)
            trainee = replace(trainee, parameters=copies.values, optimizers=[optimizer], masters=copies)
        rates = partial(factor, steps=5)
        return train(trainee, Stream(), 1, 1, steps, rates, resumable)  # type: ignore[arg-type]

    state = tmp_path / "state.pt"
    whole = run(5, None)
    assert run(3, state) == whole[:3] and state.exists()
    assert run(5, state) == whole
    assert len(set(whole)) == 5


def test_looks_are_options_that_the_package_knows_and_the_rate_falls() -> None:
    for look in LOOKS.values():
        AdapterConfig(**{name: checked(AdapterConfig, name, value) for name, value in look.adapter.items()})
    assert [factor(step) for step in (0, 3, 4, 22)] == pytest.approx([0.25, 1.0, 1.0, 0.5])
    assert Plan("medium", lambda _: None).budget.steps > first_look.STEPS


def test_the_table_pairs_the_steps(tmp_path: Path) -> None:
    assert difference(([9.0, 9.0, 1.0, 1.2], [0.0, 0.0, 0.9, 1.0])) == pytest.approx((0.15, 0.635), abs=1e-3)
    records = read_records(RESULTS / "first_look.jsonl")
    lines = table(records).splitlines()
    assert len(lines) == len(records) + 2 and {record["name"] for record in records} <= LOOKS.keys()
    losses = [float(line.split("|")[3]) for line in lines[2:]]
    assert losses == sorted(losses)
    first_look.draw(records, tmp_path / "first.png")
    assert (tmp_path / "first.png").stat().st_size > 10_000
