"""Scaling on paper: the cost model from 1 to 512 GPUs. Nothing here is measured.

    python -m benchmarks.scaling      # writes results/scaling.json and the tables of docs/{scaling,guide}.md

The shape of Ministral-3-14B (benchmarks/ministral_3_14b), six experts of 1 % density, bf16, gradient checkpointing, two
rows of 4,096 tokens a GPU in a micro-step, four micro-steps, nodes of eight H100 SXM.
"""

import json
from contextlib import chdir, redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

from benchmarks.tables import ROOT, markdown, put_into
from srde_ds.cli.main import main
from srde_ds.config import resolve
from srde_ds.distributed.workload import Workload
from srde_ds.model.base_shape import base_shape
from srde_ds.planner.flops import step_flops
from srde_ds.planner.machines import Machines
from srde_ds.planner.plan import DAY, Plan, make_plan
from srde_ds.utils.environment import environment
from srde_ds.utils.units import GB, GIB

BASE = Path(__file__).resolve().parent / "ministral_3_14b"
GPUS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
RUN = {
    "model_name": str(BASE),
    "max_length": 4096,
    "batch_size": 2,
    "gradient_accumulation_steps": 4,
    "gradient_checkpointing": True,
}
ADAPTERS: dict[str, dict[str, Any]] = {
    "free": {},
    "free, resident base": {"base_placement": "resident"},
    "atoms": {"num_atoms": 16},
    "atoms gathered": {"num_atoms": 16, "owner_computes": False},
}
NETWORKS = {"3200": 3200.0, "400": 400.0, "100": 100.0}
# Tokens a second on one H100, measured before this package existed (docs/scaling.md): forward and backward, sequence
# 4096 x 2, full activation checkpointing.
MEASURED = {"frozen base alone": 6160, "with neuron experts": 5193}


