"""The small training that all tests of launchers and faults start, as a command line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tests.distributed.training_helpers import Inputs

ROWS_PER_STEP = 12  # for two, three and four processes
# Relative: commands on hosts run in the repository's folder.
TRAIN = "launch/train.py"
# What ranks need on hosts without GPUs whose network is eth0; `srde-ds hosts --write_environment` makes the file of it.
ENVIRONMENT = {
    "DS_ACCELERATOR": "cpu",
    "CUDA_VISIBLE_DEVICES": "",
    "OMP_NUM_THREADS": "1",
    "GLOO_SOCKET_IFNAME": "eth0",
}


def small_run(inputs: Inputs, output_dir: Path, *, processes: int, **changes: Any) -> dict[str, Any]:
    """Options of three steps of twelve rows, a checkpoint after each, on that many processes."""
    options: dict[str, Any] = {"max_steps": 3, "save_steps": 1, "eval_steps": 0}
    options |= {"batch_size": 1, "gradient_accumulation_steps": ROWS_PER_STEP // processes}
    return inputs.flags(output_dir, **(options | changes))


def arguments(options: dict[str, Any]) -> list[str]:
    """The options as flags of `srde-ds train`."""
    words = []
    for name, value in options.items():
        text = ",".join(value) if isinstance(value, list) else str(value)
        words += [f"--{name}", text.lower() if isinstance(value, bool) else text]
    return words
