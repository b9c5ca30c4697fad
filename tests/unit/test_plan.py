"""`srde-ds plan`: what a run takes on given machines."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from srde_ds.cli.main import main
from srde_ds.config import resolve
from srde_ds.distributed.expert_traffic import Traffic
from srde_ds.distributed.workload import Workload
from srde_ds.errors import SRDEError
from srde_ds.model.base_shape import base_shape
from srde_ds.planner.describe import describe_plan
from srde_ds.planner.flops import step_flops
from srde_ds.planner.machines import Machines
from srde_ds.planner.memory import memory
from srde_ds.planner.plan import Plan, make_plan, step_times
from srde_ds.training.schedule import Schedule
from srde_ds.utils.units import GB, GIB
from tests.cli_helpers import fails

MINISTRAL = Path(__file__).parents[2] / "benchmarks/ministral_3_14b"
D, F, LAYERS, VOCABULARY, M = 5120, 16384, 40, 131072, 164
RUN = {"model_name": str(MINISTRAL), "max_length": 4096, "gradient_checkpointing": True}


def planned(machines: dict[str, Any] | None = None, **options: Any) -> Plan:
    config = resolve({}, RUN | options)
    return make_plan(config, Machines(**{"gpus": 8, "nodes": 2} | (machines or {})), Schedule.of(config).prunings)


def test_links_by_hand() -> None:
    """Two nodes of four: a gather enters a node once, an all-to-all row goes to the one process that wants it."""
    gather = Traffic("x", "all_gather", 800, ranks=8)
    assert (gather.received, gather.between_nodes(4)) == (700, 800 / 2 / 4)
    total = Traffic("x", "all_reduce", 800, ranks=8)
    assert (total.received, total.between_nodes(4)) == (1400, 800 / 4)
    rows = Traffic("x", "all_to_all", 800, ranks=8)
    assert (rows.received, rows.between_nodes(4)) == (700, 400)
    inside = Traffic("x", "all_gather", 800, ranks=4)
    assert (inside.received, inside.between_nodes(4)) == (600, 0)
    every_fourth = Traffic("x", "reduce_scatter", 800, ranks=2, stride=4)
    assert (every_fourth.received, every_fourth.between_nodes(4)) == (400, 400)


def test_step_time_by_hand() -> None:
    machines = Machines(gpus=4, nodes=2, peak_tflops=100, utilisation=0.5, intra_node_gb_s=10, inter_node_gbit_s=80)
    traffic = [Traffic("base gathered", "all_gather", 80 * GB, 8), Traffic("experts' deltas", "all_gather", 8 * GB, 8)]
    times = step_times(machines, traffic, 100e12, "bf16")
    # Of 70 GB 10 come from the other node, 40 GB into the node at 10 GB/s.
    assert times.computation == 2
    assert times.overlapped == {"links within a node": 6, "links between nodes": 4}
    assert times.exposed == pytest.approx({"links within a node": 0.6, "links between nodes": 0.4})
    assert (times.step, times.step_in_turn) == pytest.approx((7, 13))
    assert times.bound == "links within a node"


def test_operations_by_hand() -> None:
    config = resolve({}, RUN | {"gradient_accumulation_steps": 2, "neuron_parts": 1})
    shape = base_shape(config)
    flops = step_flops(Workload.of(config, 1), shape)
    tokens = 2 * 4096
    layer = 3 * D * F + 2 * D * 4096 + 2 * D * 1024
    assert flops["frozen base"] == 2 * tokens * (3 * LAYERS * layer + 2 * VOCABULARY * D)
    assert flops["attention scores"] == 4 * 2 * tokens * 4096 * 4096 * LAYERS
    assert flops["experts"] == 4 * 2 * tokens * 6 * 3 * D * M * LAYERS
    plain = resolve({}, RUN | {"gradient_accumulation_steps": 2, "gradient_checkpointing": False, "neuron_parts": 1})
    assert step_flops(Workload.of(plain, 1), shape)["experts"] == flops["experts"] * 3 / 4
    element = resolve({}, RUN | {"granularity": "element", "use_muon": False, "gradient_accumulation_steps": 1})
    dense = 2 * 4096 * 2 * 3 * D * F * LAYERS * 4
    assert step_flops(Workload.of(element, 1), shape)["experts"] == dense


def test_the_largest_micro_batch_fits_and_the_next_does_not() -> None:
    plan = planned()
    rows = plan.largest_micro_batch
    assert 16 <= rows <= 32

    def total(rows: int) -> float:
        config = resolve({}, RUN | {"batch_size": rows})
        return memory(Workload.of(config, 16), base_shape(config)).total

    assert total(rows) <= 72 * GIB < total(rows + 1)
    assert planned({"gpu_memory_gib": 5.0}).largest_micro_batch == 0
    assert planned({"gpu_memory_gib": 30.0}).largest_micro_batch < rows
    assert planned({"labelled_share": 0.1}).largest_micro_batch == rows  # no more logits than a chunk in either
    assert planned(flash_attention=True).largest_micro_batch == 1  # flash-attn takes one row at a time


def test_deepspeeds_options_may_name_the_micro_batch(tmp_path: Path) -> None:
    """It is the run's own, although the plan looks for larger ones that fit."""
    file = tmp_path / "zero3.json"
    file.write_text(json.dumps({"train_micro_batch_size_per_gpu": 1}))
    named = planned(deepspeed_config=str(file), batch_size=1)
    assert named.largest_micro_batch == planned(batch_size=1).largest_micro_batch > 1


