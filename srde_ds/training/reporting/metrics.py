"""Writes a step's numbers to metrics.jsonl, the trackers and the console."""

from __future__ import annotations

import json
import logging
import math
import os
import resource
import secrets
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext, suppress
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

import torch
from tqdm import tqdm

from srde_ds.config import TrackingConfig
from srde_ds.errors import SRDEError
from srde_ds.utils.files import write_text
from srde_ds.utils.units import GIB
from srde_ds.weights.locate import METRICS

logger = logging.getLogger(__name__)

_BLOCK_BYTES = 2**20
_RUN_ID = "wandb_run_id"

# flag, module, package to install
_TRACKERS = (
    ("use_tensorboard", "torch.utils.tensorboard", "tensorboard"),
    ("use_wandb", "wandb", "wandb"),
    ("use_trackio", "trackio", "trackio"),
)


class _Tracker(NamedTuple):
    log: Callable[[Mapping[str, float], int], None]
    close: Callable[[], object]


class MetricsWriter:
    """Appends one JSON object per step to `output_dir/metrics.jsonl` and passes its numbers to the trackers.

    Args:
        enabled: True on rank 0. Other ranks write nothing, but they also fail if a tracker's package is missing.
        resume_step: number of steps done before this process began. Lines of later steps, whose work was lost with
            their process, are cut off, so that the file has each step once; so is a line that a kill left incomplete.
        last_line_comes: the last of these steps was not measured to its end, so its line is still to be written.
        run_config: the resolved config, shown by W&B and trackio.

    Raises:
        SRDEError: the package of a chosen tracker is not installed.
    """

    def __init__(
        self,
        output_dir: str | Path,
        tracking: TrackingConfig,
        *,
        enabled: bool,
        resume_step: int = 0,
        last_line_comes: bool = False,
        run_config: Mapping[str, Any] | None = None,
    ) -> None:
        modules = load_trackers(tracking)
        self.enabled = enabled
        if not enabled:
            return
        folder = Path(output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / METRICS
        last_line = resume_step - last_line_comes
        _cut_after(path, last_line)
        self._file = path.open("ab", buffering=0)
        self._unwritten = b""
        self._trackers: dict[str, _Tracker] = {}

        def start(flag: str, module: Any) -> None:
            if flag == "use_tensorboard":
                board = module.SummaryWriter(str(folder / "tensorboard"), purge_step=last_line + 1)
                self._trackers[flag] = _Tracker(partial(_add_scalars, board), board.close)
                return
            name = tracking.wandb_run_name or folder.resolve().name
            goes_on = (
                {"id": _run_id(folder, new=resume_step == 0), "resume": "allow"}
                if flag == "use_wandb"
                else {"resume": "allow" if resume_step else "never"}  # it goes by the name
            )
            module.init(project=tracking.wandb_project, name=name, config=dict(run_config or {}), **goes_on)
            log = _log
            if flag == "use_wandb":  # it drops what comes for an earlier step of its own, so the axis is ours
                module.define_metric("step")
                module.define_metric("*", step_metric="step")
                log = _log_with_step
            self._trackers[flag] = _Tracker(partial(log, module), module.finish)

        for flag, module in modules.items():
            self._guarded(flag, partial(start, flag, module))

    def write(self, metrics: Mapping[str, Any]) -> None:
        """Record one step. `metrics` holds `step`, and numbers, text, lists or nested dicts of these.

        A number that is not finite becomes null, so that the file stays valid JSON. If the disk is full, lines wait
        until there is room; whether the run continues depends on its checkpoints. A tracker that fails gets no more
        numbers.
        """
        if not self.enabled:
            return
        self._unwritten += json.dumps(_finite(metrics)).encode() + b"\n"
        try:
            self._write_lines()
        except OSError as error:
            logger.warning("metrics.jsonl: %s; the lines are kept until there is room.", error.strerror)
        step = int(metrics["step"])
        numbers = {name: value for name, value in flatten(metrics) if name != "step"}
        for flag, tracker in list(self._trackers.items()):
            self._guarded(flag, partial(tracker.log, numbers, step))

    def _guarded(self, flag: str, work: Callable[[], object]) -> None:
        """Do something with a tracker. What it raises must not end the run, but the tracker's part in it."""
        try:
            work()
        except Exception as error:
            self._trackers.pop(flag, None)
            told = "%s: %s; it gets no more numbers of this run, metrics.jsonl has them."
            logger.warning(told, flag.removeprefix("use_"), error)

    def _write_lines(self) -> None:
        while self._unwritten:
            self._unwritten = self._unwritten[self._file.write(self._unwritten) :]

    def close(self, *, complete: bool) -> None:
        """Close the file and the trackers.

        Args:
            complete: no error has ended the run, so lines that still wait for disk space must be written. Otherwise
                they are if there is room by now.
        """
        if not self.enabled:
            return
        with self._file:
            try:
                with nullcontext() if complete else suppress(OSError):
                    self._write_lines()
            finally:
                for flag, tracker in list(self._trackers.items()):
                    self._guarded(flag, tracker.close)


def _add_scalars(board: Any, numbers: Mapping[str, float], step: int) -> None:
    for name, value in numbers.items():
        board.add_scalar(name, value, step)


def _log(tracker: Any, numbers: Mapping[str, float], step: int) -> None:
    tracker.log(numbers, step=step)


def _log_with_step(tracker: Any, numbers: Mapping[str, float], step: int) -> None:
    tracker.log({**numbers, "step": step})


def flatten(metrics: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    """The numbers in nested dicts and lists, named by their path: `{"a": {"b": [5]}}` gives `("a/b/0", 5)`."""
    for key, value in metrics.items():
        name = f"{prefix}{key}"
        if isinstance(value, list | tuple):
            value = dict(enumerate(value))
        if isinstance(value, Mapping):
            yield from flatten(value, f"{name}/")
        elif isinstance(value, int | float) and not isinstance(value, bool):
            yield name, value


class ProgressLine:
    """Shows loss, speed, tokens, time left and memory: as a bar on a terminal, else in a line every `log_steps` steps.

    Args:
        start_step: number of steps done before this process began.
        enabled: True on rank 0; other ranks show nothing.
    """

    def __init__(self, max_steps: int, log_steps: int, *, start_step: int, enabled: bool) -> None:
        self.max_steps, self.log_steps, self.start_step, self.enabled = max_steps, log_steps, start_step, enabled
        self._started = time.monotonic()
        self._bar: Any = None
        if enabled and sys.stderr.isatty():
            layout = "{desc} {percentage:3.0f}% |{bar}| {n_fmt}/{total_fmt} {postfix}"
            self._bar = tqdm(total=max_steps, initial=start_step, desc="train", dynamic_ncols=True, bar_format=layout)

    def update(self, metrics: Mapping[str, Any]) -> None:
        """Show a step's `step`, `loss`, `tokens_per_second`, `tokens` (since the run began) and `memory_gib`."""
        if not self.enabled:
            return
        step = metrics["step"]
        seconds_per_step = (time.monotonic() - self._started) / max(1, step - self.start_step)
        text = (
            f"loss {metrics['loss']:.4f} | {_short(metrics['tokens_per_second'])} tokens/s | "
            f"{_short(metrics['tokens'])} tokens | left {_duration(seconds_per_step * (self.max_steps - step))} | "
            f"{metrics['memory_gib']:.1f} GiB"
        )
        if self._bar is not None:
            self._bar.set_postfix_str(text, refresh=False)
            self._bar.update(step - self._bar.n)
        elif step % self.log_steps == 0 or step in (self.start_step + 1, self.max_steps):
            print(f"step {step:>{len(str(self.max_steps))}}/{self.max_steps} | {text}", file=sys.stderr, flush=True)

    def __enter__(self) -> ProgressLine:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Leave the bar as it is."""
        if self._bar is not None:
            self._bar.close()


def memory_gib() -> float:
    """Peak memory of this process in GiB: allocated memory of the GPU if there is one, else resident memory."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / GIB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # Linux counts in KiB


def load_trackers(tracking: TrackingConfig) -> dict[str, Any]:
    """The modules of the chosen trackers, by flag; SRDEError if a package is not installed."""
    return {flag: _load(flag, module, package) for flag, module, package in _TRACKERS if getattr(tracking, flag)}


def _load(flag: str, module: str, package: str) -> Any:
    try:
        return import_module(module)
    except ImportError:
        raise SRDEError(f"{flag}=true: package '{package}' is missing. Install it: pip install {package}") from None


def _run_id(folder: Path, *, new: bool) -> str:
    """The id under which W&B knows this folder's run, so that a resumed run goes on there."""
    path = folder / _RUN_ID
    if new or not path.is_file():
        write_text(path, secrets.token_hex(8) + "\n")
    return path.read_text(encoding="utf-8").strip()


def _cut_after(path: Path, step: int) -> None:
    """Cut off the lines after a step. The file is read from its end, so the length of the run does not matter."""
    if not path.exists():
        return
    with open(path, "r+b") as file:
        position, tail = file.seek(0, os.SEEK_END), b""
        while position:
            size = min(_BLOCK_BYTES, position)
            position -= size
            file.seek(position)
            tail = file.read(size) + tail
            # The first chunk may begin in the middle of a line.
            begin = 0 if position == 0 else tail.find(b"\n") + 1
            end = tail.rfind(b"\n") + 1
            while end > begin:
                start = tail.rfind(b"\n", 0, end - 1) + 1
                if _step_of(tail[start:end]) <= step:
                    file.truncate(position + end)
                    return
                end = start
            tail = tail[:begin]
        file.truncate(0)


def _step_of(line: bytes) -> float:
    """The step of a line; infinite if the line is damaged."""
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError):
        return math.inf


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _short(number: float) -> str:
    for unit, size in (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= size:
            return f"{number / size:.2f}{unit}"
    return f"{number:.0f}"


def _duration(seconds: float) -> str:
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02}:{second:02}"
