"""The schedule as a function of the step."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import pytest

from srde_ds.config import Config, resolve
from srde_ds.errors import SRDEError
from srde_ds.training.schedule import (
    ALL_KINDS,
    DELTA_VALUES,
    ROUTERS,
    Schedule,
    ScheduledStep,
)


def config(**changes: Any) -> Config:
    return resolve({}, {"num_experts": 6, "max_steps": 200, "warmup_steps": 0} | changes)


def steps_of(settings: Config) -> list[ScheduledStep]:
    schedule = Schedule.of(settings)
    return [schedule.step(number) for number in range(settings.training.max_steps)]


def test_without_options_there_is_one_phase() -> None:
    ((first, last, step),) = Schedule.of(config()).timeline()
    assert (first, last) == (0, 199)
    assert (step.phase, step.forced, step.unlocked, step.trained) == ("routed", False, 6, ALL_KINDS)
    assert Schedule.of(config()).warm_start_step is None


def test_pretraining_gives_each_expert_its_steps_and_leaves_the_router_alone() -> None:
    settings = config(supervised_experts=True, expert_pretrain_steps=10, warm_start=True)
    forced = [step.forced for step in steps_of(settings)]
    assert forced == [True] * 60 + [False] * 140
    assert all(step.trained == ALL_KINDS - ROUTERS for step in steps_of(settings)[:60])
    assert Schedule.of(settings).warm_start_step == 60


def test_sequential_pretraining_takes_one_domain_after_the_other() -> None:
    settings = config(supervised_experts=True, expert_pretrain_steps=10, pretrain_objective="sequential")
    assert [step.only_domain for step in steps_of(settings)[:60:10]] == list(range(6))
    assert [step.only_domain for step in steps_of(settings)].count(3) == 10
    assert steps_of(settings)[60].only_domain is None
    assert [step.unlocked for step in steps_of(settings)] == [1] * 60 + [6] * 140


@pytest.mark.parametrize("objective", ["parallel", "sequential"])
def test_experts_without_a_domain_make_pretraining_no_longer(objective: str) -> None:
    settings = config(
        supervised_experts=True, expert_pretrain_steps=10, pretrain_objective=objective, domains="a,b,c", num_experts=5
    )
    assert [step.forced for step in steps_of(settings)] == [True] * 30 + [False] * 170
    if objective == "sequential":
        assert [step.only_domain for step in steps_of(settings)[:30]] == [0] * 10 + [1] * 10 + [2] * 10


@pytest.mark.parametrize(
    ("unlock", "expected"),
    [
        ("all", [6] * 200),
        ("linear", [min(6, step // 33 + 1) for step in range(200)]),
        ("warmup", [1] * 20 + [6] * 180),
    ],
)
def test_unlocking(unlock: str, expected: list[int]) -> None:
    assert [step.unlocked for step in steps_of(config(progressive_unlock=unlock))] == expected


def test_unlocking_starts_after_pretraining() -> None:
    settings = config(supervised_experts=True, expert_pretrain_steps=10, progressive_unlock="warmup")
    unlocked = [step.unlocked for step in steps_of(settings)]
    assert unlocked == [6] * 60 + [1] * 14 + [6] * 126


def test_four_phases() -> None:
    found = [(step.phase, step.trained) for step in steps_of(config(training_phases="four"))]
    assert [phase for phase, _ in found] == ["warm-up"] * 20 + ["mask"] * 40 + ["delta"] * 80 + ["joint"] * 60
    assert found[59][1].isdisjoint(DELTA_VALUES) and found[60][1] == DELTA_VALUES and found[-1][1] == ALL_KINDS


def test_routers_alone() -> None:
    schedule = Schedule.of(config())
    alone = replace(schedule, curriculum=replace(schedule.curriculum, training_phases="routers"))
    found = {(alone.step(number).phase, alone.step(number).trained) for number in range(200)}
    assert found == {("routers", ROUTERS)}
    with pytest.raises(SRDEError, match="training_phases=routers without start_from: the experts would equal the base"):
        config(training_phases="routers")
    with pytest.raises(SRDEError, match=r"training_phases=routers with top_k=1: .* Give --top_k 2\."):
        config(training_phases="routers", start_from="x", top_k=1)


def test_each_text_with_its_domains_expert() -> None:
    settings = resolve({}, {"domains": "red,green", "max_steps": 4, "training_phases": "by_domain"})
    ((_, last, step),) = Schedule.of(settings).timeline()
    assert (last, step.phase, step.forced, step.trained) == (3, "by domain", True, ALL_KINDS - ROUTERS)
    assert settings.adapter.top_k == 1 and settings.derived["top_k"] == "a text uses its domain's expert alone"
    assert re.search(r"1-4 +by domain +by domain +2 +free +0.01 +routers set after", Schedule.of(settings).describe())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_experts": 5}, "with 2 domains and num_experts=5: each of several domains needs one expert"),
        ({"domains": "red"}, "with 1 domains and num_experts=1"),
        ({"supervised_experts": True}, "supervised_experts with training_phases=by_domain"),
        ({"warm_start": True}, "warm_start with training_phases=by_domain: the routers are set at the end"),
        ({"progressive_unlock": "linear"}, "progressive_unlock with training_phases=by_domain"),
        ({"start_from": "x", "train_experts": "red"}, "train_experts with training_phases=by_domain"),
        (
            {"balancing_bias_rate": 0.1},
            "balancing_bias_rate with training_phases=by_domain: the router chooses nothing",
        ),
        ({"load_balancing_target": "domains"}, "load_balancing_target with training_phases=by_domain"),
        ({"load_balancing_weight": 0.1}, "load_balancing_weight with training_phases=by_domain"),
        ({"router_z_weight": 0.1}, "router_z_weight with training_phases=by_domain"),
        ({"router_lr": 0.1}, "router_lr with training_phases=by_domain: the router chooses nothing"),
        ({"domain_statistics_rows": 0}, "domain_statistics_rows=0 with training_phases=by_domain"),
    ],
)
def test_what_does_not_go_with_by_domain_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(SRDEError, match=re.escape(message)):
        resolve({}, {"domains": "red,green", "max_steps": 200, "training_phases": "by_domain"} | changes)


def test_density_falls_by_equal_factors_to_its_target() -> None:
    settings = config(initial_density=0.16, density=0.01, density_warmup_steps=80, density_prunings=4)
    assert [step for step, _ in Schedule.of(settings).prunings] == [20, 40, 60, 80]
    assert [Schedule.of(settings).density_at(step) for step in (0, 19, 20, 40, 60, 79, 80, 199)] == pytest.approx(
        [0.16, 0.16, 0.08, 0.04, 0.02, 0.02, 0.01, 0.01]
    )
    assert Schedule.of(config()).densities == [(0, 0.01)]


def test_more_prunings_than_steps_are_one_a_step() -> None:
    settings = config(initial_density=0.08, density=0.01, density_warmup_steps=3, density_prunings=10)
    assert [step for step, _ in Schedule.of(settings).prunings] == [1, 2, 3]


def test_a_learned_support_cools_down_and_is_frozen_by_one_pruning() -> None:
    settings = config(
        support_strategy="learned", initial_density=0.08, density_warmup_steps=50, support_temperature=2.0
    )
    assert Schedule.of(settings).prunings == [(50, 0.01)]
    temperatures: list[Any] = [step.temperature for step in steps_of(settings)]
    assert temperatures[0] == 2.0 and temperatures[50:] == [None] * 150
    assert all(a > b for a, b in zip(temperatures[:49], temperatures[1:50], strict=True))
    assert temperatures[49] == pytest.approx(0.2, rel=0.06)


def test_the_timeline_covers_every_step_once_and_says_what_happens() -> None:
    settings = config(
        supervised_experts=True,
        expert_pretrain_steps=10,
        warm_start=True,
        progressive_unlock="linear",
        initial_density=0.05,
        density_warmup_steps=100,
        training_phases="four",
    )
    runs = list(Schedule.of(settings).timeline())
    assert [step for first, last, _ in runs for step in range(first, last + 1)] == list(range(200))
    table = Schedule.of(settings).describe()
    assert "61-74" in table and "routers warm-started before" in table and "pruned before" in table
    assert table.count("pruned before") == 4


def test_the_timeline_names_scores_as_long_as_there_are_any() -> None:
    learned = {"support_strategy": "learned", "initial_density": 0.08, "density_warmup_steps": 50}
    _, *rows = Schedule.of(config(training_phases="four", **learned)).describe().splitlines()
    mask = [row.split()[:5] for row in rows if " mask " in row]
    assert mask == [["21-50", "mask", "router", "6", "router+scores"], ["51-60", "mask", "router", "6", "router"]]


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"supervised_experts": True, "expert_pretrain_steps": 34}, "Lower it, or give more than 204 --max_steps"),
        ({"supervised_experts": True, "max_steps": 6}, "max_steps=6. Give more than 6 --max_steps"),
        ({"supervised_experts": True, "expert_pretrain_steps": 1, "num_experts": 4}, "6 domains and num_experts=4"),
        ({"warm_start": True, "num_experts": 1, "top_k": 1}, "nothing to route"),
        ({"progressive_unlock": "linear", "max_steps": 5}, "num_experts=6 and 5 routed steps: the last experts"),
        ({"unlock_order": "cluster_size", "warm_start": True}, "--progressive_unlock linear or warmup"),
        ({"unlock_order": "cluster_size", "progressive_unlock": "warmup"}, "--warm_start"),
        ({"warm_start": True, "warm_start_method": "domain_means", "num_experts": 8}, "share one routing vector"),
        ({"warm_start": True, "warm_start_method": "discriminant", "num_experts": 7}, "share one routing vector"),
        (
            {"warm_start": True, "warm_start_method": "domain_means", "num_experts": 2, "domains": "a"},
            "share one routing vector",
        ),
        (
            {"unlock_order": "cluster_size", "progressive_unlock": "linear"}
            | {"warm_start": True, "warm_start_method": "random"},
            "kmeans",
        ),
        ({"density_warmup_steps": 10}, "without initial_density"),
        (
            {"initial_density": 0.05, "density_warmup_steps": 0},
            "density_warmup_steps=0 with initial_density=0.05: give --density_warmup_steps",
        ),
        ({"expert_pretrain_steps": 10}, "expert_pretrain_steps=10 without supervised_experts: give --supervised_exp"),
        ({"pretrain_objective": "sequential"}, "pretrain_objective=sequential without supervised_experts"),
        ({"warm_start_method": "random"}, "warm_start_method=random without warm_start"),
        ({"warm_start_samples": 64}, "warm_start_samples=64 without warm_start: give --warm_start"),
        ({"density_prunings": 2}, "density_prunings=2 without initial_density"),
        ({"calibration_rows": 8}, "calibration_rows=8 with support_strategy=random"),
        ({"support_temperature": 2.0, "support_strategy": "random"}, "support_temperature=2.0 with support_strat"),
        ({"initial_density": 0.005, "density_warmup_steps": 10}, "above density=0.01"),
        ({"initial_density": 0.05, "density_warmup_steps": 200}, "max_steps - 1 = 199"),
        ({"support_strategy": "learned", "initial_density": None}, "--initial_density"),
        ({"support_overlap_weight": 0.1}, "--support_strategy learned"),
    ],
)
def test_what_does_not_fit_is_refused(changes: dict[str, Any], expected: str) -> None:
    with pytest.raises(SRDEError, match=re.escape(expected)):
        config(**changes)


def test_scores_that_no_phase_trains_are_refused() -> None:
    """The warm-up of 20 steps trains none."""
    learned = {"support_strategy": "learned", "initial_density": 0.08, "training_phases": "four"}
    with pytest.raises(SRDEError, match="density_warmup_steps=20 steps trains the scores. Raise"):
        Schedule.of(config(**learned, density_warmup_steps=20)).check()
    Schedule.of(config(**learned, density_warmup_steps=21)).check()
    Schedule.of(config(training_phases="four")).check()
