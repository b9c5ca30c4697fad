"""Tokens a second of the training rows' loader alone, and how long it takes to find a late step.

    python -m benchmarks.loader     # makes 400,000 rows of 256 tokens on disk, writes benchmarks/results/loader.json

One thread, one process: what a rank does between two micro-steps. Rows are read from a memory-mapped file that was just
written, so most of it is in the page cache. Times are CPU times, best of three.
"""

import argparse
import json
import shutil
import time
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch

from srde_ds.data.loader import RowStream
from srde_ds.data.mixing import MixingPeriod
from srde_ds.data.packing import Document
from srde_ds.data.rows import DomainRows, write_split
from srde_ds.utils.environment import environment

DOMAINS = ["math", "logic", "code", "science", "planning", "abstract"]
PERIODS = [MixingPeriod(0, (3, 2, 1, 1, 1, 1)), MixingPeriod(500_000, (1, 1, 1, 1, 1, 1))]


def make_rows(folder: Path, rows: int, max_length: int) -> None:
    """`rows` full rows, in equal parts of each domain."""
    parts = folder / "parts"
    counts: dict[str, Any] = {}
    digests: list[Any] = []
    parts.mkdir(parents=True)
    generator = np.random.default_rng(0)
    for domain in DOMAINS:
        file = parts / f"{domain}.arrow"
        options: dict[str, Any] = {"max_length": max_length, "too_long": "drop", "seed": 0, "pad_id": 0}
        with DomainRows(file, domains=DOMAINS, domain=domain, **options) as writer:
            for _ in range(rows // len(DOMAINS)):
                ids = generator.integers(0, 32_000, max_length, dtype=np.int32)
                writer.add(Document(ids, np.ones(max_length, bool), "", False))
        counts[domain], digests = writer.counts, [*digests, writer.digest.hexdigest()]
    files = [parts / f"{domain}.arrow" for domain in DOMAINS]
    write_split(folder / "train", files, made_from=("none", ""), counts=counts, digests=digests, max_length=max_length)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work_dir", type=Path, default=Path("/tmp/srde-loader"))
    parser.add_argument("--rows", type=int, default=400_000)
    parser.add_argument("--max_length", type=int, default=256)
    parser.add_argument("--batch_size", type=int, default=4)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "loader.json")
    given = parser.parse_args()
    torch.set_num_threads(1)
    shutil.rmtree(given.work_dir, ignore_errors=True)
    make_rows(given.work_dir, given.rows, given.max_length)
    result = {}
    for name, periods in (("epochs", None), ("mixing", PERIODS)):
        seconds, late = [], []
        for _ in range(3):
            started = time.process_time()
            rows = datasets.load_from_disk(str(given.work_dir / "train"))
            stream = RowStream(rows, seed=0, global_batch_rows=8 * given.batch_size, periods=periods)
            stream.micro_batch(1_000_000, 1, rank=0, world_size=4, batch_size=given.batch_size)
            late.append(time.process_time() - started)
            started = time.process_time()
            for step in range(200):
                for micro in range(2):
                    stream.micro_batch(step, micro, rank=1, world_size=4, batch_size=given.batch_size)
            seconds.append(time.process_time() - started)
        tokens = 200 * 2 * given.batch_size * given.max_length
        result[name] = {"tokens_per_second": tokens / min(seconds), "seconds_to_step_1_000_000": min(late)}
    shutil.rmtree(given.work_dir)
    sizes = {"rows": given.rows, "max_length": given.max_length, "batch_size": given.batch_size}
    given.output.write_text(json.dumps(result | sizes | {"environment": environment()}, indent=1) + "\n")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
