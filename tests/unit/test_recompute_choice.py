"""`--recompute auto` takes as little as the plan leaves room for."""

from __future__ import annotations

from pathlib import Path

import pytest

from srde_ds.config import Config, resolve
from srde_ds.distributed.workload import Workload
from srde_ds.errors import SRDEError
from srde_ds.model.base_shape import base_shape
from srde_ds.planner import settle
from srde_ds.planner.describe import describe_plan
from srde_ds.planner.flops import step_flops
from srde_ds.planner.machines import Machines
from srde_ds.planner.memory import memory
from srde_ds.planner.plan import make_plan
from srde_ds.planner.recompute import CHOICES, settle_recompute

MINISTRAL = Path(__file__).parents[2] / "benchmarks/ministral_3_14b"


def run(choice: str = "auto", **options: object) -> Config:
    return resolve({}, {"model_name": str(MINISTRAL), "max_length": 4096, "recompute": choice} | options)


def test_the_first_that_fits() -> None:
    shape = base_shape(run())
    totals = {choice: memory(Workload.of(run(choice), 8), shape).total for choice in CHOICES}
    assert totals["none"] > totals["selective"] > totals["full"]
    for choice, total in totals.items():
        assert settle_recompute(run(), shape, 8, total)[0] == run(choice)
    chosen, why = settle_recompute(run(), shape, 8, totals["full"] / 2)
    assert chosen.model.recompute == "full" and f"full {totals['full'] / 2**30:.1f}" in why


def test_the_plan_says_which_and_why() -> None:
    plan = make_plan(run(), Machines(gpus=8, gpu_memory_gib=24.0))
    assert plan.config.model.recompute == "selective"
    assert "recompute=auto: selective, for 24.0 GiB" in describe_plan(plan)
    assert not make_plan(run("full"), Machines(gpus=8)).recompute_reason


def test_training_settles_it_by_the_memory_at_hand(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "8")
    monkeypatch.setattr(settle, "available_memory", lambda: 10 * 2**30)
    assert settle.settle(run()).model.recompute == "full"
    assert "recompute=auto: full, for 10.0 GiB" in capsys.readouterr().out
    assert settle.settle(run("none")) == run("none")
    asked = run()
    asked.flags = frozenset({"warm_start_samples"})
    settled = settle.settle(asked)
    assert settled is not asked and settled.flags == asked.flags and settled.derived == asked.derived != {}
    monkeypatch.undo()
    assert settle.available_memory() > 0


def test_operations_of_each_choice() -> None:
    shape = base_shape(run())
    none, selective, full = (step_flops(Workload.of(run(choice), 1), shape) for choice in CHOICES)
    assert none["attention scores"] == selective["attention scores"] == full["attention scores"] * 3 / 4
    assert none["experts"] < selective["experts"] == full["experts"]


def test_the_old_flag_means_full() -> None:
    assert resolve({}, {"gradient_checkpointing": True}).model.recomputed == "full"
    assert resolve({}, {"recompute": "full"}).model.recomputed == "full"
    assert resolve({}, {}).model.recomputed == "none"
    with pytest.raises(SRDEError, match="gradient_checkpointing=true with recompute=selective"):
        resolve({}, {"gradient_checkpointing": True, "recompute": "selective"})
