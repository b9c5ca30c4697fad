"""How much of the packed rows' positions hold tokens, beside best-fit decreasing on the same lengths.

    python -m benchmarks.packing      # results/packing.json and the table in docs/data.md; seconds, no base needed

The lengths are those of the quick start's training documents (tests/quickstart_lengths.json, with its base's tokenizer,
domain by domain) and of synthetic documents.
"""

import json
from bisect import bisect_left, insort
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.tables import ROOT, markdown, put_into
from srde_ds.data.packing import best_fit
from srde_ds.utils.environment import environment

SEEDS = 3
DOCUMENTS = 5000


def best_fit_decreasing(lengths: Sequence[int], capacity: int) -> int:
    """Rows that it takes to put each document, the longest first, into the fullest row that has room."""
    room: list[int] = []  # left in each row, ascending
    for length in sorted(lengths, reverse=True):
        place = bisect_left(room, length)
        insort(room, (room.pop(place) if place < len(room) else capacity) - length)
    return len(room)


def quickstart_groups() -> list[list[int]]:
    """Lengths by domain: a row holds one."""
    counts = json.loads((ROOT / "tests/quickstart_lengths.json").read_text())
    return [[int(length) for length, n in of.items() for _ in range(n)] for of in counts.values()]


def synthetic(name: str, seed: int) -> list[int]:
    generator = np.random.default_rng(seed)
    drawn = {
        "long tail": lambda: generator.lognormal(5.0, 1.2, DOCUMENTS).clip(8, 2048),
        "heavy tail": lambda: (40 * (1 + generator.pareto(1.1, DOCUMENTS))).clip(8, 2048),
        "hard": lambda: generator.integers(700, 1101, DOCUMENTS),
    }[name]()
    return [int(length) for length in drawn]


CASES = {
    "the quick start's 9,000 documents (44 to 122 tokens)": (256, [quickstart_groups()]),
    "long tail (log-normal, median 148, sigma 1.2)": (2048, [[synthetic("long tail", s)] for s in range(SEEDS)]),
    "heavy tail (Pareto 1.1 from 40)": (2048, [[synthetic("heavy tail", s)] for s in range(SEEDS)]),
    "700 to 1,100: two hardly fit, three never": (2048, [[synthetic("hard", s)] for s in range(SEEDS)]),
}


def main() -> None:
    rows: list[dict[str, Any]] = []
    for name, (capacity, draws) in CASES.items():
        groups = [group for draw in draws for group in draw]
        tokens = sum(map(sum, groups))
        used = {
            "best_fit_decreasing": tokens / (capacity * sum(best_fit_decreasing(group, capacity) for group in groups)),
            "ours": tokens / (capacity * sum(len(best_fit(group, capacity)) for group in groups)),
        }
        rows.append({"lengths": name, "row": capacity, "documents": sum(map(len, groups)), **used})
    target = Path(__file__).resolve().parent / "results/packing.json"
    target.write_text(json.dumps({"rows": rows, "draws": SEEDS, "environment": environment()}, indent=1) + "\n")
    head = ["Lengths", "row", "best-fit decreasing", "this"]
    body = [[r["lengths"], f"{r['row']:,}", f"{r['best_fit_decreasing']:.2%}", f"{r['ours']:.2%}"] for r in rows]
    table = markdown(head, body)
    put_into("data.md", "packing", table)
    print(table)


if __name__ == "__main__":
    main()
