"""benchmarks/learning: what is run next, what a table says, and a few runs of a tiny base from command to page."""

from __future__ import annotations

import copy
import gzip
import json
import math
import os
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.learning import data, methods, rivals, run, tables, worker
from benchmarks.learning.data import Inputs
from benchmarks.learning.plan import Plan, Record, Run, in_steps, late_loss
from benchmarks.learning.store import Store, read_records
from benchmarks.learning.summary import first_crossing, result_of, sweep_of
from srde_ds.config import DOMAINS
from srde_ds.errors import SRDEError
from srde_ds.model.adapter import add_experts
from srde_ds.model.feed_forward import ROLES, find_feed_forward
from tests.data_helpers import tiny_tokenizer
from tests.distributed.harness import run_forked
from tests.helpers import tiny_llama

ROOT = Path(__file__).parents[2]
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# Of two layers: A and B of three projections; of seven; router and three experts' A and B; one tensor a projection.
PARAMETERS = {
    "LoRA": 12,
    "LoRA on all linear layers": 28,
    "rsLoRA": 12,
    "LoRA with Muon": 12,
    "routed LoRA": 14,
    "SHiRA": 6,
}
Judge = Callable[[Run], float]


def figures(run: Run, loss: float) -> Record:
    """What a worker would say; a loss that is not finite means that the run diverged."""
    common = {"seconds": 10.0, "versions": {}, "git_revision": "abc", "base": "b"}
    if not math.isfinite(loss):
        return common | {"diverged": "step 3"}
    by_domain = dict.fromkeys(DOMAINS, loss)
    trained = {"validation_loss": loss, "values": 7, "tokens": 100, "training_seconds": 5.0, "losses": [loss] * 10}
    tested = {"test_loss": by_domain, "accuracy": dict.fromkeys(DOMAINS, 0.25), "text_perplexity": 30.0}
    return common | trained | (tested if run.report else {}) | {"curve": [[0, 4.0], [10, loss]]}


def finish(plan: Plan, store: Store, row: str, judge: Judge) -> list[Run]:
    """Do all runs of a row in the order the driver takes; they are returned."""
    done = []
    while ready := plan.missing([plan.rows[row]])[0]:
        store.add(ready[0], figures(ready[0], judge(ready[0])))
        done.append(ready[0])
    return done


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "results/small.jsonl", "here")


@pytest.fixture
def plan(store: Store) -> Plan:
    return Plan("small", store.find)


@pytest.mark.parametrize("budget", ["toy", "small", "medium", "full"])
def test_the_trainer_knows_the_flags_of_every_row(budget: str, tmp_path: Path) -> None:
    plan = Plan(budget, lambda run: None)
    inputs = Inputs(tmp_path, tmp_path, tmp_path, tmp_path)
    for row in plan.rows.values():
        config = methods.config_of(plan.example(row), inputs, tmp_path)
        rows = config.training.batch_size * config.training.gradient_accumulation_steps
        assert rows == plan.budget.rows_per_step
        assert config.training.max_steps == plan.budget.steps or row.flags["max_steps"].endswith("%")


def test_percentages_become_steps() -> None:
    assert in_steps({"max_steps": "65%", "eval_steps": "5%"}, 400) == {
        "max_steps": 260,
        "warmup_steps": 26,
        "eval_steps": 13,
    }
    pretrained = in_steps({"supervised_experts": True, "expert_pretrain_steps": "25%"}, 400)
    assert pretrained["expert_pretrain_steps"] == 16  # 100 steps over six experts
    assert "expert_pretrain_steps" not in in_steps({"supervised_experts": False, "expert_pretrain_steps": "25%"}, 400)


