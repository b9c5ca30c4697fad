"""The results file: one JSON object a run, appended, never rewritten."""

from __future__ import annotations

import gc
import json
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from statistics import mean

from benchmarks.learning.plan import Record, Run
from benchmarks.tables import measured_on

RESULTS = Path(__file__).with_name("results")


class Store:
    """The runs done on one machine.

    Args:
        machine: as `environment()` names it; runs of other machines are in the file, but not found.
    """

    def __init__(self, path: Path, machine: str) -> None:
        self.path, self.machine = path, machine
        self.records = {record["key"]: record for record in read_records(path) if record["machine"] == machine}

    def find(self, run: Run) -> Record | None:
        return self.records.get(run.key(self.machine))

    def add(self, run: Run, figures: Record) -> None:
        record = {"key": run.key(self.machine), "row": run.row} | run.identity(self.machine) | figures
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
        self.records[record["key"]] = record

    def expected_seconds(self, run: Run) -> float | None:
        """Mean time of the runs like this one, else of any that measured as much; None before there is one."""
        alike = [record for record in self.records.values() if record["report"] == run.report]
        same = [record["seconds"] for record in alike if record["kind"] == run.kind]
        return mean(same or [record["seconds"] for record in alike]) if alike else None


def read_records(path: Path) -> list[Record]:
    """All lines of a results file, none if it is not there; a line that a kill tore is left out."""
    records = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        try:
            records.append(json.loads(line))
        except ValueError:
            continue
    return records


def run_missing(
    seed: int, todo: Iterable[tuple[str, Callable[[], Record]]], results: Path, describe: Callable[[Record], str]
) -> None:
    """Run the named parts of a seed that have no line in `results`, and add a line for each.

    Args:
        describe: what the console says of a part's record.
    """
    for name, part in todo:
        if (seed, name) in {(record["seed"], record["part"]) for record in read_records(results)}:
            continue
        started = time.monotonic()
        record: Record = {"seed": seed, "part": name} | part() | {"seconds": round(time.monotonic() - started)}
        with results.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record | measured_on()) + "\n")
        print(f"seed {seed}, {name}: {describe(record)} ({record['seconds']} s)", flush=True)
        gc.collect()
