"""Signals become a request on which all ranks agree."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from srde_ds.errors import Stopped
from srde_ds.training import signals
from srde_ds.training.signals import SIGNALS, StopRequest


def alone(value: int) -> int:
    return value


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_only_sets_a_flag_and_the_former_handler_returns(number: signal.Signals) -> None:
    received: list[int] = []
    former = signal.signal(number, lambda given, frame: received.append(given))
    try:
        with StopRequest() as stop:
            assert stop.agreed(alone) is None
            os.kill(os.getpid(), number)
            assert stop.agreed(alone) == number.name
        assert received == []
        os.kill(os.getpid(), number)
        assert received == [number]
    finally:
        signal.signal(number, former)


def test_before_there_is_anything_to_save_the_first_signal_stops_at_once() -> None:
    with StopRequest(at_once=True) as stop:
        with pytest.raises(Stopped, match="stopped by SIGTERM") as raised:
            os.kill(os.getpid(), signal.SIGTERM)
        assert raised.value.number == signal.SIGTERM and stop.agreed(alone) == "SIGTERM"
        os.kill(os.getpid(), signal.SIGTERM)  # its echo does not disturb what cleans up
    with StopRequest(at_once=True) as stop:
        stop.at_once = False
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.agreed(alone) == "SIGTERM"


@contextmanager
def _heeding_ctrl_c() -> Iterator[None]:
    """A shell lets its background jobs ignore SIGINT, and a new process inherits that."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def test_a_ctrl_c_while_the_script_loads_ends_without_a_traceback(tmp_path: Path) -> None:
    """With a package that takes long to load in place of this one."""
    (tmp_path / "srde_ds").mkdir()
    (tmp_path / "srde_ds/__init__.py").write_text("import time\nprint('loading', flush=True)\ntime.sleep(60)\n")
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    command = [sys.executable, str(Path(__file__).parents[2] / "launch/train.py")]
    with (
        _heeding_ctrl_c(),
        subprocess.Popen(command, env=os.environ | {"PYTHONPATH": str(tmp_path)}, **pipes) as process,
    ):
        assert process.stdout is not None and process.stdout.readline() == "loading\n"
        process.send_signal(signal.SIGINT)
        assert process.stdout.read() == "" and process.wait(10) == -signal.SIGINT  # 130 in a shell


def test_handlers_return_after_an_error_too() -> None:
    before = [signal.getsignal(number) for number in SIGNALS]
    with pytest.raises(ZeroDivisionError), StopRequest():
        raise ZeroDivisionError
    assert [signal.getsignal(number) for number in SIGNALS] == before


def test_ranks_with_different_signals_agree_on_one() -> None:
    with StopRequest() as first, StopRequest() as second:
        os.kill(os.getpid(), signal.SIGUSR1)  # the inner one is installed: only `second` sees it
        assert (first.agreed(alone), second.agreed(alone)) == (None, "SIGUSR1")
        values: list[int] = []
        for rank in (first, second):
            rank.agreed(lambda value: values.append(value) or value)  # type: ignore[func-returns-value]
        assert [rank.agreed(lambda value: max(values)) for rank in (first, second)] == ["SIGUSR1", "SIGUSR1"]
    assert StopRequest().agreed(lambda value: max(signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)) == "SIGTERM"


def test_the_first_signal_names_the_stop_and_repeats_change_nothing() -> None:
    with StopRequest() as stop:
        for number in (signal.SIGUSR1, signal.SIGTERM, signal.SIGTERM, signal.SIGINT):
            os.kill(os.getpid(), number)
        assert stop.agreed(alone) == "SIGUSR1"


def test_a_second_ctrl_c_stops_at_once_but_an_echo_of_the_first_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    with StopRequest() as stop:
        os.kill(os.getpid(), signal.SIGINT)
        now += signals.SAME_PRESS_SECONDS / 2
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.agreed(alone) == "SIGINT"
        now += signals.SAME_PRESS_SECONDS
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
