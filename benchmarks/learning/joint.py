"""Six domains learnt at once: the best rates of first_look.py again, with three other seeds and on test items.

    python launch/quickstart_inputs.py runs/quickstart-inputs     # the base, once
    python -m benchmarks.learning.joint [--seeds 1 2 3 | --table_only]

A seed draws the training items, the order of the rows and the first values; all methods read the same batches. Each
run adds a line to results/joint.jsonl and is not repeated. A run takes four minutes of two quiet cores.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from benchmarks.learning.combining import ROOT, Part, Record, held_out
from benchmarks.learning.combining_tables import Results
from benchmarks.learning.data import prepare
from benchmarks.learning.first_look import LOOKS, STEPS, train_look
from benchmarks.learning.interference import TEST_ITEMS, losses_of
from benchmarks.learning.plan import Budget, Plan, late_loss
from benchmarks.learning.store import RESULTS, read_records, run_missing
from benchmarks.tables import markdown, put_into
from srde_ds.config import DOMAINS
from srde_ds.data.manifest import load_manifest, load_rows

AGAINST = "LoRA, 0.003"
PARTS = [
    AGAINST,
    "SRDE, 0.01, half of the values in a shared expert",
    "SRDE, 0.02",
    "SRDE, 0.02, discriminant routers",
    "one delta, 0.01",
]
"""Names of first_look.py, each method at its best rate there."""


def train_part(name: str, budget: Budget, seed: int, base: Path, folder: Path, steps: int = STEPS) -> Record:
    """Train and measure one method."""
    inputs = prepare(budget, seed, base=base, folder=folder)
    trainee, losses = train_look(LOOKS[name], budget, inputs, seed, steps)
    values = sum(parameter.numel() for parameter in trainee.parameters)
    test = load_rows(inputs.rows, "test", load_manifest(inputs.rows))
    return {"values": values, "training": losses} | held_out(trainee.model, test)


def parts(budget: Budget, seed: int, base: Path, folder: Path) -> Iterator[Part]:
    for name in PARTS:
        yield name, partial(train_part, name, budget, seed, base, folder)


def table(results: Results, names: Sequence[str]) -> str:
    """The lowest test loss first."""
    rows = []
    for name in sorted(names, key=results.mean_loss):
        records = [results.by_seed[seed][name] for seed in results.seeds]
        late = statistics.mean(late_loss({"losses": record["training"]}) for record in records)
        against = apart = ""
        if name != AGAINST:
            total, (low, high), by_seed = results.difference(name, AGAINST)
            against = f"{total:+.3f} ({low:+.3f} to {high:+.3f})"
            apart = " ".join(f"{difference:+.3f}" for difference in by_seed)
        by_domain = [f"{results.loss(name, domain):.2f}" for domain in DOMAINS]
        rows.append([name, f"{late:.3f}", f"{results.mean_loss(name):.3f}", against, apart, *by_domain])
    heads = ["", "training loss, second half", "mean test loss", f"against {AGAINST}", "by seed", *DOMAINS]
    return markdown(heads, rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--base", type=Path, default=ROOT / "runs/quickstart-inputs/base")
    parser.add_argument("--folder", type=Path, default=ROOT / "runs/learning", help="for data")
    parser.add_argument("--results", type=Path, default=RESULTS / "joint.jsonl")
    parser.add_argument("--table_only", action="store_true", help="run nothing, write the table of what is there")
    options = parser.parse_args()
    budget = replace(Plan("medium", lambda _: None).budget, test_items=TEST_ITEMS)
    for seed in [] if options.table_only else options.seeds:
        run_missing(seed, parts(budget, seed, options.base, options.folder), options.results, losses_of)
    if options.results == RESULTS / "joint.jsonl":
        records = read_records(options.results)
        names = [name for name in PARTS if {record["seed"] for record in records if record["part"] == name}]
        put_into("learning_tables.md", "joint", table(Results(records, names), names))


if __name__ == "__main__":
    main()
