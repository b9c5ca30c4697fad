"""docs/performance.md: every goal of speed with its figure, from the committed records.

python -m benchmarks.performance      # writes the tables of the page anew; measures nothing
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from benchmarks.gpu_visit import IN_FP8
from benchmarks.quantized_base import comparison, of
from benchmarks.static import WITH_KERNELS
from benchmarks.tables import ROOT, markdown, put_into
from benchmarks.throughput import DEFAULT, table

RESULTS = ROOT / "benchmarks/results"
PAGE = "performance.md"
NO_GPU = "not measured: no GPU"
NO_RECORD = "not measured: no record in throughput.json"
FIRST_EXPERT_KERNELS = 155  # that the experts of a layer added when the goal was set


FROZEN, LORA = "frozen base, plain", "PEFT LoRA, feed-forward, plain"
FORMS = {"quarters of neurons": DEFAULT, "whole neurons": "SRDE neuron"}
CPU_GOALS = [
    goal
    for what, form in FORMS.items()
    for goal in (
        (f"engine / plain loop, {what}", f"{form}, engine", f"{form}, plain", 1.10, False),
        (f"{what} / frozen", f"{form}, plain", FROZEN, 1.05, False),
        (f"{what}, engine / frozen", f"{form}, engine", FROZEN, 1.05, False),
        (f"LoRA / {what}", LORA, f"{form}, plain", 1.40, True),
        (f"LoRA / {what}, engine", LORA, f"{form}, engine", 1.40, True),
    )
] + [
    ("random blocks of 16 × 16 / frozen", "SRDE random blocks, plain", FROZEN, 1.50, False),
    ("single weights / frozen", "SRDE single weights, plain", FROZEN, 2.00, False),
]
"""What, two cases whose seconds are divided, the goal, and whether more is better."""


@dataclass(frozen=True)
class Figure:
    """What was found.

    Attributes:
        reached: None: nothing was measured.
    """

    text: str
    reached: bool | None = None


def at_most(value: float, limit: float, form: str = "{:.2f}") -> Figure:
    """A figure that is reached if it does not exceed the limit."""
    return Figure(form.format(value), value <= limit)


def at_least(value: float, limit: float, form: str = "{:.2f}") -> Figure:
    """A figure that is reached if it is not below the limit."""
    return Figure(form.format(value), value >= limit)


def read(name: str) -> Any:
    """A record, or None where it was never made."""
    path = RESULTS / name
    if not path.exists():
        return None
    if name.endswith("jsonl"):
        return [json.loads(line) for line in path.read_text().splitlines()]
    return json.loads(path.read_text())


def static_goals() -> list[tuple[str, str, Figure]]:
    """Known without a GPU."""
    record = read("static.json")
    layers, breaks, memory = record["layer"], record["compiled_block"], record["memory_14b"]
    added = {name: layer["kernels"] - layers["frozen base"]["kernels"] for name, layer in layers.items()}
    decoding = record["decoding"]["quarters of neurons"]
    third = f"≤ {FIRST_EXPERT_KERNELS // 3}, a third of {FIRST_EXPERT_KERNELS}"
    moved = max(abs(found["planned"] / found["counted"] - 1) for found in record["collective_bytes"].values())
    kept = record["memory_14b_selective"]
    kept_off = kept["planned_gib"] / kept["counted_gib"] - 1
    off = memory["planned_gib"] / memory["counted_gib"] - 1
    return [
        *(
            (
                f"kernels that neuron experts add to a layer, forward and backward{how}",
                third,
                at_most(added[form], FIRST_EXPERT_KERNELS / 3, "{:.0f}"),
            )
            for form, how in (
                *((name, f": {form}, with --expert_kernels") for name, form in WITH_KERNELS.items()),
                *((form, f": {form}, without it") for form in WITH_KERNELS.values()),
            )
        ),
        (
            "waits for the GPU in a layer, neuron experts",
            "0",
            at_most(layers["neuron, shared support"]["waits"], 0, "{}"),
        ),
        *(
            (f"waits in a layer, {form}", "0", at_most(layers[form]["waits"], 0, "{}"))
            for form in ("blocks", "single weights")
        ),
        (
            "graph breaks in the experts' block, neurons",
            "0",
            at_most(breaks["neuron, shared support"]["graph_breaks"], 0, "{}"),
        ),
        *(
            (
                f"{what} of a token that is decoded with a static cache, quarters of neurons",
                "0",
                at_most(decoding[key], 0, "{}"),
            )
            for what, key in (("waits", "waits"), ("graph breaks", "graph_breaks"))
        ),
        (
            "activations of a 14 B micro-step, 2 × 4,096 tokens",
            "< 6.5 GiB",
            at_most(memory["counted_gib"], 6.5, "{:.2f} GiB"),
        ),
        ("the plan's figure for it", "within 3 %", Figure(f"{off:+.1%}", abs(off) <= 0.03)),
        (
            f"the same with recompute selective: {kept['counted_gib']:.2f} GiB; the plan's figure for it",
            "within 3 %",
            Figure(f"{kept_off:+.1%}", abs(kept_off) <= 0.03),
        ),
        ("the plan's bytes of collectives", "within 1 %", Figure(f"{moved:.1%} off", moved <= 0.01)),
    ]


def cpu_goals() -> list[tuple[str, str, Figure]]:
    """Side by side on the CPU; one line for each base and length that was measured."""
    goals = []
    for result in (read("throughput.json") or {"results": []})["results"]:
        seconds = {row["case"]: row for row in result["cases"]}
        where = f"{base_name(result)}, {result['options']['length']} tokens"

        def ratio(a: str, b: str, seconds: dict[str, Any] = seconds) -> float | None:
            """Median over rounds of the quotient of two cases' seconds."""
            if a not in seconds or b not in seconds:
                return None
            return median_ratio(seconds[a]["seconds"], seconds[b]["seconds"])

        for what, over, under, limit, more_is_better in CPU_GOALS:
            if (value := ratio(over, under)) is not None:
                figure = at_least(value, limit) if more_is_better else at_most(value, limit)
                goals.append((f"{what}, seconds; {where}", f"{'≥' if more_is_better else '≤'} {limit:.2f}", figure))
    measured = {what.rpartition(", seconds;")[0] for what, _, _ in goals}
    return goals + [
        (f"{what}, seconds", f"{'≥' if more_is_better else '≤'} {limit:.2f}", Figure(NO_RECORD))
        for what, _, _, limit, more_is_better in CPU_GOALS
        if what not in measured
    ]


