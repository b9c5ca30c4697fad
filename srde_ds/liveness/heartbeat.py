"""`heartbeat.json` in the run's folder tells `srde-ds monitor` and the supervisor how far a run has come."""

from __future__ import annotations

import json
import logging
import math
import os
import socket
import statistics
import time
from collections import deque
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, get_args

from srde_ds.utils.files import write_text

logger = logging.getLogger(__name__)

FILE = "heartbeat.json"
# A run with short steps must not write to shared storage at every step.
SHORTEST_SECONDS = 1.0
BETWEEN_STEPS_SECONDS = 20.0
# Other ranks let rank 0 write first.
RANK_0_SECONDS = 2.0
State = Literal["running", "stopped", "failed", "finished"]
_MOST_BYTES = 1 << 16
_NUMBER = (int, float)
# What readers need, and what else they show.
_NEEDED: dict[str, tuple[type, ...]] = {"state": (str,), "time": _NUMBER, "host": (str,), "pid": (int,), "step": (int,)}
_SHOWN: dict[str, tuple[type, ...]] = {
    **{"max_steps": (int,), "reason": (str,), "bad_input": (bool,)},
    **dict.fromkeys(("loss", "tokens_per_second", "seconds_per_step"), (*_NUMBER, type(None))),
}


def read_heartbeat(run: Path) -> dict[str, Any]:
    """The content of a run's heartbeat; empty if there is no file, or it is not what `Heartbeat` writes."""
    path = run / FILE
    try:
        if not path.is_file():  # reading a pipe would block
            return {}
        with open(path, "rb") as file:
            content = json.loads(file.read(_MOST_BYTES))
    except (OSError, ValueError, RecursionError):
        return {}
    if not isinstance(content, dict) or not content.keys() >= _NEEDED.keys():
        return {}
    for key, kinds in (_NEEDED | _SHOWN).items():
        value = content.get(key)
        if key in content and (type(value) not in kinds or (type(value) is int and abs(value) >= 1 << 63)):
            return {}
    usual = content["state"] in get_args(State) and content["pid"] > 0 and math.isfinite(content["time"])
    return content if usual else {}


class Heartbeat:
    """Writes the file: rank 0 after steps and within long ones, and any rank to report why the run ended.

    Only `completed.json` says that a run has finished; a heartbeat in state "finished" comes just before it. If the
    file cannot be written, there is only a warning, and training continues.

    Args:
        enabled: True on rank 0; other ranks only write `failed`.
    """

    def __init__(self, output_dir: str | Path, max_steps: int, *, world_size: int, enabled: bool) -> None:
        self.path, self.enabled = Path(output_dir) / FILE, enabled
        self._content: dict[str, Any] = {
            "state": "running",
            "step": 0,
            "max_steps": max_steps,
            "world_size": world_size,
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "started": time.time(),
        }
        if "SLURM_JOB_ID" in os.environ:  # cluster/slurm/train.sbatch looks for it when the job has been requeued
            self._content["slurm_job"] = os.environ["SLURM_JOB_ID"]
        self._written = 0.0
        self._started = False
        self._step_ended: float | None = None
        self._seconds: deque[float] = deque(maxlen=20)

    def start(self, step: int) -> None:
        """The run's folder exists, and `step` steps are done."""
        self._started = True
        self._content["step"] = step
        self._write("running")

    def update(self, line: Mapping[str, Any]) -> None:
        """A step has finished; `line` is its line of metrics."""
        now = time.monotonic()
        if self._step_ended is not None:
            self._seconds.append(now - self._step_ended)
            self._content["seconds_per_step"] = round(statistics.median(self._seconds), 3)
        self._step_ended = now
        self._content |= {key: line[key] for key in ("step", "phase", "loss", "tokens", "tokens_per_second")}
        if now - self._written > SHORTEST_SECONDS:
            self._write("running")

    def beat(self) -> None:
        """A micro-step or a batch of a measurement is about to begin: the run goes on, however long the step takes."""
        if self._started and time.monotonic() - self._written > BETWEEN_STEPS_SECONDS:
            self._write("running")

    def stopped(self, reason: str) -> None:
        """The run stops early, because it was asked to."""
        self._write("stopped", reason=reason)

    def finished(self) -> None:
        """The run is complete."""
        self._write("finished")

    def failed(self, reason: str, rank: int, *, bad_input: bool = False) -> None:
        """The run ends with an error; any rank may report this. Before `start` nothing is written, so that a refused
        run does not touch the folder, which may belong to another run.

        Args:
            bad_input: whether another start would fail in the same way.
        """
        if not self._started:
            return
        before: dict[str, Any] = {}
        if not self.enabled:
            time.sleep(RANK_0_SECONDS)
            before = read_heartbeat(self.path.parent)
            # Rank 0 has already reported the failure, and knows more.
            if before.get("state") == "failed" and before["time"] > self._content["started"]:
                return
        self.enabled = True
        self._content |= {key: before[key] for key in ("step", "started") if key in before}
        self._write("failed", reason=reason, rank=rank, bad_input=bad_input)

    def _write(self, state: State, **more: Any) -> None:
        if not self.enabled:
            return
        self._written = time.monotonic()
        content = self._content | {"state": state, "time": time.time()} | more
        try:
            write_text(self.path, json.dumps(content, indent=1) + "\n", many_writers=True)
        except OSError as error:
            logger.warning("%s: %s; the file shows an earlier state.", FILE, error.strerror)
