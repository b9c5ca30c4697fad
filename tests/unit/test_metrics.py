"""Each step once in metrics.jsonl, whatever was lost; trackers get the same numbers."""

from __future__ import annotations

import io
import json
import resource
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from srde_ds.config import TrackingConfig
from srde_ds.errors import SRDEError
from srde_ds.training.reporting.metrics import MetricsWriter, ProgressLine, flatten, memory_gib

STEP = {
    "loss": 2.5,
    "tokens": 100,
    "tokens_per_expert": {"math": 0.75, "code": 0.25},
    "entropy": [0.5, 1.5],
    "note": "x",
}


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@contextmanager
def writer_of(folder: Path, tracking: TrackingConfig | None = None, **options: Any) -> Iterator[MetricsWriter]:
    """A writer for the steps in the block, closed as a run does."""
    writer = MetricsWriter(folder, tracking or TrackingConfig(), **{"enabled": True} | options)
    try:
        yield writer
    except BaseException:
        writer.close(complete=False)
        raise
    writer.close(complete=True)


def write_steps(folder: Path, first: int, last: int, **options: Any) -> None:
    with writer_of(folder, **options) as writer:
        for step in range(first, last + 1):
            writer.write({"step": step, "loss": float(step)})


def test_a_line_is_on_disk_as_soon_as_it_is_written(tmp_path: Path) -> None:
    with writer_of(tmp_path / "run") as writer:
        writer.write({"step": 1} | STEP)
        assert lines(tmp_path / "run") == [{"step": 1} | STEP]


def test_resuming_cuts_what_comes_again_and_a_torn_line(tmp_path: Path) -> None:
    write_steps(tmp_path, 0, 7)
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 8, "lo')
    write_steps(tmp_path, 6, 9, resume_step=5)
    assert [line["step"] for line in lines(tmp_path)] == list(range(10))
    write_steps(tmp_path, 1, 2)
    assert [line["step"] for line in lines(tmp_path)] == [0, 1, 2]
    write_steps(tmp_path, 2, 3, resume_step=2, last_line_comes=True)
    assert [line["step"] for line in lines(tmp_path)] == [0, 1, 2, 3]


def test_numbers_that_are_not_finite_stay_valid_json(tmp_path: Path) -> None:
    with writer_of(tmp_path) as writer:
        writer.write({"step": 1, "loss": float("nan"), "norms": {"math": [float("inf"), 1.0]}})
    text = (tmp_path / "metrics.jsonl").read_text()
    assert json.loads(text) == {"step": 1, "loss": None, "norms": {"math": [None, 1.0]}}
    assert "NaN" not in text and "Infinity" not in text


