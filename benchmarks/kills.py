"""SIGKILL to training processes at random moments: what each kill leaves, and whether the runs end as if unkilled.

python -m benchmarks.kills      # hours; goes on where it was stopped; prints a table, writes results/kills.json

The checks are those of tests/distributed/kill_helpers.py: after each kill `latest` names a complete checkpoint whose
hashes are right, and so is the one before it; the next process goes on from it; no half-written folder is left from
earlier kills. A run that got to its end has the weights, optimizer states and metrics of an unkilled one, bit for bit.
A failed check ends this script with an error; what earlier runs gave stays in the record.
"""

import argparse
import json
import random
import shutil
import tempfile
import time
from collections import Counter
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from dataclasses import asdict
from itertools import count
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from benchmarks.tables import measured_on
from srde_ds.errors import SRDEError
from tests.distributed.kill_helpers import OTHER, SAVING, STEPS, Case, killed_run
from tests.distributed.training_helpers import Inputs, make_inputs

RESULTS = Path(__file__).resolve().parent / "results/kills.json"
# Gone through again and again: ranks, saves in the background or not, both placements of experts, prunings.
CASES = [
    Case(1),
    Case(2),
    Case(1, prunings=True),
    Case(4, expert_parallel_size=2),
    Case(1, in_background=False),
    Case(2, expert_parallel_size=2),
    Case(2, prunings=True),
    Case(4),
    Case(2, in_background=False, expert_parallel_size=2, prunings=True),
]
KILLS_A_RUN = 15


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=1000)
    parser.add_argument("--workers", type=int, default=2, help="runs at a time")
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args()
    runs: list[dict[str, Any]] = []
    if options.results.exists():
        runs = json.loads(options.results.read_text())["runs"]
        if any(set(run) != {"case", "seed", "seconds", "moments", "measured_on"} for run in runs):
            raise SRDEError(
                f"results={options.results}: a record of an older form. Move it, or give another --results."
            )
    with (
        tempfile.TemporaryDirectory() as scratch,
        ProcessPoolExecutor(options.workers, get_context("spawn"), start_worker, (scratch,)) as pool,
    ):
        kills = sum(len(run["moments"]) for run in runs)
        seeds = count(1 + max((run["seed"] for run in runs), default=-1))
        left = {pool.submit(one_run, next(seeds)) for _ in range(options.workers)}
        while left:
            done, left = wait(left, return_when=FIRST_COMPLETED)
            for run in (future.result() for future in done):
                runs.append(run)
                kills += len(run["moments"])
                write(options.results, runs)
                print(f"{kills} kills in {len(runs)} runs", flush=True)
                if kills < options.kills:
                    left.add(pool.submit(one_run, next(seeds)))
    print(table(json.loads(options.results.read_text())))


worker: tuple[Path, Inputs]  # of this process: its folder, where the unkilled runs stay, and what all runs are given


def start_worker(scratch: str) -> None:
    global worker
    folder = Path(tempfile.mkdtemp(dir=scratch))
    worker = folder, make_inputs(folder / "inputs")


def one_run(seed: int) -> dict[str, Any]:
    """A run and what killed it on its way."""
    folder, inputs = worker
    shutil.rmtree(folder / "killed", ignore_errors=True)
    case, started, moments = CASES[seed % len(CASES)], time.monotonic(), []
    for kill in killed_run(inputs, folder, random.Random(seed), case, most_kills=KILLS_A_RUN):
        moments.append(list(asdict(kill).values()))
        print(seed, kill, flush=True)
    run = {"case": asdict(case), "seed": seed, "seconds": round(time.monotonic() - started, 1), "moments": moments}
    return run | {"measured_on": measured_on()}


def write(path: Path, runs: list[dict[str, Any]]) -> None:
    """The record: sums first, then each run with its kills, which all passed every check."""
    phases = Counter(moment[2] for run in runs for moment in run["moments"])
    by_ranks: Counter[str] = Counter()
    for run in runs:
        by_ranks[str(run["case"]["world_size"])] += len(run["moments"])
    record = {
        "kills": sum(phases.values()),
        "during_a_save": sum(phases[phase] for phase in SAVING),
        "phases": {phase: phases[phase] for phase in (*SAVING, *OTHER)},
        "by_ranks": dict(by_ranks),
        "with_prunings": sum(len(run["moments"]) for run in runs if run["case"]["prunings"]),
        "with_expert_parallelism": sum(len(run["moments"]) for run in runs if run["case"]["expert_parallel_size"] > 1),
        "runs_equal_to_the_unkilled_one_bit_for_bit": f"{len(runs)} of {len(runs)}",
        "steps_of_a_run": STEPS,
        "runs": runs,
    }
    partial = path.with_name(path.name + ".tmp")
    partial.write_text(json.dumps(record) + "\n")
    partial.replace(path)


def table(record: dict[str, Any]) -> str:
    return "\n".join(f"{phase:<52}{count:>5}" for phase, count in record["phases"].items())


if __name__ == "__main__":
    main()
