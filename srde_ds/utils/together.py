"""Work of all ranks, or of rank 0 for all of them, that succeeds on all or raises the same error on all."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future, wait
from dataclasses import dataclass
from typing import Any, Generic, NamedTuple, Protocol, TypeVar

from srde_ds.errors import SRDEError
from srde_ds.utils.files import io_reason, may_pass

SIGN_OF_LIFE_SECONDS = 1.0  # far below any collective_timeout

Result = TypeVar("Result")


class Ranks(Protocol):
    """This rank and those that it works with."""

    @property
    def rank(self) -> int:
        """Number of this rank, from 0."""
        ...

    @property
    def world_size(self) -> int:
        """Number of ranks."""
        ...

    def all_reduce_max(self, value: int, /) -> int:
        """The largest of the ranks' integers; a collective."""
        ...

    def gather(self, value: Any, /) -> list[Any]:
        """Every rank's value, by rank; a collective. Values are small and can be written as JSON."""
        ...


class Collectives(NamedTuple):
    """Ranks that are not those of torch.distributed, such as threads of one process."""

    rank: int
    world_size: int
    all_reduce_max: Callable[[int], int]
    gather: Callable[[Any], list[Any]]


class Failure(NamedTuple):
    """The one failure that is reported, the same on all ranks.

    Attributes:
        foreseen: True for bad input or a file that cannot be read or written; False for a bug.
        may_pass: see `SRDEError`.
    """

    rank: int
    reason: str
    foreseen: bool
    may_pass: bool


@dataclass(frozen=True)
class Outcome(Generic[Result]):
    """The outcome of some work.

    Attributes:
        own: this rank's result or error.
        failure: None if all ranks succeeded.
    """

    own: Future[Result]
    failure: Failure | None


def attempt(work: Callable[[], Result], ranks: Ranks, *, long: bool = False) -> Outcome[Result]:
    """Run `work` on every rank, and tell all ranks the outcome; a collective.

    Args:
        long: the work may take longer than the timeout of collectives. It runs in a thread and must not communicate;
            meanwhile the ranks exchange signs of life, so that only a lost one trips the timeout.
    """
    own: Future[Result] = Future()
    if long:
        # A daemon, so that the process can end although the work goes on.
        threading.Thread(target=_settle, args=(own, work), daemon=True).start()
        while ranks.all_reduce_max(int(not own.done())):
            try:
                wait([own], SIGN_OF_LIFE_SECONDS)
            except BaseException as raised:  # a signal's, which comes in the main thread
                own = Future()
                own.set_exception(raised)
    else:
        _settle(own, work)
    error = own.exception()
    reports = ranks.gather(None if error is None else _report(error))
    failures = [Failure(rank, *report) for rank, report in enumerate(reports) if report is not None]
    # A bug comes first: it may have made the others fail.
    return Outcome(own, min(failures, key=lambda failure: (failure.foreseen, failure.rank), default=None))


def _report(error: BaseException) -> tuple[str, bool, bool]:
    """The fields of a `Failure` but its rank."""
    if isinstance(error, OSError):
        return io_reason(error), True, may_pass(error)
    if isinstance(error, SRDEError):
        return str(error), True, error.may_pass
    return f"an unforeseen error, see its traceback ({type(error).__name__})", False, False


def _settle(own: Future[Result], work: Callable[[], Result]) -> None:
    try:
        own.set_result(work())
    except BaseException as raised:  # whatever has happened, no rank may wait for this one
        own.set_exception(raised)


def together(work: Callable[[], Result], ranks: Ranks, *, long: bool = False) -> Result:
    """The result of `work` on this rank, once it has returned on all ranks.

    Args:
        long: see `attempt`.

    Raises:
        SRDEError: on every rank, if it failed on any. A rank with an unforeseen error raises that error instead.
    """
    outcome = attempt(work, ranks, long=long)
    failure, error = outcome.failure, outcome.own.exception()
    if failure is None:
        return outcome.own.result()
    if error is not None and not isinstance(error, SRDEError | OSError):
        raise error
    if isinstance(error, SRDEError) and failure.rank == ranks.rank:
        raise error
    plain = failure.foreseen and failure.rank in (0, ranks.rank)
    reason = failure.reason if plain else f"rank {failure.rank}: {failure.reason}"
    raise SRDEError(reason, may_pass=failure.may_pass) from error


def on_main_rank(work: Callable[[], Result], ranks: Ranks, *, long: bool = False) -> Result:
    """Run `work` on rank 0; every rank gets its result after a trip through JSON (a tuple becomes a list).

    Arguments and errors are those of `together`.
    """

    def on_rank_0() -> Result | None:
        return work() if ranks.rank == 0 else None

    result: Result = ranks.gather(together(on_rank_0, ranks, long=long))[0]
    return result