@pytest.mark.parametrize("error", [None, SRDEError("its last checkpoint was not saved, which has made room")])
def test_on_a_full_disk_lines_wait_for_room(
    error: SRDEError | None, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A limit on the size of files stands for the full disk: a write stops in mid-line, the next one fails."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    with suppress(SRDEError), writer_of(tmp_path) as writer:
        resource.setrlimit(resource.RLIMIT_FSIZE, (30, limits[1]))
        try:
            for step in range(1, 5):
                writer.write({"step": step, "loss": 0.5})
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert (tmp_path / "metrics.jsonl").stat().st_size == 30
        if error:
            raise error
    assert "metrics.jsonl: File too large; the lines are kept until there is room." in caplog.text
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert lines == [{"step": step, "loss": 0.5} for step in range(1, 5)]


def test_other_ranks_write_nothing(tmp_path: Path) -> None:
    with writer_of(tmp_path / "run", TrackingConfig(use_tensorboard=True), enabled=False) as writer:
        writer.write({"step": 1, "loss": 1.0})
    assert not (tmp_path / "run").exists()


def test_flatten_joins_names_and_drops_what_is_no_number() -> None:
    nested = {"a": {"b": {"c": 1}, "list": [2, [3.5]]}, "text": "x", "flag": True, "none": None}
    assert dict(flatten(nested)) == {"a/b/c": 1, "a/list/0": 2, "a/list/1/0": 3.5}


def test_tensorboard_events_read_back(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with writer_of(tmp_path, TrackingConfig(use_tensorboard=True)) as writer:
        for step in (1, 2, 3):
            writer.write({"step": step} | STEP)
    with writer_of(tmp_path, TrackingConfig(use_tensorboard=True), resume_step=1) as writer:
        writer.write({"step": 2, "loss": 7.0})
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars("loss")] == [(1, 2.5), (2, 7.0)]
    assert events.Scalars("tokens_per_expert/math")[0].value == 0.75


class Tracker(ModuleType):
    """W&B or trackio. As W&B does, it drops numbers for a step that is not its last one or a later one."""

    def __init__(self) -> None:
        super().__init__("tracker")
        self.step = 0
        self.calls: list[tuple[str, Any]] = []
        self.runs: list[tuple[str, str]] = []

    def init(self, *, project: str, name: str, config: dict[str, Any], resume: str, id: str = "") -> None:
        self.runs.append((resume, id))
        self.calls.append(("init", (project, name, config)))

    def define_metric(self, name: str, *, step_metric: str | None = None) -> None:
        self.calls.append(("axis", (name, step_metric)))

    def log(self, numbers: dict[str, float], *, step: int | None = None) -> None:
        step = self.step + 1 if step is None else step
        if step >= self.step:
            self.calls.append(("log", (step, numbers)))
        self.step = max(self.step, step)

    def finish(self) -> None:
        self.calls.append(("finish", None))


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_a_resumed_run_goes_on_in_its_tracker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    tracker, tracking = Tracker(), TrackingConfig()
    monkeypatch.setitem(sys.modules, name, tracker)
    setattr(tracking, f"use_{name}", True)
    for resume_step, comes in ((0, False), (1, True), (3, False), (5, False), (0, False)):
        how: dict[str, Any] = {"resume_step": resume_step, "last_line_comes": comes}
        MetricsWriter(tmp_path / "run", tracking, enabled=True, **how).close(complete=True)
    resumes, ids = zip(*tracker.runs, strict=True)
    if name == "wandb":
        assert set(resumes) == {"allow"} and ids[0] == ids[1] == ids[2] == ids[3] != ids[4]
    else:
        assert resumes == ("never", "allow", "allow", "allow", "never")


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_trackers_get_init_log_and_finish(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    tracker = Tracker()
    monkeypatch.setitem(sys.modules, name, tracker)
    tracking = TrackingConfig(wandb_project="experts")
    setattr(tracking, f"use_{name}", True)
    with (
        pytest.raises(ZeroDivisionError),
        writer_of(tmp_path / "run7", tracking, run_config={"training": {"seed": 3}}) as writer,
    ):
        writer.write({"step": 4} | STEP)
        raise ZeroDivisionError  # the run is closed on the way out of an error too
    numbers = {"loss": 2.5, "tokens": 100, "tokens_per_expert/math": 0.75, "tokens_per_expert/code": 0.25}
    numbers |= {"entropy/0": 0.5, "entropy/1": 1.5}
    axes = [("axis", ("step", None)), ("axis", ("*", "step"))]
    assert tracker.calls == [
        ("init", ("experts", "run7", {"training": {"seed": 3}})),
        *(axes if name == "wandb" else []),
        ("log", (1, numbers | {"step": 4}) if name == "wandb" else (4, numbers)),
        ("finish", None),
    ]


def test_wandb_gets_the_steps_that_a_resumed_run_does_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tracker = Tracker()
    monkeypatch.setitem(sys.modules, "wandb", tracker)
    for resume_step in (0, 1):
        with writer_of(tmp_path, TrackingConfig(use_wandb=True), resume_step=resume_step) as writer:
            for step in range(resume_step + 1, 4):
                writer.write({"step": step, "loss": 1.0})
    logged = [what[1]["step"] for call, what in tracker.calls if call == "log"]
    assert logged == [1, 2, 3, 2, 3]


def test_a_board_on_a_full_disk_does_not_end_the_run(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    from torch.utils import tensorboard

    monkeypatch.setattr(tensorboard, "SummaryWriter", partial(tensorboard.SummaryWriter, flush_secs=0))
    # The board writes in a thread, whose error comes out at a later step, or at the end.
    monkeypatch.setattr(threading, "excepthook", lambda arguments: None)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    with writer_of(tmp_path, TrackingConfig(use_tensorboard=True)) as writer:
        resource.setrlimit(resource.RLIMIT_FSIZE, (200, limits[1]))
        try:
            for step in range(1, 31):
                writer.write({"step": step, "loss": 0.5})
                time.sleep(0.01)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert [line["step"] for line in lines(tmp_path)] == list(range(1, 31))
    about_the_board = [message for message in caplog.messages if message.startswith("tensorboard")]
    assert about_the_board == [
        "tensorboard: [Errno 27] File too large; it gets no more numbers of this run, metrics.jsonl has them."
    ]


@pytest.mark.parametrize("name", ["init", "log", "finish"])
def test_a_tracker_that_fails_does_not_end_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, name: str
) -> None:
    def unreachable(*_: Any, **__: Any) -> None:
        raise ConnectionError("no network")

    tracker = Tracker()
    monkeypatch.setattr(tracker, name, unreachable)
    monkeypatch.setitem(sys.modules, "wandb", tracker)
    with writer_of(tmp_path, TrackingConfig(use_wandb=True)) as writer:
        for step in (1, 2):
            writer.write({"step": step, "loss": 0.5})
    assert caplog.messages == ["wandb: no network; it gets no more numbers of this run, metrics.jsonl has them."]
    assert len(lines(tmp_path)) == 2
    assert {call for call, _ in tracker.calls} == {
        "init": set(),
        "log": {"init", "axis"},
        "finish": {"init", "axis", "log"},
    }[name]


@pytest.mark.parametrize("enabled", [True, False])
@pytest.mark.parametrize(
    ("flag", "module", "package"),
    [
        ("use_wandb", "wandb", "wandb"),
        ("use_trackio", "trackio", "trackio"),
        ("use_tensorboard", "torch.utils.tensorboard", "tensorboard"),
    ],
)
def test_a_missing_tracker_stops_every_rank(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flag: str, module: str, package: str, enabled: bool
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    flags: dict[str, Any] = {flag: True}
    with pytest.raises(SRDEError, match=rf"{flag}=true: package '{package}' is missing.*pip install {package}"):
        MetricsWriter(tmp_path / "run", TrackingConfig(**flags), enabled=enabled)
    assert not (tmp_path / "run").exists()


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def show(stream: io.StringIO, monkeypatch: pytest.MonkeyPatch, *, enabled: bool = True) -> str:
    clock = iter(range(1000))
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stderr", stream)
        patch.setattr(time, "monotonic", lambda: float(next(clock)) * 60)
        with ProgressLine(25, 10, start_step=4, enabled=enabled) as progress:
            for step in range(5, 26):
                speed = {"tokens": step * 10**6, "tokens_per_second": 51_234.0, "memory_gib": 3.14}
                progress.update({"step": step, "loss": 1 / step} | speed)
    return stream.getvalue()


def test_without_a_terminal_there_is_a_line_now_and_then(monkeypatch: pytest.MonkeyPatch) -> None:
    shown = show(io.StringIO(), monkeypatch).splitlines()
    assert [line.split(" | ")[0] for line in shown] == ["step  5/25", "step 10/25", "step 20/25", "step 25/25"]
    assert shown[1].startswith("step 10/25 | loss 0.1000 | 51.23k tokens/s | 10.00M tokens | left 0:15:00 | 3.1 GiB")
    assert "left 0:00:00" in shown[3]


def test_on_a_terminal_there_is_a_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    shown = show(Terminal(), monkeypatch)
    assert "25/25" in shown and "51.23k tokens/s" in shown and "step 10/25" not in shown


def test_other_ranks_show_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    assert show(io.StringIO(), monkeypatch, enabled=False) == ""


def test_memory_is_counted_in_gib() -> None:
    if torch.cuda.is_available():
        torch.zeros(2**28, device="cuda")
        assert memory_gib() >= 1.0
    else:
        resident = int(Path("/proc/self/statm").read_text().split()[1]) * 4096 / 2**30
        assert resident * 0.99 <= memory_gib() < resident + 8


def bytes_read() -> int:
    """By this process so far, from files of any kind."""
    return int(Path("/proc/self/io").read_text().split("rchar: ")[1].split()[0])


def test_a_week_of_lines_slows_neither_a_resume_nor_a_step(tmp_path: Path) -> None:
    path, count = tmp_path / "metrics.jsonl", 500_000
    with open(path, "w") as file:
        file.writelines(f'{{"step": {step}, "loss": 1.0, "tokens": 1}}\n' for step in range(1, count + 1))
    before = bytes_read()
    with writer_of(tmp_path, resume_step=count - 100) as writer:
        writer.write({"step": count - 99} | STEP)
    assert bytes_read() - before < 2**22 < path.stat().st_size / 4
    with open(path, "rb") as file:
        file.seek(-2000, 2)
        *_, last, new = file.read().splitlines()
    assert json.loads(last)["step"] == count - 100 and json.loads(new)["step"] == count - 99


@pytest.mark.parametrize("block", [1, 7, 40, 2**20])
def test_lines_are_cut_wherever_a_block_ends(tmp_path: Path, block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("srde_ds.training.reporting.metrics._BLOCK_BYTES", block)
    for resume_step, torn in ((0, ""), (3, ""), (7, '{"step": 8'), (7, ""), (9, "x\n\n"), (5, "\n")):
        (tmp_path / "metrics.jsonl").unlink(missing_ok=True)
        write_steps(tmp_path, 1, 7)
        with open(tmp_path / "metrics.jsonl", "a") as file:
            file.write(torn)
        write_steps(tmp_path, resume_step + 1, resume_step + 1, resume_step=resume_step)
        expected = [*range(1, min(resume_step, 7) + 1), resume_step + 1]
        assert [line["step"] for line in lines(tmp_path)] == expected
