"""Work on several ranks, which are threads here: it succeeds on all, or the same error is raised on all."""

from __future__ import annotations

import errno
import threading
import time
from collections.abc import Callable
from concurrent import futures
from typing import Any

import pytest

from srde_ds.errors import SRDEError
from srde_ds.training.run import Observer, Run, observed
from srde_ds.utils import together as module
from srde_ds.utils.together import Collectives, on_main_rank, together
from tests.checkpoint_helpers import on_ranks


def outcomes(work: Callable[[int], Any], *, long: bool) -> list[str]:
    def of_rank(ranks: Collectives) -> Any:
        return together(lambda: work(ranks.rank), ranks, long=long)

    results = on_ranks(3, of_rank)
    return [f"{type(found).__name__}: {found}" if isinstance(found, Exception) else found for found in results]


def failing(errors: dict[int, Exception]) -> Callable[[int], str]:
    def work(rank: int) -> str:
        if rank in errors:
            raise errors[rank]
        return f"done {rank}"

    return work


@pytest.mark.parametrize("long", [False, True])
@pytest.mark.parametrize(
    ("errors", "expected"),
    [
        ({}, ["done 0", "done 1", "done 2"]),
        ({0: SRDEError("x=1: no.")}, ["SRDEError: x=1: no."] * 3),
        ({1: SRDEError("no.")}, ["SRDEError: rank 1: no.", "SRDEError: no.", "SRDEError: rank 1: no."]),
        ({1: SRDEError("b"), 2: SRDEError("c")}, ["SRDEError: rank 1: b", "SRDEError: b", "SRDEError: rank 1: b"]),
        ({0: OSError(28, "No space left on device", "/a")}, ["SRDEError: No space left on device (/a)"] * 3),
        ({0: TimeoutError()}, ["SRDEError: TimeoutError"] * 3),
        (
            {0: SRDEError("no."), 2: KeyError("k")},  # the bug may be what made the other fail
            ["SRDEError: rank 2: an unforeseen error, see its traceback (KeyError)"] * 2 + ["KeyError: 'k'"],
        ),
    ],
)
def test_all_ranks_fail_together(errors: dict[int, Exception], expected: list[str], long: bool) -> None:
    assert outcomes(failing(errors), long=long) == expected


@pytest.mark.parametrize(("number", "passing"), [(errno.ENOSPC, False), (errno.EROFS, False), (errno.ESTALE, True)])
def test_all_ranks_know_whether_another_start_may_help(number: int, passing: bool) -> None:
    error = OSError(number, "no")
    found = on_ranks(2, lambda ranks: together(lambda: failing({1: error})(ranks.rank), ranks))
    assert [one.may_pass for one in found] == [passing] * 2


def test_the_others_meet_while_one_works(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SIGN_OF_LIFE_SECONDS", 0.05)
    meetings: list[int] = []

    def work(ranks: Collectives) -> str:
        def all_reduce_max(value: int) -> int:
            meetings.append(ranks.rank)
            return ranks.all_reduce_max(value)

        watched = ranks._replace(all_reduce_max=all_reduce_max)

        def slow_on_rank_0() -> str:
            time.sleep(0.5 if ranks.rank == 0 else 0)
            return "done"

        return together(slow_on_rank_0, watched, long=True)

    assert on_ranks(2, work) == ["done"] * 2
    assert meetings.count(1) > 3


def test_a_signal_ends_long_work_at_once_and_the_others_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SIGN_OF_LIFE_SECONDS", 0.05)
    ended = threading.Event()

    def wait(own: Any, seconds: float) -> Any:
        if threading.current_thread().name == "rank 0":
            raise KeyboardInterrupt
        return futures.wait(own, seconds)

    monkeypatch.setattr(module, "wait", wait)

    def work(ranks: Collectives) -> Any:
        if ranks.rank == 0:
            threading.current_thread().name = "rank 0"
        try:
            return together(lambda: ended.wait(600) if ranks.rank == 0 else None, ranks, long=True)
        except KeyboardInterrupt:
            return "interrupted"

    started = time.monotonic()
    own, other = on_ranks(2, work)
    assert own == "interrupted" and "rank 0: an unforeseen error, see its traceback (KeyboardInterrupt)" in str(other)
    assert time.monotonic() - started < 200
    ended.set()


def test_rank_0_works_for_all() -> None:
    worked: list[int] = []

    def work(ranks: Collectives) -> Any:
        def read() -> dict[str, list[int]]:
            worked.append(ranks.rank)
            return {"steps": [3]}

        return on_main_rank(read, ranks)

    assert on_ranks(3, work) == [{"steps": [3]}] * 3
    assert worked == [0]
    results = on_ranks(2, lambda ranks: on_main_rank(lambda: failing({0: SRDEError("no.")})(0), ranks))
    assert [str(result) for result in results] == ["no."] * 2


class Noting(Observer):
    def __init__(self, name: str, notes: list[str], *, fails: bool = False) -> None:
        self.name, self.notes, self.fails = name, notes, fails

    def on_start(self, run: Run) -> None:
        self.notes.append(f"{self.name} starts")
        if self.fails:
            raise SRDEError("no.")

    def on_end(self, run: Run, error: BaseException | None) -> None:
        self.notes.append(f"{self.name} ends, {error}")


def test_observers_end_in_reverse_and_learn_of_the_error() -> None:
    notes: list[str] = []
    run: Any = None
    with observed(run, [Noting("a", notes), Noting("b", notes)]):
        notes.append("loop")
    assert notes == ["a starts", "b starts", "loop", "b ends, None", "a ends, None"]
    notes.clear()
    with pytest.raises(SRDEError), observed(run, [Noting("a", notes), Noting("b", notes)]):
        raise SRDEError("no.")
    assert notes[2:] == ["b ends, no.", "a ends, no."]
    notes.clear()
    with pytest.raises(SRDEError), observed(run, [Noting("a", notes), Noting("b", notes, fails=True)]):
        pass
    assert notes == ["a starts", "b starts", "a ends, no."]