@pytest.mark.parametrize(
    ("machines", "changes"),
    [
        ({"gpus": 4}, "memory_bytes"),
        ({"nodes": 4}, "tokens_per_step"),
        ({"peak_tflops": 500.0}, "seconds_per_step"),
        ({"utilisation": 0.2}, "tokens_per_day"),
        ({"intra_node_gb_s": 30.0}, "seconds_per_step"),
        ({"inter_node_gbit_s": 10.0}, "seconds_per_step"),
        ({"labelled_share": 0.5}, "flops_per_step"),
        ({"gpu_memory_gib": 30.0}, "largest_micro_batch"),
        ({"hourly_price": 2.0}, "price_per_day"),
    ],
)
def test_every_machine_option_changes_the_plan(machines: dict[str, Any], changes: str) -> None:
    assert planned(machines).to_dict()[changes] != planned().to_dict()[changes]


def test_price_and_tokens_follow_from_the_time() -> None:
    plan = planned({"hourly_price": 2.5}, batch_size=2, max_steps=100)
    assert plan.tokens_per_step == 2 * 16 * 16 * 4096
    assert plan.tokens_per_day == pytest.approx(plan.tokens_per_step * 86_400 / plan.times.step)
    assert plan.price_per_day == 2.5 * 24 * 16
    assert plan.to_dict()["price"] == pytest.approx(2.5 * 16 * 100 * plan.times.step / 3600)


def test_fp32_is_as_fast_as_the_machine_computes_in_fp32() -> None:
    bf16, fp32 = planned(), planned(bf16=False)
    ratio = fp32.times.computation / bf16.times.computation
    assert ratio == pytest.approx(989 / 67) and fp32.to_dict()["machines"]["peak_tflops"] == 67
    assert "40% of 989 TFLOP/s (H100 SXM, bf16)" in describe_plan(bf16)
    assert "40% of 67 TFLOP/s (H100 SXM, fp32)" in describe_plan(fp32)
    given = planned({"peak_tflops": 495.0}, bf16=False)  # TF32
    assert "40% of 495 TFLOP/s; " in describe_plan(given)
    assert given.times.computation == pytest.approx(fp32.times.computation * 67 / 495)


