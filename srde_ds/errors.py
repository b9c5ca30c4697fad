"""The one exception that a user's mistake raises: printed as one line, without a traceback."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class SRDEError(Exception):
    """Bad input. The message names the field, the value and the remedy."""


class LostContact(Exception):
    """Another rank cannot be reached. Printed as one line, too, but starting again may help."""


def io_reason(error: OSError) -> str:
    """What went wrong with which file."""
    return f"{error.strerror or error}" + (f" ({error.filename})" if error.filename else "")


def nearest(name: str, known: Iterable[str]) -> str:
    """`" Did you mean 'x'?"` for the closest known name, or an empty string."""
    matches = difflib.get_close_matches(name, list(known), n=1)
    return f" Did you mean '{matches[0]}'?" if matches else ""
