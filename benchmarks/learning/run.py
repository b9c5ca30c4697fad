"""The learning benchmark: trains and measures what suites.yaml lists, and goes on where it stopped.

    python launch/quickstart_inputs.py runs/quickstart-inputs     # the base, once
    python -m benchmarks.learning.run --suite baselines ablation --budget small --core --workers 2
    python -m benchmarks.learning.tables

Each run adds a line to the results file and is found again by its settings, seed, budget and machine: a command that
was interrupted or is given twice does only what is missing, and rows of several suites share runs. On a machine that
is lent for minutes, `--time_limit` starts no run that would end later. A run that diverges is a result too.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Executor, Future, ProcessPoolExecutor, wait
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from benchmarks.learning.plan import Plan, Record, Row, Run
from benchmarks.learning.store import RESULTS, Store
from srde_ds.errors import SRDEError

ROOT = Path(__file__).resolve().parents[2]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--suite", nargs="+", required=True, help="of suites.yaml")
    parser.add_argument("--budget", required=True, help="of suites.yaml")
    parser.add_argument("--core", action="store_true", help="only the rows marked core")
    parser.add_argument("--rows", nargs="+", metavar="NAME", help="only these rows")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--workers", type=int, default=1, help="runs at a time, each in a process of its own")
    parser.add_argument("--time_limit", type=float, default=float("inf"), help="seconds for the whole command")
    parser.add_argument("--base", type=Path, default=ROOT / "runs/quickstart-inputs/base")
    parser.add_argument("--folder", type=Path, default=ROOT / "runs/learning", help="for data and scratch")
    parser.add_argument("--revision", help="commit of the code, where there is no repository to ask")
    parser.add_argument("--results", type=Path, help="default: benchmarks/learning/results/<budget>.jsonl")
    options = parser.parse_args(arguments)
    started = time.monotonic()
    if not (options.base / "config.json").exists():
        raise SRDEError(
            f"base={options.base}: no base there. Run python launch/quickstart_inputs.py runs/quickstart-inputs"
        )
    threads = set_processes(options.device, options.workers)

    import torch

    from benchmarks.learning import methods, worker
    from benchmarks.learning.data import describe_base, prepare
    from srde_ds.utils.environment import environment

    if options.device == "cuda" and not torch.cuda.is_available():
        raise SRDEError("device=cuda: torch sees no GPU here. Give --device cpu.")
    store = Store(options.results or RESULTS / f"{options.budget}.jsonl", environment()["machine"])
    others = {record["base"] for record in store.records.values()} - {describe_base(options.base)}
    if others:
        raise SRDEError(f"results={store.path}: hold runs of another base ({min(others)}). Give another --results.")
    plan = Plan(options.budget, store.find)
    rows = plan.select(options.suite, core=options.core, only=options.rows)
    for seed in (*plan.budget.sweep_seeds, *plan.budget.seeds):
        inputs = prepare(plan.budget, seed, base=options.base, folder=options.folder)
    for row in rows:
        methods.config_of(plan.example(row), inputs, options.folder)
    setup = options.base, options.folder, threads, options.revision
    pool: Executor
    if options.workers == 1:
        worker.start(*setup)
        pool = InThisProcess()
    else:
        # A process for each run: what an engine leaves behind in one adds up to gigabytes.
        pool = ProcessPoolExecutor(options.workers, get_context("spawn"), worker.start, setup, max_tasks_per_child=1)
    with pool:
        left, failures = drive(plan, store, rows, pool, options.workers, started + options.time_limit)
    if failures:
        raise SRDEError(f"{left} runs are left, {len(failures)} of them failed:\n" + "\n".join(failures))
    print(f"{left} runs are left: give the command again." if left else f"All done: {store.path}", flush=True)


def set_processes(device: str, workers: int) -> int:
    """Choose device and threads by the environment, before torch is imported here or in the workers."""
    threads = max(1, len(os.sched_getaffinity(0)) // workers)
    os.environ |= {"OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    if device == "cpu":
        os.environ |= {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"}
    return threads


class InThisProcess(Executor):
    """A pool of one worker, this process: submitting is doing."""

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        future: Future[Any] = Future()
        try:
            future.set_result(fn(*args, **kwargs))
        except SRDEError as error:
            future.set_exception(error)
        return future


def drive(
    plan: Plan, store: Store, rows: Sequence[Row], pool: Executor, workers: int, end: float
) -> tuple[int, list[str]]:
    """Do what is missing of these rows, and add it to the store.

    Args:
        end: `time.monotonic()` after which nothing may run any more.

    Returns:
        How many runs are left, because they would not have been done by then or failed, and what failed. A failure
        stops nothing else, and the run is tried again by the next command.
    """
    from benchmarks.learning.worker import work

    running: dict[Future[Record], Run] = {}
    failures: dict[str, str] = {}
    done = 0
    while True:
        ready, later = plan.missing(rows)
        begun = {run.key("") for run in running.values()} | failures.keys()
        for run in ready:
            if run.key("") not in begun and len(running) < workers and _fits(store.expected_seconds(run), end):
                running[pool.submit(work, run)] = run
        if not running:
            return len(ready) + later, list(failures.values())
        for future in wait(running, return_when=FIRST_COMPLETED).done:
            run = running.pop(future)
            try:
                store.add(run, future.result())
            except SRDEError as error:
                failures[run.key("")] = f"{run.row}, seed {run.seed}: {error}"
                print(f"FAILED {failures[run.key('')]}", flush=True)
                continue
            done += 1
            print(_line(run, store, done, *plan.missing(rows), workers), flush=True)


def _fits(expected: float | None, end: float) -> bool:
    return end == float("inf") or time.monotonic() + 1.2 * (expected or 0.0) < end


def _line(run: Run, store: Store, done: int, ready: list[Run], later: int, workers: int) -> str:
    record = store.find(run)
    assert record is not None
    expected = [seconds for seconds in map(store.expected_seconds, ready) if seconds is not None]
    reports = [record["seconds"] for record in store.records.values() if record["report"]] or expected or [0.0]
    left = sum(expected) + later * sum(reports) / len(reports)
    what = "reported" if run.report else "sweep"
    rates = " ".join(f"{key}={run.flags[key]:g}" for key in ("muon_lr", "learning_rate") if key in run.flags)
    loss = "diverged" if "diverged" in record else f"validation {record['validation_loss']:.4f}"
    return (
        f"[{done} done, {len(ready) + later} left, about {left / workers / 60:.0f} min] {run.row}, {what}, "
        f"seed {run.seed} {rates}: {loss}, {record['seconds']:.0f} s"
    )


if __name__ == "__main__":
    try:
        main()
    except SRDEError as error:
        sys.exit(f"learning: {error}")
