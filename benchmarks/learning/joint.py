"""Six domains learnt at once: the best rates of first_look.py again, with three other seeds and on test items.

    python launch/quickstart_inputs.py runs/quickstart-inputs     # the base, once
    python -m benchmarks.learning.joint [--seeds 1 2 3 | --table_only] [--steps 150]

A seed draws the training items, the order of the rows and the first values; all methods read the same batches. Each
run adds a line to results/joint.jsonl, or joint_150.jsonl with 150 steps, and is not repeated; one that was stopped
goes on from its last state. 40 steps take four minutes of two quiet cores where bfloat16 is fast, and about an hour
of one in float32 on an AMD EPYC without AVX-512.
"""

from __future__ import annotations

import argparse
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import mean
from typing import Any

import torch

from benchmarks.learning.combining import ROOT, Part, Record, held_out
from benchmarks.learning.combining_tables import PICTURES, Results
from benchmarks.learning.data import prepare
from benchmarks.learning.first_look import LOOKS, STEPS, difference, factor, train_look
from benchmarks.learning.interference import TEST_ITEMS, losses_of
from benchmarks.learning.plan import Budget, Plan, late_loss
from benchmarks.learning.plots import plot_differences
from benchmarks.learning.store import RESULTS, read_records, run_missing
from benchmarks.tables import markdown, put_into
from srde_ds.config import DOMAINS
from srde_ds.data.manifest import load_manifest, load_rows
from srde_ds.utils.dtypes import dtype_name

AGAINST = "LoRA, 0.003"
AGAINST_BY_DOMAIN = "LoRA, 0.003, each domain counts equally"
PARTS = [
    AGAINST,
    "SRDE, 0.01, half of the values in a shared expert",
    "SRDE, 0.02",
    "SRDE, 0.02, discriminant routers",
    "SRDE, 0.02, supports for each expert",
    "SRDE, 0.02, one expert a text",
    "one delta, 0.01",
    "SRDE of quarters of random neurons, AdamW, 0.015",
    "SRDE of random blocks, AdamW, 0.015",
    "SRDE of random blocks anywhere, AdamW, 0.015",
    "SHiRA, 0.003",
    AGAINST_BY_DOMAIN,
    "SRDE, 0.02, each domain counts equally",
]
"""Names of first_look.py, each at its method's best rate at 40 steps."""
TABLES = {STEPS: "joint", 150: "joint 150"}
"""Name of the table, and so of the results, by number of steps"""
FARTHEST = 0.05  # of loss; what is worse would leave no room in the picture


def train_part(
    name: str,
    budget: Budget,
    seed: int,
    *,
    base: Path,
    folder: Path,
    steps: int = STEPS,
    dtype: torch.dtype = torch.bfloat16,
) -> Record:
    """Train and measure one method."""
    inputs = prepare(budget, seed, base=base, folder=folder)
    state = state_of(folder, name, seed, steps, dtype)
    how: dict[str, Any] = {"factor": partial(factor, steps=steps), "resumable": state}
    trainee, losses = train_look(LOOKS[name], budget, inputs, seed, steps, dtype, **how)
    values = sum(parameter.numel() for parameter in trainee.parameters)
    test = load_rows(inputs.rows, "test", load_manifest(inputs.rows))
    figures = {"values": values, "dtype": dtype_name(dtype), "training": losses}
    return figures | held_out(trainee.model, test, by_prompt=trainee.by_text)


def state_of(folder: Path, name: str, seed: int, steps: int, dtype: torch.dtype) -> Path:
    """The file that a stopped run goes on from."""
    run = "-".join([str(seed), str(steps), dtype_name(dtype), re.sub(r"\W+", "-", name)])
    return folder / f"joint-{run}.pt"


def parts(names: Sequence[str], budget: Budget, seed: int, **how: Any) -> Iterator[Part]:
    """`how` is handed on to `train_part`."""
    for name in names:
        yield name, partial(train_part, name, budget, seed, **how)


def weighting(part: str) -> str:
    """What counts equally in a method's training loss."""
    return LOOKS[part].loss_weighting if part in LOOKS else "token"


def shown(part: str) -> str:
    """The name for readers; SRDE's default was whole neurons when first_look.py named its parts."""
    return part.replace("SRDE, ", "SRDE of whole neurons, ")


