"""How long training stands still for a checkpoint: in the background against waited for, turn by turn in one run.

python -m benchmarks.checkpoint_stall --model_name BASE     # writes benchmarks/results/checkpoint_stall.json

One process trains BASE with ZeRO-3 and saves every other step; the first save and every second one after it go on in
the background. The probe loss, one forward of a row, belongs to every save and is counted apart.
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

from benchmarks.tables import measured_on
from srde_ds.checkpoint.save import CheckpointSaver
from srde_ds.config import resolve
from srde_ds.training.checkpointing import RunState
from srde_ds.training.trainer import train
from tests.data_helpers import sums, write_jsonl

ROOT = Path(__file__).resolve().parents[1]
SAVES = 6


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model_name", required=True)
    parser.add_argument("--density", type=float, default=0.1)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        output = Path(name) / "run"
        records = [record for domain in ("math", "logic") for record in sums(domain, range(200))]
        data = write_jsonl(Path(name) / "train.jsonl", records)
        flags = {
            "model_name": options.model_name,
            "bf16": False,
            "num_experts": 6,
            "density": options.density,
            "jsonl_data": str(data),
            "domains": ["math", "logic"],
            "max_length": 96,
            "gradient_accumulation_steps": 1,
            "warmup_steps": 0,
            "max_steps": 2 * SAVES + 1,
            "save_steps": 2,
            "log_steps": 1,
            "output_dir": str(output),
        }
        saves = timed_run(flags)
        newest = output / f"checkpoint-{2 * SAVES}"
        size = sum(path.stat().st_size for path in newest.iterdir())
        lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    tokens = [after["tokens"] - before["tokens"] for before, after in zip(lines, lines[1:], strict=False)]
    step_seconds = [count / line["tokens_per_second"] for count, line in zip(tokens, lines[1:], strict=True)]
    record: dict[str, Any] = {"checkpoint_bytes": size, "median_step_seconds": statistics.median(step_seconds)}
    for way, chosen in (("background", saves[2::2]), ("waited_for", saves[1::2])):
        record[way] = {key: statistics.median(save[key] for save in chosen) for key in chosen[0]}
        print(way, {key: round(value, 3) for key, value in record[way].items()})
    # Its buffers are new; those of the later ones are used again.
    record["first_in_background"] = saves[0]
    record["stall_ratio"] = record["waited_for"]["stall"] / record["background"]["stall"]
    print(f"checkpoint {size / 1e6:.0f} MB; first in background {saves[0]}; ratio {record['stall_ratio']:.1f}")
    kept = measured_on()
    record |= {"saves": saves, "step_seconds": step_seconds, "model": Path(options.model_name).name}
    target = ROOT / "benchmarks/results/checkpoint_stall.json"
    target.write_text(json.dumps(record | {"density": options.density, "environment": kept}, indent=1) + "\n")


def timed_run(flags: dict[str, Any]) -> list[dict[str, float]]:
    """Train; of each save but the last, seconds: `probe`, `stall` (the rest of the call), until it was `complete`."""
    saves: list[dict[str, float]] = []
    spent = {"probe": 0.0}
    begun = {"step": 0.0, "time": 0.0}
    save, probe_loss, poll = RunState.save, RunState.probe_loss, CheckpointSaver.poll

    def timed_probe(state: RunState, row: int) -> tuple[float, int]:
        started = time.perf_counter()
        found = probe_loss(state, row)
        spent["probe"] = time.perf_counter() - started
        return found

    def timed_save(state: RunState, *, final: bool = False) -> None:
        if final:
            return save(state, final=True)
        state.config.training.save_in_background = len(saves) % 2 == 0
        begun.update(step=state.step, time=time.perf_counter())
        saves.append({})
        save(state)
        stall = time.perf_counter() - begun["time"]
        saves[-1] |= {"probe": spent["probe"], "stall": stall - spent["probe"]}

    def timed_poll(saver: CheckpointSaver) -> bool:
        done = poll(saver)
        if saves and saver.saved_step == begun["step"] and "complete" not in saves[-1]:
            saves[-1]["complete"] = time.perf_counter() - begun["time"]
        return done

    patches: list[tuple[type, str, Callable[..., Any]]] = [
        (RunState, "probe_loss", timed_probe),
        (RunState, "save", timed_save),
        (CheckpointSaver, "poll", timed_poll),
    ]
    for owner, attribute, function in patches:
        patch.object(owner, attribute, function).start()
    train(resolve({}, flags))
    patch.stopall()
    return saves


if __name__ == "__main__":
    main()