def plan(gpus: int, network: float, **options: Any) -> Plan:
    nodes = max(1, gpus // 8)
    return make_plan(resolve({}, RUN | options), Machines(min(gpus, 8), nodes, inter_node_gbit_s=network))


def row(gpus: int, adapter: str, network: str) -> dict[str, Any]:
    p = plan(gpus, NETWORKS[network], **ADAPTERS[adapter])
    received, times = sum(t.received for t in p.traffic), p.times
    return {
        "gpus": gpus,
        "adapter": adapter,
        "network_gbit_s": NETWORKS[network],
        "memory_gib": p.memory.total / GIB,
        "largest_micro_batch": p.largest_micro_batch,
        "received_gb": received / GB,
        "into_a_node_gb": p.links()["between nodes"] * p.machines.gpus / GB,
        "compute_s": times.computation,
        "within_nodes_s": times.overlapped["links within a node"],
        "between_nodes_s": times.overlapped["links between nodes"],
        "exposed_s": sum(times.exposed.values()),
        "step_s": times.step,
        "step_in_turn_s": times.step_in_turn,
        "bound": times.bound,
        "tokens_per_second_and_gpu": p.tokens_per_day / DAY / gpus,
        "tokens_per_day": p.tokens_per_day,
    }


def utilisation() -> dict[str, float]:
    """Share of 989 TFLOP/s that those measured tokens a second come to, by the model's count of operations."""
    config = resolve({}, RUN | {"gradient_accumulation_steps": 1, "neuron_parts": 1})
    flops = step_flops(Workload.of(config, 1), base_shape(config))
    a_token = {"frozen base alone": sum(flops.values()) - flops["experts"], "with neuron experts": sum(flops.values())}
    return {name: rate * a_token[name] / (2 * 4096) / 989e12 for name, rate in MEASURED.items()}


def example() -> str:
    """The output of the command in docs/guide.md."""
    command = "--gpus 8 --nodes 2 --max_length 4096 --batch_size 2 --gradient_accumulation_steps 4 --hourly_price 2.5"
    arguments = ["plan", "--model_name", "benchmarks/ministral_3_14b", *command.split(), "--gradient_checkpointing"]
    with chdir(ROOT), redirect_stdout(StringIO()) as text:
        assert main([*arguments, "--expert_parallel_size", "8"]) == 0
    return text.getvalue().strip()


def scaling_table(rows: list[dict[str, Any]]) -> str:
    head = ["GPUs", "GiB a GPU", "rows that fit", "GB received a step", "GB into a node", "computation s"]
    head += ["links in a node s", "network s", "waited for s", "step s", "tokens/s a GPU", "tokens a day"]
    body = [
        [
            f"{r['gpus']}",
            f"{r['memory_gib']:.1f}",
            f"{r['largest_micro_batch']}",
            f"{r['received_gb']:.0f}",
            f"{r['into_a_node_gb']:.0f}",
            f"{r['compute_s']:.2f}",
            f"{r['within_nodes_s']:.2f}",
            f"{r['between_nodes_s']:.2f}",
            f"{r['exposed_s']:.2f}",
            f"{r['step_s']:.2f} to {r['step_in_turn_s']:.2f}",
            f"{r['tokens_per_second_and_gpu']:,.0f}",
            f"{r['tokens_per_day'] / 1e9:.2f} B",
        ]
        for r in rows
        if r["adapter"] == "free" and r["network_gbit_s"] == 400
    ]
    return markdown(head, body)


def network_table(rows: list[dict[str, Any]]) -> str:
    chosen = [r for r in rows if r["gpus"] == 64]
    chosen.sort(key=lambda r: (list(ADAPTERS).index(r["adapter"]), -r["network_gbit_s"]))
    head = ["Adapter", "Network of a node", "computation s", "network s", "waited for s", "step s", "bound by"]
    body = [
        [
            r["adapter"],
            f"{r['network_gbit_s']:.0f} Gbit/s",
            f"{r['compute_s']:.2f}",
            f"{r['between_nodes_s']:.2f}",
            f"{r['exposed_s']:.2f}",
            f"{r['step_s']:.2f}",
            r["bound"],
        ]
        for r in chosen
    ]
    return markdown(head, body)


def memory_table(cases: list[dict[str, Any]]) -> str:
    head = ["Processes", "Options", "Labelled", "Predicted MiB", "Measured MiB", "Difference", "Between steps"]
    body = [
        [
            str(case["processes"]),
            ", ".join(f"{key} {value}" for key, value in case["options"].items()) or "(default)",
            f"{case['labelled_share']:.0%}",
            f"{case['predicted_mib']:,.0f}",
            f"{case['measured_mib']:,.0f}",
            f"{case['error']:+.1%}",
            f"{case['predicted_states_mib']:,.0f} / {case['measured_states_mib']:,.0f}",
        ]
        for case in cases
    ]
    return markdown(head, body)


def make() -> None:
    rows = [row(gpus, "free", "400") for gpus in GPUS]
    rows += [
        row(64, adapter, network)
        for adapter in ADAPTERS
        for network in NETWORKS
        if (adapter, network) != ("free", "400")
    ]
    kept = {key: environment()[key] for key in ("versions", "git_revision")}
    record = {"rows": rows, "utilisation": utilisation(), "environment": kept}
    (ROOT / "benchmarks/results/scaling.json").write_text(json.dumps(record, indent=1) + "\n")
    write_tables()


def write_tables() -> None:
    """Into docs/scaling.md, from the result files."""
    results = ROOT / "benchmarks/results"
    record = json.loads((results / "scaling.json").read_text())
    put_into("scaling.md", "scaling", scaling_table(record["rows"]))
    put_into("scaling.md", "networks", network_table(record["rows"]))
    shares = ", ".join(f"{name} {share:.0%}" for name, share in record["utilisation"].items())
    put_into("scaling.md", "utilisation", f"Share of 989 TFLOP/s by this model's count: {shares}.")
    put_into("guide.md", "plan", f"```text\n{example()}\n```")
    put_into("scaling.md", "memory", memory_table(json.loads((results / "memory_model.json").read_text())["cases"]))


if __name__ == "__main__":
    make()
