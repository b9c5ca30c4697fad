"""SIGKILL to training processes at random moments: what each kill leaves, and whether the runs end as if unkilled.

python -m benchmarks.kills      # some 25 minutes; prints a table, writes benchmarks/results/kills.json

The checks are those of tests/distributed/kill_helpers.py: after each kill `latest` names a complete checkpoint whose
hashes are right, and so is the one before it; the next process goes on from it; no half-written folder is left from
earlier kills. A run that got to its end has the weights, optimizer states and metrics of an unkilled one, bit for bit.
A failed check ends this script without a result.
"""

import argparse
import json
import random
import shutil
import tempfile
import time
from collections import Counter
from dataclasses import asdict
from pathlib import Path

from benchmarks.tables import measured_on
from tests.distributed.kill_helpers import OTHER, SAVING, STEPS, Kill, killed_run
from tests.distributed.training_helpers import make_inputs

ROOT = Path(__file__).resolve().parents[1]

# World size and whether saves go on in the background; gone through again and again.
RUNS = [(1, True), (2, True), (1, False), (1, True), (2, True), (2, False)]
KILLS_A_RUN = 15


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    draw = random.Random(options.seed)
    kills: list[Kill] = []
    runs: list[dict[str, object]] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        inputs = make_inputs(folder / "inputs")
        while len(kills) < options.kills:
            world_size, in_background = RUNS[len(runs) % len(RUNS)]
            shutil.rmtree(folder / "killed", ignore_errors=True)
            started, before = time.monotonic(), len(kills)
            for kill in killed_run(
                inputs, folder, draw, world_size=world_size, in_background=in_background, most_kills=KILLS_A_RUN
            ):
                kills.append(kill)
                print(len(kills), kill, flush=True)
            seconds = round(time.monotonic() - started, 1)
            runs.append({"world_size": world_size, "in_background": in_background, "kills": len(kills) - before})
            runs[-1] |= {"steps": STEPS, "equal_to_the_unkilled_run": True, "seconds": seconds}
    phases = Counter(kill.phase for kill in kills)
    for phase in (*SAVING, *OTHER):
        print(f"{phase:<52}{phases[phase]:>5}")
    kept = measured_on()
    record = {
        "kills": len(kills),
        "during_a_save": sum(phases[phase] for phase in SAVING),
        "phases": {phase: phases[phase] for phase in (*SAVING, *OTHER)},
        "latest_complete_and_run_resumed": len(kills),
        "runs_equal_to_the_unkilled_one_bit_for_bit": f"{len(runs)} of {len(runs)}",
        "seed": options.seed,
        "runs": runs,
        "environment": kept,
        "moments": [list(asdict(kill).values()) for kill in kills],
    }
    target = ROOT / "benchmarks/results/kills.json"
    target.write_text(json.dumps(record) + "\n")


if __name__ == "__main__":
    main()
