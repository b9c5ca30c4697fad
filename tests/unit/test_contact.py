"""Which rank is named when a run cannot go on, and how the ranks learn of it."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from srde_ds.liveness import contact
from srde_ds.liveness.contact import Contact, _Hub, _Link
from srde_ds.liveness.status import Report, Reporter, doing
from srde_ds.liveness.verdict import Peer, Verdict, judge


def report(rank: int, **changes: object) -> Report:
    values = {"host": f"node{rank}", "pid": 100 + rank, "step": 7, "activity": "forward of micro-step 2"}
    values |= {"activity_seconds": 3.0, "place": "x.py:1 f", "collectives": 40, "idle_seconds": 0.0}
    return Report(rank, **(values | changes))  # type: ignore[arg-type]


def said(peers: dict[int, Peer], *, waited: float = 500, timeout: float = 100, world_size: int = 3) -> str:
    verdict = judge(peers, world_size, waited=waited, timeout=timeout, start_timeout=30)
    return verdict.text if verdict else ""


def well() -> dict[int, Peer]:
    return {rank: Peer(report(rank), 1.0) for rank in range(3)}


def test_a_run_that_is_well_gets_no_verdict() -> None:
    assert not said(well())
    # Long computing on all ranks alike, and a rank that ended in good order.
    assert not said({rank: Peer(report(rank, idle_seconds=9999.0), 1.0) for rank in range(3)})
    assert not said(well() | {2: Peer(report(2), 9999.0, connected=False, error="")})


def test_ranks_that_never_came() -> None:
    peers = {0: well()[0]}
    assert not said(peers, waited=29)
    text = said(peers, waited=31)
    assert "ranks 1, 2 did not start within 30 s" in text and "node0" in text


@pytest.mark.parametrize(
    ("peer", "text"),
    [
        (Peer(report(2), 0.0, connected=False), "rank 2 (host node2, process 102) ended without a word"),
        (Peer(report(2), 61.0), "no sign of life from rank 2 (host node2, process 102) for 61 s"),
        (Peer(report(2), 11.0, connected=False, error="ValueError: no"), "process 102) failed: ValueError: no"),
    ],
)
def test_a_lost_rank_is_named_with_what_it_did(peer: Peer, text: str) -> None:
    found = said(well() | {2: peer})
    assert text in found
    assert peer.error or "step 7, forward of micro-step 2, for 3 s, in x.py:1 f" in found


def test_an_error_that_all_raise_has_a_moment_to_be_raised_by_all() -> None:
    assert not said(well() | {2: Peer(report(2), 9.0, connected=False, error="ValueError: no")})


def test_a_short_timeout_bounds_silence_too() -> None:
    assert "no sign of life" in said(well() | {2: Peer(report(2), 21.0)}, timeout=20)


def test_late_ranks_are_those_with_fewer_collectives() -> None:
    waiting = Peer(report(0, collectives=41, idle_seconds=101.0), 1.0)
    late = Peer(report(1, activity="reading rows", activity_seconds=130.0), 1.0)
    assert not said({0: Peer(report(0, collectives=41, idle_seconds=90.0), 1.0), 1: late}, world_size=2)
    text = said({0: waiting, 1: late}, world_size=2)
    assert text.startswith("rank 1 did not arrive at a collective in which the others have waited 102 s")
    assert "step 7, reading rows, for 130 s" in text


@pytest.fixture
def verdicts(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[int, Verdict]]:
    """What ended which process, here instead of ending it."""
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setattr(contact, "REPORT_SECONDS", 0.05)
    monkeypatch.setattr(contact, "_TICK_SECONDS", 0.05)
    found: dict[int, Verdict] = {}

    def end(self: Contact, verdict: Verdict, *, say: bool) -> None:
        if not self._ending.is_set():
            found[0 if isinstance(self, _Hub) else self._reporter.rank] = verdict  # type: ignore[attr-defined]
            self._ending.set()

    monkeypatch.setattr(Contact, "_end", end)
    yield found


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_verdict_reaches_all_ranks(verdicts: dict[int, Verdict]) -> None:
    hub = _Hub(3, 100, 100, "token")
    links = [_Link(rank, "127.0.0.1", hub.port, "token", 100) for rank in (1, 2)]
    waiting = threading.Thread(target=links[1].wait_for_main)
    waiting.start()
    until(lambda: len(hub._peers) == 3)
    assert waiting.is_alive()
    hub.release_others()
    waiting.join(10)
    assert not waiting.is_alive() and not verdicts
    links[0]._connection.shutdown(socket.SHUT_RDWR)  # as the kernel does when the process is killed
    until(lambda: {0, 2} <= verdicts.keys())
    assert verdicts[0] == verdicts[2] and verdicts[0].rank == 1
    assert verdicts[1].rank == 0  # so it looks from there
    for each in (*links, hub):
        each.leave("")


def test_rank_0_is_missed_too_unless_it_said_goodbye(verdicts: dict[int, Verdict]) -> None:
    for goodbye in (True, False):
        hub = _Hub(2, 100, 100, "token")
        link = _Link(1, "127.0.0.1", hub.port, "token", 100)
        until(lambda: 1 in hub._peers and link._main is not None)  # noqa: B023
        if goodbye:
            hub.leave("")
            until(link._ending.is_set)
            assert not verdicts
        else:
            for connection in list(hub._rank_of):
                connection.shutdown(socket.SHUT_RDWR)
            until(lambda: 1 in verdicts)
            assert "rank 0 (host" in verdicts[1].text and "ended without a word" in verdicts[1].text
            hub.leave("")
        link.leave("")


def test_an_error_is_passed_on_after_the_grace(verdicts: dict[int, Verdict], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("srde_ds.liveness.verdict.GRACE_SECONDS", 0.1)
    hub = _Hub(2, 100, 100, "token")
    link = _Link(1, "127.0.0.1", hub.port, "token", 100)
    until(lambda: 1 in hub._peers)
    link.leave("ValueError: no")
    until(lambda: 0 in verdicts)
    assert verdicts[0].rank == 1 and "failed: ValueError: no" in verdicts[0].text
    hub.leave("")


def test_strangers_change_nothing(verdicts: dict[int, Verdict]) -> None:
    hub = _Hub(2, 100, 100, "token")
    message = json.dumps({"token": "wrong", **report(1).__dict__}).encode() + b"\n"
    for sent in (b"GET / HTTP/1.0\r\n\r\n", b"\xff\n", b"[]\n", b"{}\n", message, b"x" * (1 << 17)):
        with socket.create_connection(("127.0.0.1", hub.port), timeout=10) as stranger:
            try:
                stranger.sendall(sent)
                assert stranger.recv(10) == b""  # it hangs up
            except ConnectionError:
                pass
    assert set(hub._peers) == {0} and hub._thread.is_alive() and not verdicts
    hub.leave("")


def test_a_report_says_what_the_process_does() -> None:
    doing("reading rows", step=3)
    found = Reporter(2).report()
    assert (found.rank, found.step, found.activity, found.pid) == (2, 3, "reading rows", os.getpid())
    assert found.doing.startswith("step 3, reading rows, for 0 s, in ") and found.place


CHILD = """
import sys, time
from srde_ds.liveness.launcher_watch import LauncherWatch
watch = LauncherWatch()
print("ready", len(watch._watched), flush=True)
time.sleep(60)
"""
# Stands for a launcher, by its name, and for the shell between.
LAUNCHER = "import subprocess, sys; subprocess.run(['bash', '-c', sys.argv[1] + ' -c \"$CHILD\"; true', 'x'])"


def test_a_rank_ends_with_its_launcher(tmp_path: Path) -> None:
    script = tmp_path / "deepspeed"
    script.write_text(LAUNCHER)
    environment = os.environ | {"CHILD": CHILD}
    command = [sys.executable, str(script), sys.executable]
    with subprocess.Popen(command, stdout=subprocess.PIPE, env=environment, text=True) as launcher:
        assert launcher.stdout is not None and launcher.stdout.readline() == "ready 1\n"
        began = time.monotonic()
        launcher.send_signal(signal.SIGKILL)
        assert launcher.stdout.read() == ""  # until the rank has ended
    assert time.monotonic() - began < 20