def table(records: list[Record], against: str = AGAINST) -> str:
    """The losses of `against`, and the differences to them on the seeds that a method has been measured with, smallest
    first. Training losses that mean something else are not compared.
    """
    head = ["", "mean test loss", "by seed", "training loss, second half", *DOMAINS]
    lora = Results([record for record in records if record["part"] == against], [against])
    if not lora.seeds:
        return "not run"
    late = mean(late_loss({"losses": lora.by_seed[seed][against]["training"]}) for seed in lora.seeds)
    own = [f"{lora.loss(against, domain):.2f}" for domain in DOMAINS]
    seeds = ", ".join(map(str, lora.seeds))
    rows = [(-math.inf, [against, f"{lora.mean_loss(against):.3f}", seeds, f"{late:.3f}", *own])]
    for name in {record["part"]: None for record in records if record["part"] != against}:
        results = Results([record for record in records if record["part"] in (name, against)], [name, against])
        if not results.seeds:
            continue
        total, (low, high), by_seed = results.difference(name, against)
        runs = [[results.by_seed[seed][part]["training"] for part in (name, against)] for seed in results.seeds]
        middle, half = difference(*((run, other) for run, other in runs))
        apart = ", ".join(f"{seed}: {value:+.3f}" for seed, value in zip(results.seeds, by_seed, strict=True))
        by_domain = [results.loss(name, domain) - results.loss(against, domain) for domain in DOMAINS]
        training = f"{middle:+.3f} ± {half:.3f}" if weighting(name) == weighting(against) else ""
        cells = [shown(name), f"{total:+.3f} ({low:+.3f} to {high:+.3f})", apart, training]
        rows.append((total, [*cells, *(f"{value:+.2f}" for value in by_domain)]))
    return markdown(head, [cells for _, cells in sorted(rows, key=lambda row: row[0])])


def draw(path: Path) -> None:
    """How far each method of the tables is from LoRA. Left out are those whose training loss means something else, and
    those too far off."""
    found: dict[str, tuple[float, Sequence[float]]] = {}
    for steps, name in TABLES.items():
        records = read_records(results_of(name))
        for part in {record["part"]: None for record in records if record["part"] != AGAINST}:
            results = Results([record for record in records if record["part"] in (part, AGAINST)], [part, AGAINST])
            if not results.seeds:
                continue
            middle, limits, by_seed = results.difference(part, AGAINST)
            if weighting(part) == weighting(AGAINST) and abs(middle) < FARTHEST:
                seeds = f"{len(by_seed)} seed{'s' * (len(by_seed) > 1)}"
                found[f"{shown(part)} ({steps} steps, {seeds})"] = middle, limits
    ordered = dict(sorted(found.items(), key=lambda row: row[1][0]))
    plot_differences(ordered, path, label=f"mean test loss against {AGAINST}, with 95 % intervals")


def results_of(table_name: str) -> Path:
    """The file with the records of a table."""
    return RESULTS / f"{table_name.replace(' ', '_')}.jsonl"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--base", type=Path, default=ROOT / "runs/quickstart-inputs/base")
    parser.add_argument("--folder", type=Path, default=ROOT / "runs/learning", help="for data")
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16", help="one for all of a seed")
    parser.add_argument(
        "--parts",
        nargs="+",
        choices=LOOKS,
        metavar="NAME",
        help=f"default: {'; '.join(PARTS)}; others: first_look.py's",
    )
    parser.add_argument("--steps", type=int, choices=TABLES, default=STEPS, help="of a run (default: %(default)s)")
    parser.add_argument("--results", type=Path, help="default: joint.jsonl or joint_150.jsonl in results/")
    parser.add_argument("--table_only", action="store_true", help="run nothing, write the table of what is there")
    options = parser.parse_args()
    names = options.parts or PARTS
    budget = replace(Plan("medium", lambda _: None).budget, test_items=TEST_ITEMS)
    table_name = TABLES[options.steps]
    results = options.results or results_of(table_name)
    for seed in [] if options.table_only else options.seeds:
        how: dict[str, Any] = {"base": options.base, "folder": options.folder, "dtype": getattr(torch, options.dtype)}
        run_missing(seed, parts(names, budget, seed, steps=options.steps, **how), results, losses_of)
        for name in names:  # whose lines are written now
            state_of(options.folder, name, seed, options.steps, how["dtype"]).unlink(missing_ok=True)
    if options.results is None:
        records = read_records(results)
        put_into("learning_tables.md", table_name, table(records))
        draw(PICTURES / "joint.png")
        if options.steps == STEPS:
            by_domain = [record for record in records if weighting(record["part"]) == "domain"]
            put_into("learning_tables.md", "joint, each domain", table(by_domain, AGAINST_BY_DOMAIN))


if __name__ == "__main__":
    main()
