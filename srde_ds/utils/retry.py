"""Retries a source after failures that may pass."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import TypeVar

from datasets.exceptions import DatasetsError
from huggingface_hub.errors import HfHubHTTPError

log = logging.getLogger(__name__)

WAITS = (1.0, 4.0, 16.0)
"""seconds before each retry; the Hub's client already retries single requests"""
LONGEST_WAIT = 300.0

# The client's base class of HTTP errors, whose name differs between releases of huggingface_hub.
_HTTP_ERROR: type[Exception] = HfHubHTTPError.__bases__[0]
LOADING_ERRORS = (OSError, ValueError, KeyError, TypeError, RuntimeError, DatasetsError, _HTTP_ERROR)
"""Exceptions of reading a dataset that is gone, gated, unreachable or changed"""

T = TypeVar("T")


class SourceError(Exception):
    """A source cannot be used; the message says why in one line."""


def with_retries(load: Callable[[], T], name: str) -> T:
    """`load()`, retried if waiting may help: no connection, a server error, a rate limit.

    Raises:
        SourceError: it has failed for good.
    """
    for tries, wait in enumerate((*WAITS, None), 1):
        try:
            return load()
        except LOADING_ERRORS as error:
            reason = " ".join(str(error).split())[:300].rstrip(".") or type(error).__name__
            if wait is None or not _passes(error):
                after = f" after {tries} tries" if tries > 1 else ""
                raise SourceError(f"{type(error).__name__}{after}: {reason}") from error
            wait = min(max(wait, _asked_to_wait(error)), LONGEST_WAIT)
            log.warning("source %s: %s; trying again in %g s", name, reason, wait)
            time.sleep(wait)
    raise AssertionError("the last try returns or raises")


def _chain(error: BaseException | None) -> list[BaseException]:
    """The error and its causes."""
    found: list[BaseException] = []
    while error is not None and error not in found:
        found.append(error)
        error = error.__cause__ or error.__context__
    return found


def _passes(error: BaseException) -> bool:
    chain = _chain(error)
    answers = [e.response.status_code for e in chain if isinstance(e, HfHubHTTPError) and e.response is not None]
    if answers:
        return any(status in (408, 429) or status >= 500 for status in answers)
    return any(
        isinstance(e, ConnectionError | TimeoutError) or (isinstance(e, _HTTP_ERROR) and not isinstance(e, OSError))
        for e in chain
    )


def _asked_to_wait(error: BaseException) -> float:
    """Seconds of the server's Retry-After."""
    for e in _chain(error):
        if isinstance(e, HfHubHTTPError) and e.response is not None:
            value = e.response.headers.get("retry-after", "")
            if value.isdigit():
                return float(value)
    return 0.0
