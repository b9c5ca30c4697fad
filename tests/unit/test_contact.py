"""Which rank is named when a run cannot go on, and how the ranks learn of it."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest

from srde_ds.errors import LostContact, SRDEError
from srde_ds.liveness import contact
from srde_ds.liveness.contact import Contact, Hub, Link
from srde_ds.liveness.handshake import SecretFile, proof, run_id
from srde_ds.liveness.messages import LONGEST_MESSAGE, Lines
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
            found[0 if isinstance(self, Hub) else self._reporter.rank] = verdict  # type: ignore[attr-defined]
            self._ending.set()

    monkeypatch.setattr(Contact, "_end", end)
    yield found


def link_to(hub: Hub, rank: int, secret: str = "secret") -> Link:
    return Link(rank, socket.create_connection(("127.0.0.1", hub.port), timeout=10), secret, 100)


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_verdict_reaches_all_ranks(verdicts: dict[int, Verdict]) -> None:
    hub = Hub(3, 100, 100, "secret")
    links = [link_to(hub, rank) for rank in (1, 2)]
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
        hub = Hub(2, 100, 100, "secret")
        link = link_to(hub, 1)
        until(lambda: 1 in hub._peers and link._main is not None)  # noqa: B023
        if goodbye:
            hub.leave("")
            until(link._ending.is_set)
            assert not verdicts
        else:
            for connection in hub._ranks():
                connection.shutdown(socket.SHUT_RDWR)
            until(lambda: 1 in verdicts)
            assert "rank 0 (host" in verdicts[1].text and "ended without a word" in verdicts[1].text
            hub.leave("")
        link.leave("")


def test_ranks_that_were_all_stopped_for_long_are_not_missed(
    verdicts: dict[int, Verdict], monkeypatch: pytest.MonkeyPatch
) -> None:
    stopped, clock = [0.0], time.monotonic
    monkeypatch.setattr(contact, "time", SimpleNamespace(monotonic=lambda: clock() + stopped[0], sleep=time.sleep))
    hub = Hub(2, 100, 100, "secret")
    link = link_to(hub, 1)
    until(lambda: len(hub._peers) == 2 and link._main is not None)
    for _ in range(3):
        stopped[0] += 5000
        time.sleep(0.3)
        assert not verdicts
    monkeypatch.setattr(contact, "_FROZEN_SECONDS", 1e9)  # a watch that ran all the time
    stopped[0] += 5000
    until(lambda: bool(verdicts))
    for each in (link, hub):
        each.leave("")


def test_an_error_is_passed_on_after_the_grace(verdicts: dict[int, Verdict], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("srde_ds.liveness.verdict.GRACE_SECONDS", 0.1)
    hub = Hub(2, 100, 100, "secret")
    link = link_to(hub, 1)
    until(lambda: 1 in hub._peers)
    link.leave("ValueError: no")
    until(lambda: 0 in verdicts)
    assert verdicts[0].rank == 1 and "failed: ValueError: no" in verdicts[0].text
    hub.leave("")


def connected(hub: Hub) -> socket.socket:
    return socket.create_connection(("127.0.0.1", hub.port), timeout=10)


def rest_of(stranger: socket.socket) -> bytes:
    """What still comes until the hub hangs up."""
    received = b""
    try:
        while more := stranger.recv(1 << 16):
            received += more
    except ConnectionError:
        pass
    return received


HELLO = {"rank": 1, "proof": "0" * 64, "challenge": "x"}


@pytest.mark.parametrize(
    "sent",
    [
        b"GET / HTTP/1.0\r\n\r\n",
        b"\xff\n",
        b"[]\n",
        b"{}\n",
        b"[" * (LONGEST_MESSAGE - 10) + b"\n",
        b'{"a":' * 3000 + b"\n",
        b'{"rank": [[1]], "proof": "", "challenge": ""}\n',
        b'{"rank": ' + b"9" * 5000 + b', "proof": "", "challenge": ""}\n',
        b"x" * (8 * LONGEST_MESSAGE),
        json.dumps(HELLO).encode() + b"\n",
        json.dumps(HELLO | {"rank": 0}).encode() + b"\n",
        json.dumps(HELLO | {"rank": "1"}).encode() + b"\n",
        json.dumps(HELLO | {"proof": {"a": 1}}).encode() + b"\n",
        json.dumps(report(1).__dict__ | {"token": "secret"}).encode() + b"\n",
    ],
    ids=lambda sent: repr(sent[:24]),
)
def test_strangers_change_nothing(verdicts: dict[int, Verdict], sent: bytes) -> None:
    hub = Hub(3, 100, 100, "secret")
    link = link_to(hub, 2)
    with connected(hub) as stranger:
        with contextlib.suppress(ConnectionError):
            stranger.sendall(sent)
        assert b"proof" not in rest_of(stranger)  # it hangs up
    until(lambda: set(hub._peers) == {0, 2})
    assert hub._thread.is_alive() and link._thread.is_alive() and not verdicts
    link.leave("")
    hub.leave("")


def test_a_proof_is_good_for_one_connection_and_one_rank(verdicts: dict[int, Verdict]) -> None:
    hub = Hub(3, 100, 100, "secret")
    with connected(hub) as one, connected(hub) as other:
        asked = [str(Lines().next(connection)["challenge"]) for connection in (one, other)]
        good = proof("secret", asked[0], 1, "rank")
        for connection, changes in ((other, {}), (one, {"rank": 2})):
            connection.sendall(json.dumps(HELLO | {"proof": good} | changes).encode() + b"\n")
            assert rest_of(connection) == b""
    with pytest.raises((LostContact, OSError)):
        link_to(hub, 1, "another secret")
    link = link_to(hub, 1)
    until(lambda: 1 in hub._peers)
    link.leave("")
    hub.leave("")


def test_a_rank_does_not_trust_what_cannot_prove_itself() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:

        def answer() -> None:
            connection, _ = server.accept()
            with connection:
                connection.sendall(b'{"challenge": "x"}\n')
                connection.recv(1 << 12)
                connection.sendall(json.dumps({"proof": "0" * 64}).encode() + b"\n")

        threading.Thread(target=answer, daemon=True).start()
        with pytest.raises(LostContact, match="not rank 0 of this run"):
            Link(1, socket.create_connection(server.getsockname(), timeout=10), "secret", 100)


def test_a_rank_comes_once_and_the_port_closes_when_all_have_come(verdicts: dict[int, Verdict]) -> None:
    came = threading.Event()
    hub = Hub(3, 100, 100, "secret", all_have_come=came.set)
    first = link_to(hub, 1)
    with pytest.raises(LostContact, match="rank 1 is already there: another run with the same folder uses the port"):
        link_to(hub, 1)
    assert not came.is_set()
    second = link_to(hub, 2)
    until(came.is_set)
    until(lambda: hub._listener is None)
    with pytest.raises(ConnectionRefusedError):
        connected(hub)
    until(lambda: len(hub._peers) == 3)
    assert not verdicts
    for each in (first, second, hub):
        each.leave("")


def test_a_rank_speaks_for_itself_alone(verdicts: dict[int, Verdict]) -> None:
    hub = Hub(3, 100, 100, "secret")
    link = link_to(hub, 1)
    until(lambda: 1 in hub._peers)
    link._connection.sendall(json.dumps(report(2).__dict__).encode() + b"\n")
    until(lambda: 0 in verdicts)
    assert verdicts[0].rank == 1 and 2 not in hub._peers
    hub.leave("")
    link.leave("")


@contextmanager
def stalled(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Hold the hub's thread, so that it finds all that comes meanwhile at once, in the order in which it came."""
    held, go, own = threading.Event(), threading.Event(), hub._reporter.report

    def wait() -> Report:
        held.set()
        assert go.wait(10)
        return own()

    monkeypatch.setattr(hub._reporter, "report", wait)
    assert held.wait(10)
    yield
    go.set()