def median_ratio(over: list[float], under: list[float]) -> float:
    """Median over the rounds."""
    ratios = sorted(a / b for a, b in zip(over, under, strict=True))
    middle = len(ratios) // 2
    return ratios[middle] if len(ratios) % 2 else (ratios[middle - 1] + ratios[middle]) / 2


def base_name(result: dict[str, Any]) -> str:
    """For a heading: that of a folder is what the record calls it."""
    return str(result.get("base_name") or result["options"]["base"])


def decode_goals() -> list[tuple[str, str, Figure]]:
    """Decoding on the CPU in bfloat16."""
    rows = [row for name in ("decode.json", "decode_llama-700m.json") for row in (read(name) or {"rows": []})["rows"]]
    found = [
        row["ratio_wall"]
        for row in rows
        if row["dtype"] == "bfloat16" and row["adapter"].endswith(("trained", "neuron", "neurons"))
    ]
    lowest = at_least(min(found), 0.95) if found else Figure("not measured: no record in bfloat16")
    return [("decoding in bfloat16 on the CPU, base / with neuron experts", "≥ 0.95", lowest)]


def gpu_goals() -> list[tuple[str, str, Figure]]:
    """What a visit to a GPU has to show."""
    lines: dict[str, Any] = {line["what"]: line for line in read("gpu_visit.jsonl") or []}
    frozen, lora, srde = (lines.get(f"{case}, checkpointing") for case in (FROZEN, LORA, f"{DEFAULT}, plain"))
    engine = lines.get("step with update, engine")
    of_frozen = beside_lora = speed = peak = in_fp8 = Figure(NO_GPU)
    if srde and frozen and lora:
        of_frozen = at_most(srde["seconds"] / frozen["seconds"], 1.05)
        beside_lora = at_least(lora["seconds"] / srde["seconds"], 1.35)
        speed = at_least(srde["tokens_per_second"], 7200, "{:,.0f}")
    if float8 := lines.get(f"{DEFAULT}, {IN_FP8}"):
        in_fp8 = at_least(float8["tokens_per_second"], 11_000, "{:,.0f}")
    if engine:
        peak = at_most(engine["peak_gib"], 80e9 / 2**30, "{:.1f} GiB")
    return [
        ("14 B on an H100, SRDE / frozen, seconds", "≤ 1.05", of_frozen),
        ("14 B on an H100, LoRA r=64 / SRDE, seconds", "≥ 1.35", beside_lora),
        ("14 B on an H100, tokens a second in bf16", "≥ 7,200", speed),
        ("14 B on an H100, whole step", "≤ 80 GB", peak),
        ("14 B on an H100, tokens a second with the base in FP8", "≥ 11,000", in_fp8),
    ]