def test_the_rate_with_the_least_late_loss_is_reported(plan: Plan, store: Store) -> None:
    losses = {0.02: 1.5, 0.06: math.inf, 0.006: 1.2}
    done = finish(plan, store, "SRDE neuron", lambda run: losses[run.flags["muon_lr"]])
    swept, reported = done[:6], done[6:]
    assert [(run.flags["muon_lr"], run.seed) for run in swept] == [(rate, seed) for rate in losses for seed in (0, 4)]
    assert not any(run.report for run in swept)
    assert {run.flags["muon_lr"] for run in reported} == {0.006} and all(run.report for run in reported)
    assert [run.seed for run in reported] == plan.budget.seeds == [1, 2, 3]
    result = result_of(plan, plan.rows["SRDE neuron"])
    assert result is not None and result.at_edge
    # A variant takes the rate without a sweep of its own, and a row of several suites is run once.
    assert [run.flags["muon_lr"] for run in finish(plan, store, "four phases", lambda run: 1.0)] == [0.006] * 3
    assert plan.select(["baselines", "optimizer"], only=["SRDE neuron"]) == [plan.rows["SRDE neuron"]]


def test_a_rate_is_chosen_by_its_mean_over_the_seeds_of_the_sweep(plan: Plan, store: Store) -> None:
    losses = {(0.02, 0): 1.5, (0.02, 4): 1.4, (0.06, 0): 1.2, (0.06, 4): 1.9, (0.006, 0): 1.1, (0.006, 4): math.inf}
    row = plan.rows["SRDE neuron"]
    for run_of_sweep in plan.sweep(row):
        assert plan.rates(row) is None
        store.add(run_of_sweep, figures(run_of_sweep, losses[run_of_sweep.flags["muon_lr"], run_of_sweep.seed]))
    assert plan.rates(row) == {"muon_lr": 0.02}
    assert sweep_of(plan, row) == [(0.02, 1.45), (0.06, pytest.approx(1.55))]  # where one diverged, there is no mean


def test_late_losses_are_those_of_the_second_half_of_the_steps() -> None:
    assert late_loss({"losses": [9.0, 8.0, 1.0, 2.0, 3.0]}) == 2.0
    assert late_loss({"diverged": "step 3"}) == math.inf


def test_a_row_that_diverges_at_every_rate_stops_nothing_else(plan: Plan, store: Store) -> None:
    done = finish(plan, store, "LoRA", lambda run: math.inf)
    assert len(done) == plan.budget.rates * len(plan.budget.sweep_seeds)
    assert plan.missing([plan.rows["LoRA"]]) == ([], 0) and result_of(plan, plan.rows["LoRA"]) is None


def test_results_of_other_machines_and_torn_lines_count_as_not_run(plan: Plan, store: Store) -> None:
    (first, *_), _ = plan.missing([plan.rows["LoRA"]])
    store.add(first, figures(first, 1.0))
    with store.path.open("a") as file:
        file.write('{"key": "half')
    assert len(read_records(store.path)) == 1
    assert Store(store.path, "here").find(first) is not None
    assert Store(store.path, "there").find(first) is None