def test_a_stranger_that_is_turned_away_while_it_speaks(
    verdicts: dict[int, Verdict], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(contact, "_MOST_STRANGERS", 2)
    hub = Hub(2, 100, 100, "secret")
    with connected(hub) as first, connected(hub) as second:
        for stranger in (first, second):
            assert Lines().next(stranger)["challenge"]
        with stalled(hub, monkeypatch):
            third = connected(hub)
            first.sendall(b"x")
        with third:
            link = link_to(hub, 1)
    until(lambda: 1 in hub._peers)
    assert hub._thread.is_alive() and not verdicts
    link.leave("")
    hub.leave("")


def test_a_stranger_that_comes_with_the_last_rank(
    verdicts: dict[int, Verdict], monkeypatch: pytest.MonkeyPatch
) -> None:
    hub = Hub(2, 100, 100, "secret")
    with connected(hub) as rank:
        asked = str(Lines().next(rank)["challenge"])
        with stalled(hub, monkeypatch):
            rank.sendall(json.dumps(HELLO | {"proof": proof("secret", asked, 1, "rank")}).encode() + b"\n")
            stranger = connected(hub)
        with stranger:
            assert "proof" in Lines().next(rank)
            rank.sendall(json.dumps(report(1).__dict__).encode() + b"\n")
            until(lambda: 1 in hub._peers)
        assert hub._thread.is_alive() and hub._listener is None and not verdicts
        hub.leave("")


FEW_DESCRIPTORS = """
import os, resource, sys
from srde_ds.liveness import contact
contact._MOST_STRANGERS = int(sys.argv[1])
if int(sys.argv[2]):
    resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/proc/self/fd")) + int(sys.argv[2]),) * 2)
hub = contact.Hub(2, 100, 100, "secret")
print(hub.port, flush=True)
while 1 not in hub._peers:
    hub._ending.wait(0.05)
print("rank 1 came beside", len(hub._visitors) - 1, flush=True)
"""


@pytest.mark.parametrize(("most", "descriptors"), [(20, 0), (256, 40)])
def test_a_rank_comes_through_a_crowd(most: int, descriptors: int) -> None:
    command = [sys.executable, "-c", FEW_DESCRIPTORS, str(most), str(descriptors)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process, contextlib.ExitStack() as crowd:
        assert process.stdout is not None
        port = int(process.stdout.readline())
        for _ in range(100):
            crowd.enter_context(socket.create_connection(("127.0.0.1", port), timeout=10))
        link = Link(1, socket.create_connection(("127.0.0.1", port), timeout=10), "secret", 100)
        text, _, strangers = process.stdout.readline().rpartition(" ")
        assert text == "rank 1 came beside" and int(strangers) <= min(most, descriptors or most)
        link.leave("")


def test_the_secret_lies_beside_the_output_folder_for_the_user_alone(tmp_path: Path) -> None:
    run = tmp_path / "runs" / "a"
    written, read = (SecretFile(str(run), run_id(str(run), 2)) for _ in range(2))
    assert read.read() is None
    secret = written.create()
    [path] = tmp_path.iterdir()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600 and path.read_text() == secret == read.read()
    run.mkdir(parents=True)
    assert read.read() == secret  # also when the folder has come to be meanwhile
    assert SecretFile(str(run), run_id(str(run), 4)).read() is None
    assert SecretFile(str(tmp_path / "runs"), run_id(str(tmp_path / "runs"), 2)).read() is None
    written.remove()
    assert read.read() is None and list(tmp_path.iterdir()) == [tmp_path / "runs"]
    with pytest.raises(SRDEError, match=r"output_dir=/proc/nothing/run: '/proc' cannot be written"):
        SecretFile("/proc/nothing/run", "x").create()


def test_a_secret_that_a_killed_run_left_is_replaced(tmp_path: Path) -> None:
    files = [SecretFile(str(tmp_path), "x") for _ in range(2)]
    secrets = [file.create() for file in files]
    assert secrets[0] != secrets[1] == files[0].read()
    assert len(list(tmp_path.iterdir())) == 1


def test_runs_are_told_apart() -> None:
    assert len({run_id("a", 2), run_id("b", 2), run_id("a", 4)}) == 3


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
time.sleep(600)
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
    assert time.monotonic() - began < 200