def quantized_goals() -> list[tuple[str, str, Figure]]:
    """Training on a base in 8 and 4 bits and in FP8: the loss of the same steps on a plain base."""
    record = read("quantized_base.json") or {"runs": [], "dtype": "bfloat16"}
    runs, dtype = record["runs"], record["dtype"]
    goals = []
    for kind, name in (("int8", "8 bits"), ("nf4", "4 bits"), ("fp8", "FP8")):
        figure = Figure("not measured yet")
        if of(runs, kind).keys() & of(runs, "none").keys():
            found = comparison(runs, kind)
            text = (
                f"{found['late']:+.3f} ± {found['late_interval']:.3f} nats; held out {found['held_out']:+.3f}, before "
                f"training {found['at_start']:+.3f}; seeds: {found['seeds']}"
            )
            figure = Figure(text, found["late"] <= found["late_interval"])
        goals.append((f"training loss on a base in {name}, second half of the steps", f"that in {dtype}", figure))
    return goals


def missing_goals() -> list[tuple[str, str, Figure]]:
    """Asked for: the kernels of experts, which no GPU has run, and what has no figure."""
    kernels = read("kernels.json")["rows"]
    spills = sum(row["spill_stores"] + row["spill_loads"] for row in kernels)
    registers, widest = (max(row[key] for row in kernels) for key in ("registers", "neurons"))
    return [
        ("spills of the kernels of --expert_kernels, compiled for sm_90", "0", at_most(spills, 0, "{}")),
        ("registers of a thread there", "told", Figure(f"at most {registers} (experts of up to {widest:,} neurons)")),
        *quantized_goals(),
        ("optimizer offloaded to the host", "refused or measured", Figure("refused, with the reason")),
    ]


def goals_table() -> str:
    """All goals."""
    goals = static_goals() + cpu_goals() + decode_goals() + gpu_goals() + missing_goals()
    words = {True: "yes", False: "no", None: ""}
    return markdown(
        ["goal", "asked", "found", "reached"],
        [[what, asked, figure.text, words[figure.reached]] for what, asked, figure in goals],
    )


def side_by_side() -> str:
    """The tables of throughput.json."""
    parts = []
    for result in (read("throughput.json") or {"results": []})["results"]:
        options, here = result["options"], result["environment"]
        versions = ", ".join(f"{name} {here['versions'][name]}" for name in ("torch", "transformers", "deepspeed"))
        speed = f"a product at {result['matrix_tflops']:.3f} TFLOP/s"
        dtype = "bfloat16" if options["bf16"] else "float32"
        about = (
            f"{base_name(result)}, {options['rows']} × {options['length']} tokens, {dtype}, {options['repeats']} rounds"
        )
        threads = "one thread" if here["threads"] == 1 else f"{here['threads']} threads"
        parts.append(f"{about}; {here['machine']}, {threads}; {versions}; {speed}.\n\n{table(result)}")
    return "\n\n".join(parts)


def main() -> None:
    put_into(PAGE, "goals", goals_table())
    put_into(PAGE, "side by side", side_by_side())


if __name__ == "__main__":
    main()
