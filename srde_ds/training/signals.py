"""Stops on request: signals set a flag, and the ranks agree on it between micro-steps."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Iterable, Iterator
from types import FrameType
from typing import Any, TypeVar

from srde_ds.errors import Stopped

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
# One Ctrl-C can arrive twice: from the terminal and forwarded by mpirun or the deepspeed runner.
SAME_PRESS_SECONDS = 2.0

Item = TypeVar("Item")


class Interrupted(Exception):
    """The ranks have agreed to stop, so what they were measuring is given up; all raise it together."""


def until_interrupted(items: Iterable[Item], interrupted: Callable[[], bool]) -> Iterator[Item]:
    """The items; Interrupted before the next one once `interrupted`, a collective, is true."""
    for item in items:
        if interrupted():
            raise Interrupted
        yield item


class StopRequest:
    """Context manager that turns SIGTERM, SIGINT and SIGUSR1 into a request to save and stop.

    A handler only sets a flag, so a signal never interrupts a collective or a save. Further signals change nothing
    (schedulers repeat SIGTERM; launchers pass one signal on in several ways), with one exception: a SIGINT more than
    SAME_PRESS_SECONDS after the first SIGINT raises KeyboardInterrupt, for the person who does not want to wait.
    Enter it in the main thread; at exit the former handlers are restored.

    Args:
        at_once: until this attribute is set to False the first signal raises Stopped: there is nothing to save yet.
    """

    def __init__(self, *, at_once: bool = False) -> None:
        self.at_once = at_once
        self._signal = 0
        self._first_sigint: float | None = None
        self._former: dict[signal.Signals, Any] = {}

    def agreed(self, all_reduce_max: Callable[[int], int]) -> str | None:
        """The signal that all ranks stop for, or None; the same on all ranks. A collective.

        Args:
            all_reduce_max: gives the largest of the ranks' integers, of this call or of the previous one. If ranks have
                received different signals, all take the largest number: SIGTERM before SIGUSR1 before SIGINT.
        """
        number = all_reduce_max(self._signal)
        return signal.Signals(number).name if number else None

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT:
            now = time.monotonic()
            if self._first_sigint is None:
                self._first_sigint = now
            elif now - self._first_sigint > SAME_PRESS_SECONDS:
                raise KeyboardInterrupt
        first, self._signal = not self._signal, self._signal or number
        if first and self.at_once:
            raise Stopped(number)

    def __enter__(self) -> StopRequest:
        for number in SIGNALS:
            self._former[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *exception: object) -> None:
        for number, former in self._former.items():
            signal.signal(number, signal.SIG_DFL if former is None else former)  # None: set by C code