def test_the_driver_goes_on_where_it_stopped(
    plan: Plan, store: Store, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    rows, calls = plan.select(["baselines"], core=True), []

    def work(run: Run) -> Record:
        calls.append(run)
        if len(calls) == 5:
            raise KeyboardInterrupt
        return figures(run, 1.0)

    monkeypatch.setattr(worker, "work", work)
    with run.InThisProcess() as pool:
        with pytest.raises(KeyboardInterrupt):
            run.drive(plan, store, rows, pool, 1, math.inf)
        assert run.drive(plan, store, rows, pool, 1, math.inf) == (0, [])
        # 7 rows with 3 rates at 2 seeds and 3 reported seeds each, base and variant with 3; the fifth was begun twice.
        assert len(calls) == 7 * 9 + 2 * 3 + 1 and len(read_records(store.path)) == len(calls) - 1
        assert run.drive(plan, store, rows, pool, 1, math.inf) == (0, []) and len(calls) == 7 * 9 + 2 * 3 + 1
    assert "[65 done, 0 left" in capsys.readouterr().out


def test_no_run_is_started_that_would_end_after_the_limit(
    plan: Plan, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    finish(plan, store, "LoRA", lambda run: 1.0)
    monkeypatch.setattr(worker, "work", lambda run: pytest.fail("started"))
    with run.InThisProcess() as pool:
        left = run.drive(plan, store, [plan.rows["SHiRA"]], pool, 1, time.monotonic() + 11)  # a run takes 10 s
    assert left == (9, [])


def test_a_run_that_fails_stops_no_other_and_is_named(
    plan: Plan, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    def work(run: Run) -> Record:
        if run.row == "LoRA":
            raise SRDEError("no memory")
        return figures(run, 1.0)

    monkeypatch.setattr(worker, "work", work)
    with run.InThisProcess() as pool:
        left, failures = run.drive(plan, store, [plan.rows["LoRA"], plan.rows["SHiRA"]], pool, 1, math.inf)
    assert left == 9 and sorted(failures) == ["LoRA, seed 0: no memory"] * 3 + ["LoRA, seed 4: no memory"] * 3
    assert plan.missing([plan.rows["SHiRA"]]) == ([], 0)


def test_names_that_are_not_there_are_refused(plan: Plan) -> None:
    with pytest.raises(SRDEError, match="budget=tiny"):
        Plan("tiny", lambda run: None)
    with pytest.raises(SRDEError, match="suite=speed"):
        plan.select(["speed"])
    with pytest.raises(SRDEError, match="rows=LoRA: not in routing"):
        plan.select(["routing"], only=["LoRA"])


def test_the_page_shows_means_spreads_and_what_is_missing(plan: Plan, store: Store, tmp_path: Path) -> None:
    page = tmp_path / "results.md"
    page.write_text(
        "by hand\n<!-- learning: small baselines -->\nold\n<!-- end -->\nby hand, too\n"
        "<!-- learning: small optimizer -->\n<!-- end -->\n<!-- learning: full runs -->\n<!-- end -->\n"
    )
    by_seed = {0: 1.0, 1: 1.0, 2: 1.1, 3: 1.2, 4: 1.0}
    finish(plan, store, "SRDE neuron", lambda run: by_seed[run.seed])
    finish(plan, store, "LoRA", lambda run: by_seed[run.seed] - (0.2 if run.seed < 3 else 0.5))
    finish(plan, store, "SRDE neuron, AdamW", lambda run: by_seed[run.seed] + 1.0)
    tables.write(page, store.path.parent)
    text = page.read_text()
    assert text.startswith("by hand\n") and "\nby hand, too\n" in text and "old" not in text
    assert text.count("| SRDE neuron | 7 | 0.02 | 1.1000 ± 0.1000 |  |  | 25.0 ± 0.0 % | 30.00 ± 0.00 | 20 |") == 2
    # Losses 0.8, 0.9, 0.7 against 1.0, 1.1, 1.2.
    assert "| LoRA | 7 | 0.003 | 0.8000 ± 0.1000 | -0.3000 ± 0.1732 | SRDE neuron |" in text
    assert "Without results: base; only warm start from domain means; SRDE element;" in text and "No runs yet." in text
    # Each curve falls straight from 4; Muon's meets the other's end after 2 / 3, 1.9 / 2.9 and 1.8 / 2.8 of the steps.
    assert "| SRDE neuron | 65 ± 1 % | 65 ± 1 % | × 1.00 ± 0.00 |" in text
    assert (tmp_path / "results/small-baselines.png").stat().st_size > 1000


@pytest.mark.parametrize(
    "row", ["LoRA", "LoRA on all linear layers", "rsLoRA", "LoRA with Muon", "routed LoRA", "SHiRA", "one delta"]
)
def test_methods_of_equal_size_are_of_equal_size(row: str, plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rivals, "domain_routers", lambda *_: [torch.zeros(len(DOMAINS), 128)] * 2)
    sizes = {}
    for name in (row, "SRDE neuron"):
        run = plan.example(plan.rows[name])
        base = tiny_llama(hidden_size=128, intermediate_size=1600)
        if run.kind == "srde":
            config = methods.config_of(run, Inputs(*[Path()] * 4), Path())
            names = [f"expert{e}" for e in range(config.adapter.num_experts)]
            model = add_experts(base, config.adapter, expert_names=names, seed=0)
            sizes[name] = sum(math.prod(p.srde_shape) for _, p in model.trainable_parameters())
        else:
            parameters = rivals.PARAMETERS[run.kind](base, run, Inputs(*[Path()] * 4))
            assert len(parameters) == PARAMETERS[row]
            sizes[name] = sum(p.numel() for p in parameters)
    # Six experts of a whole rank each come less close on so narrow a base.
    assert abs(sizes[row] / sizes["SRDE neuron"] - 1) < (0.2 if row == "routed LoRA" else 0.05)


def test_short_sweeps_choose_what_is_swept_at_full_length(store: Store) -> None:
    plan = Plan("medium", store.find)
    short, full = plan.budget.short_steps, plan.budget.steps
    losses = {0.02: 1.3, 0.06: 1.2, 0.006: 1.4, 0.2: math.inf, 0.002: 1.6}
    done = finish(
        plan,
        store,
        "SRDE neuron",
        # At full length the order is another one.
        lambda run: losses[run.flags["muon_lr"]] if run.budget.steps == short else 2 - losses[run.flags["muon_lr"]],
    )
    swept = [(run.flags["muon_lr"], run.budget.steps) for run in done if not run.report]
    assert swept == [*((rate, short) for rate in losses), (0.06, full), (0.02, full)]
    assert {run.flags["muon_lr"] for run in done if run.report} == {0.02}
    assert all(run.budget.steps == full for run in done if run.report)


def test_rates_that_all_diverge_in_the_short_sweep_are_a_result(store: Store) -> None:
    plan = Plan("medium", store.find)
    done = finish(plan, store, "LoRA", lambda run: math.inf)
    assert len(done) == plan.budget.rates and result_of(plan, plan.rows["LoRA"]) is None


def test_masters_keep_what_bfloat16_would_lose() -> None:
    parameter = torch.nn.Parameter(torch.ones(3, dtype=torch.bfloat16))
    masters = rivals.Masters([parameter])
    optimizer = torch.optim.SGD(masters.values, lr=1e-3)
    for _ in range(8):
        parameter.sum().backward()
        masters.take_gradients()
        optimizer.step()
        optimizer.zero_grad()
        masters.publish()
    assert parameter.grad is None
    torch.testing.assert_close(masters.values[0].data, torch.full((3,), 1 - 8e-3))
    assert parameter.data.tolist() == torch.full((3,), 1 - 8e-3).bfloat16().tolist()


def test_routed_lora_is_the_mixture_of_merged_blocks() -> None:
    torch.manual_seed(0)
    base = tiny_llama().double()
    feed_forward = find_feed_forward(base)[0]
    hidden, block = feed_forward.hidden, feed_forward.block
    routed = rivals.RoutedLoRA(feed_forward, experts=3, top_k=2, rank=2, router=torch.randn(3, hidden))
    x = torch.randn(5, hidden, dtype=torch.float64)
    torch.testing.assert_close(routed(x), block(x))  # B starts at zero
    for second in routed.second.values():
        torch.nn.init.normal_(second)
    outputs = []
    for expert in range(3):
        merged = copy.deepcopy(block)
        for role in ROLES:
            weight = getattr(merged, feed_forward.roles[role]).weight
            weight.data += routed.second[role][expert] @ routed.first[role][expert]
        outputs.append(merged(x))
    chosen, index = (x.float() @ routed.router.float().T).topk(2, dim=1)
    expected = torch.stack(
        [
            sum(weight * outputs[expert][token] for weight, expert in zip(weights, experts, strict=True))
            for token, (weights, experts) in enumerate(zip(chosen.softmax(1).double(), index.tolist(), strict=True))
        ]
    )
    torch.testing.assert_close(routed(x), expected, rtol=1e-6, atol=1e-9)


def test_real_items_are_drawn_by_seed_but_for_the_test_items(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for domain in DOMAINS:
        items = [
            {"prompt": f"{domain} {n}", "response": "r", "answer": "r", "domain": domain, "split": split}
            for split, count in (("train", 9), ("test", 5))
            for n in range(count)
        ]
        with gzip.open(tmp_path / f"{domain}.jsonl.gz", "wt") as file:
            file.writelines(json.dumps(item) + "\n" for item in items)
    monkeypatch.setattr(data, "REAL_FOLDER", tmp_path)
    budget = replace(Plan("medium", lambda run: None).budget, validation_items=2, test_items=3)
    drawn = {}
    for seed in (1, 2):
        data.make_real_items(budget, seed, tmp_path / f"{seed}.jsonl")
        drawn[seed] = [json.loads(line) for line in (tmp_path / f"{seed}.jsonl").open()]
    prompts = {
        seed: {split: {i["prompt"] for i in items if i["split"] == split} for split in ("train", "validation", "test")}
        for seed, items in drawn.items()
    }
    assert prompts[1]["test"] == prompts[2]["test"] and prompts[1]["validation"] != prompts[2]["validation"]
    assert [len(prompts[1][split]) for split in ("train", "validation", "test")] == [42, 12, 18]
    assert not prompts[1]["train"] & prompts[1]["validation"]


def test_where_a_curve_comes_down_to_a_loss() -> None:
    assert first_crossing([(0, 3.0), (10, 2.0), (20, 1.0)], 1.5) == 15
    assert first_crossing([(0, 3.0), (10, 2.0), (20, 2.5)], 2.0) == 10
    assert first_crossing([(0, 3.0), (10, 2.0)], 1.9) is None
    assert first_crossing([(0, 1.0), (10, 0.5)], 2.0) == 0


def on_one_core(arguments: list[str]) -> None:
    """Hence with one thread: two threads of so small a model only wait for each other."""
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    run.main(arguments)


def test_a_few_runs_of_a_tiny_base(tmp_path: Path) -> None:
    base, results = tmp_path / "base", tmp_path / "results/toy.jsonl"
    tokenizer = tiny_tokenizer(TEMPLATE)
    tiny_llama(vocab_size=len(tokenizer), max_position_embeddings=640).save_pretrained(base)
    tokenizer.save_pretrained(base)
    arguments = ["--suite", "baselines", "--budget", "toy", "--rows", "base", "SRDE neuron", "LoRA"]
    arguments += ["--base", str(base), "--folder", str(tmp_path), "--results", str(results)]
    assert run_forked(tmp_path / "log", on_one_core, arguments) == 0, (tmp_path / "log").read_text()[-3000:]
    assert f"All done: {results}" in (tmp_path / "log").read_text()
    found: dict[str, Any] = {record["row"]: record for record in read_records(results) if record["report"]}
    assert set(found) == {"base", "SRDE neuron", "LoRA"}
    srde, lora = found["SRDE neuron"], found["LoRA"]
    # The same batches and the same loss: before its first update every method is the base.
    assert srde["losses"][0] == lora["losses"][0] and srde["losses"][-1] != lora["losses"][-1]
    assert srde["tokens"] == lora["tokens"] > 0 and found["base"]["losses"] == []
    # The trainer's figure and the benchmark's own; items padded one by one and packed in rows.
    assert [step for step, _ in srde["curve"]] == [0, 6, 12] and srde["curve"][-1][1] == srde["validation_loss"]
    assert abs(found["base"]["validation_loss"] - srde["curve"][0][1]) < 1e-5
    for domain, loss in srde["test_loss"].items():
        assert abs(srde["experts_alone"]["mixture"][domain] - loss) < 1e-5
    assert len(srde["experts_alone"]["experts"]) == len(DOMAINS) and 0 < srde["routing"]["balance"] <= 1
    assert all(math.isfinite(record["text_perplexity"]) for record in found.values())
    assert {"torch", "peft"} <= srde["versions"].keys() and srde["machine"] and "git_revision" in srde
    items = [json.loads(line) for line in next(tmp_path.glob("items/*-seed1.jsonl")).open()]
    prompts = {split: {item["prompt"] for item in items if item["split"] == split} for split in ("train", "test")}
    assert len(prompts["test"]) == 2 * len(DOMAINS) and not prompts["train"] & prompts["test"]


def test_the_rivals_keep_the_rank_of_the_records() -> None:
    sizes: dict[str, Any] = {
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
    }
    base = tiny_llama(**sizes)  # SmolLM2-135M's layers
    ranks = [rivals.lora_config(base, {"values_of": flags}).r for flags in ({}, {"num_experts": 1, "top_k": 1})]
    assert ranks == [25, 4]
