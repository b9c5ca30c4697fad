"""The exceptions that are printed as one line, without a traceback."""

from __future__ import annotations

import difflib
import signal
from collections.abc import Iterable, Sequence


class SRDEError(Exception):
    """Bad input, or storage that fails. The message names the field, the value and the remedy.

    Attributes:
        message: one line.
        details: further lines, such as each of many faults.
        may_pass: whether another start may succeed, as after a failure of storage that was out of reach.
    """

    def __init__(self, message: str = "", *, details: Sequence[str] = (), may_pass: bool = False) -> None:
        super().__init__("\n  ".join([message, *details]))
        self.message, self.details = message, tuple(details)
        self.may_pass = may_pass


class LostContact(Exception):
    """Another rank cannot be reached. This is also printed as one line, but starting again may help."""


class Stopped(KeyboardInterrupt):
    """A signal has ended the work before there was anything to save.

    Attributes:
        number: the signal's number.
    """

    def __init__(self, number: int) -> None:
        super().__init__(f"stopped by {signal.Signals(number).name}")
        self.number = number


def nearest(name: str, known: Iterable[str]) -> str:
    """`" Did you mean 'x'?"` for the closest known name, or an empty string."""
    matches = difflib.get_close_matches(name, list(known), n=1)
    return f" Did you mean '{matches[0]}'?" if matches else ""