def test_a_run_that_starts_denser_is_measured_at_every_stage() -> None:
    plan = planned(initial_density=0.04, density_warmup_steps=100, density_prunings=2)
    assert [(first, round(density, 6)) for first, density, _ in plan.densities] == [(0, 0.04), (50, 0.02), (100, 0.01)]
    gradients = [memory.states["gradients"] / plan.memory.states["gradients"] for _, _, memory in plan.densities]
    assert gradients == pytest.approx([4, 2, 1], rel=0.01)
    assert "sum from step 51 on, density 0.02 " in describe_plan(plan)
    assert [part["first_step"] for part in plan.to_dict()["memory_bytes"]["peak_by_density"]] == [1, 51, 101]
    assert plan.largest_micro_batch <= planned().largest_micro_batch
    assert planned().densities == []


def test_expert_parallelism_names_the_transport_and_why() -> None:
    plan = planned(expert_parallel_size=8)
    assert plan.transport == "deltas"
    assert plan.moved["deltas"] < plan.moved["tokens"]
    assert planned(expert_parallel_size=8, expert_transport="tokens").transport == "tokens"
    with pytest.raises(SRDEError, match="expert_parallel_size=3: must divide the number of processes, 16"):
        planned(expert_parallel_size=3)


@pytest.mark.parametrize(
    ("options", "fragment"),
    [
        ({"gpus": 0}, "gpus=0: must be above 0"),
        ({"inter_node_gbit_s": -1.0}, "inter_node_gbit_s"),
        ({"utilisation": 1.5}, "utilisation=1.5: must be at most 1"),
        ({"labelled_share": 2.0}, "labelled_share"),
        ({"hourly_price": 0.0}, "hourly_price"),
        ({"gpu_memory_gib": float("nan")}, "gpu_memory_gib"),
    ],
)
def test_machines_that_cannot_be_are_refused(options: dict[str, Any], fragment: str) -> None:
    with pytest.raises(SRDEError, match=fragment):
        Machines(**options)


def test_the_verb_prints_the_plan_and_writes_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run.yaml"
    run.write_text(f"model: {{model_name: {MINISTRAL}, gradient_checkpointing: true}}\ndata: {{max_length: 4096}}\n")
    output = tmp_path / "plan.json"
    arguments = ["plan", "--config", str(run), "--gpus", "8", "--nodes", "64", "--expert_parallel_size", "8"]
    assert main([*arguments, "--hourly_price", "2", "--output_file", str(output)]) == 0
    page = capsys.readouterr().out
    for fragment in (
        "13,506,073,600 frozen values",
        "64 x 8 GPUs",
        "base shard",
        "gathered base",
        "largest micro-batch that fits",
        "base gathered",
        "expert transport: deltas (fewest bytes",
        "links between nodes",
        "tokens per day",
        "price: 24,576.00 per day",
        str(output),
    ):
        assert fragment in page
    content = json.loads(output.read_text())
    assert content["machines"]["processes"] == 512
    assert content["config"]["parallel"]["expert_parallel_size"] == 8
    assert content["memory_bytes"]["peak"] / GIB == pytest.approx(
        sum(content["memory_bytes"]["moments"][content["memory_bytes"]["peak_moment"]].values()) / GIB
        + sum(content["memory_bytes"]["states"].values()) / GIB
    )


def test_the_verb_says_when_nothing_fits(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--model_name", str(MINISTRAL), "--gpus", "1", "--gpu_memory_gib", "20"]) == 0
    assert "no micro-batch fits" in capsys.readouterr().out


def test_bad_input_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = ["plan", "--model_name", str(MINISTRAL)]
    fails(capsys, ["plan"], "model_name is missing")
    fails(capsys, [*base, "--gpu", "8"], "unknown argument '--gpu'", "--gpus")
    fails(capsys, [*base, "--gpus", "0"], "gpus=0")
    fails(capsys, [*base, "--output_file", str(tmp_path / "none/plan.json")], "output_file=", "cannot be written")
