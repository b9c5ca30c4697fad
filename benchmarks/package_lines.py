"""Lines of the package by room, before the rooms and now, with the reason why a room has grown.

python -m benchmarks.package_lines     # writes the table in docs/decisions.md; needs the repository's history
"""

from __future__ import annotations

import subprocess
from collections import Counter
from pathlib import PurePosixPath

from benchmarks.tables import ROOT, markdown, put_into

ROOMS_LAID_OUT = "1df48b6"  # moved every file to its room and changed nothing else
REASONS = {
    "api.py": "the Python interface: train, build_dataset, evaluate, generate",
    "cli": "combine, inspect, chat, report, common options first in the help",
    "compose": "combining, inspecting, renaming and removing experts",
    "config": "defaults that follow from other options, the base and the rows",
    "data": "real data: encodings, forms and columns of others' files, held-out splits, domain weights, faster packing",
    "distributed": "a resident base, decoder layers as leaf modules",
    "evaluation": "reports as pages, choices by likelihood, the sandbox of programs",
    "inference": "batches, chat, one expert by the prompt, where tokens were sent",
    "liveness": "late ranks and lost hosts are named",
    "model": "shared experts, blocks, many experts, kernels, quantised bases, packed rows, loss without logits",
    "optim": "the update with options, blocks that stay locked",
    "pages": "HTML of reports and chat",
    "peft": "the PEFT form: tuner, Trainer callback, loading and saving",
    "planner": "placement and recomputation by choice, quantised bases, offers of machines",
    "training": "--start_from, statistics of domains, discriminant routers, observers",
    "utils": "tables, files and texts that several rooms share",
    "weights": "one resolver, forged files refused, origins and statistics",
}


def lines_of(revision: str) -> Counter[str]:
    """Lines of Python in each room at a commit."""
    listed = subprocess.run(
        ["git", "grep", "-c", "", revision, "--", "srde_ds/*.py"], cwd=ROOT, check=True, capture_output=True, text=True
    )
    counts: Counter[str] = Counter()
    for line in listed.stdout.splitlines():
        path, count = line.removeprefix(f"{revision}:").rsplit(":", 1)
        counts[PurePosixPath(path).parts[1]] += int(count)
    return counts


def table(before: Counter[str], now: Counter[str]) -> str:
    rows = [
        [
            room.replace("__init__.py", "srde_ds itself"),
            f"{before[room]:,}",
            f"{now[room]:,}",
            REASONS.get(room, "") if now[room] > before[room] else "",
        ]
        for room in sorted(before | now, key=lambda room: before[room] - now[room])
    ]
    total = ["all", f"{before.total():,}", f"{now.total():,}", ""]
    return markdown(["Room", "As laid out", "Now", "Grown for"], [*rows, total])


def main() -> None:
    put_into("decisions.md", "lines", table(lines_of(ROOMS_LAID_OUT), lines_of("HEAD")))


if __name__ == "__main__":
    main()
