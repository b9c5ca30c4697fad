"""Keeps the ranks in touch outside of torch.distributed, so that a lost rank soon ends the run and is named.

Every rank holds a connection to rank 0 and reports over it. If a connection ends, a rank falls silent, or a rank is
late for a collective, rank 0 reaches a verdict, which is printed and ends all ranks. Torch itself would wait for its
timeout, would end without a Python exception under NCCL, and would not name the rank.

The connections are made while the ranks gather, see `meeting.py` and `handshake.py`: each rank proves that it knows the
run's secret, and once all have come rank 0 closes its port. Connections carry only data of bounded size, see
`messages.py`. An error on a connection ends that connection, and the run only if it is a rank's.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import selectors
import socket
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

from torch._C._distributed_c10d import TCPStore

from srde_ds.liveness.handshake import challenge, introduce, proof, proves
from srde_ds.liveness.messages import Lines, send
from srde_ds.liveness.status import Report, Reporter
from srde_ds.liveness.verdict import GRACE_SECONDS, SILENT_SECONDS, Peer, Verdict, judge
from srde_ds.utils.escape import one_line

logger = logging.getLogger(__name__)

REPORT_SECONDS = 2.0
_TICK_SECONDS = 0.5
_FROZEN_SECONDS = 5.0
"""A watch that has not run for so long was stopped itself, as by `PreemptMode=SUSPEND` of Slurm or `docker pause`. The
other ranks probably were too, so they have as long as ever to be heard again."""
# How many connections are kept that have not yet proved to be a rank's, and for how long.
_MOST_STRANGERS = 256
_HANDSHAKE_SECONDS = 30.0
_LATECOMER_SECONDS = 5.0


class Contact:
    """This rank's side of the contact. A rank without others has nothing to do.

    Attributes:
        on_verdict: is called once with the verdict before the process ends.
        store: torch's store, kept until the process group also holds it.
    """

    store: TCPStore | None = None

    def __init__(self) -> None:
        self.on_verdict: Callable[[Verdict], None] = lambda verdict: None
        self.others_may_go = threading.Event()
        self._ending = threading.Event()
        self._thread = threading.Thread(target=self._run_safely, name="contact", daemon=True)

    def release_others(self) -> None:
        """On rank 0: let the other ranks continue, which wait for its preparations."""
        self.others_may_go.set()

    def wait_for_main(self) -> None:
        """On the other ranks: wait until rank 0 has called `release_others`."""

    def leave(self, error: str) -> None:
        """End the contact. If `error` is not empty, the others end as well."""

    def _run(self) -> None:
        raise NotImplementedError

    def _run_safely(self) -> None:
        try:
            self._run()
        except Exception:  # training must not depend on this thread
            logger.exception("The contact between the ranks has ended; a lost rank now only trips collective_timeout.")

    def _end(self, verdict: Verdict, *, say: bool) -> None:
        """Act on a verdict. The main thread may be in a collective that never ends, so this thread ends the process."""
        if self._ending.is_set():
            return
        with contextlib.suppress(Exception):  # the process must end whatever happens here
            self.on_verdict(verdict)
        if say:
            print(f"srde-ds: error: {one_line(verdict.text)}", file=sys.stderr)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(1)


@dataclass
class _Visitor:
    """What rank 0 knows about a connection.

    Attributes:
        challenge: what the other side has to answer to prove itself.
        rank: None until it has done so.
    """

    challenge: str
    lines: Lines = field(default_factory=Lines)
    came: float = field(default_factory=time.monotonic)
    rank: int | None = None


class Hub(Contact):
    """Rank 0's side, which hears all ranks and judges.

    Args:
        secret: the run's secret, see `handshake.py`.
        address: address to listen at; "": all addresses of this host.
        all_have_come: is called when the last rank has come, or if the contact ends earlier.
    """

    def __init__(
        self,
        world_size: int,
        timeout: float,
        start_timeout: float,
        secret: str,
        *,
        address: str = "127.0.0.1",
        all_have_come: Callable[[], None] = lambda: None,
    ) -> None:
        super().__init__()
        self.world_size, self.timeout, self.start_timeout = world_size, timeout, start_timeout
        self._secret, self._all_have_come = secret, all_have_come
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        self._listener: socket.socket | None = socket.create_server((address, 0), family=family, backlog=1024)
        self.address, self.port = address, int(self._listener.getsockname()[1])
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._listener, selectors.EVENT_READ)
        self._visitors: dict[socket.socket, _Visitor] = {}
        self._came: set[int] = set()
        self._peers: dict[int, Peer] = {}
        self._heard: dict[int, float] = {}
        self._began = time.monotonic()
        self._reporter = Reporter(0)
        self._thread.start()

    def leave(self, error: str) -> None:
        """See `Contact`. Tells all ranks, with the reason if the run failed."""
        deadline = time.monotonic() + _LATECOMER_SECONDS
        while error and len(self._peers) < self.world_size and time.monotonic() < deadline:
            time.sleep(_TICK_SECONDS)  # a rank that comes later would find nobody, and could only report that
        self._ending.set()
        self._thread.join(5 * _TICK_SECONDS)
        for connection in self._ranks():
            with contextlib.suppress(OSError):
                send(connection, {"bye": error, **asdict(self._reporter.report())})
        for connection in list(self._visitors):
            connection.close()
        self._stop_listening()
        self._selector.close()

    def _ranks(self) -> list[socket.socket]:
        return [connection for connection, visitor in self._visitors.items() if visitor.rank is not None]

    def _stop_listening(self) -> None:
        if self._listener is None:
            return
        self._selector.unregister(self._listener)
        self._listener.close()
        self._listener = None
        self._all_have_come()

    def _run(self) -> None:
        looked = time.monotonic()
        while not self._ending.is_set():
            for key, _ in self._selector.select(_TICK_SECONDS):
                if key.fileobj is self._listener:
                    self._accept()
                else:
                    assert isinstance(key.fileobj, socket.socket)
                    self._read(key.fileobj)
            for connection, visitor in list(self._visitors.items()):
                if visitor.rank is None and time.monotonic() - visitor.came > _HANDSHAKE_SECONDS:
                    self._drop(connection)
            self._hear(0, self._reporter.report())
            now = time.monotonic()
            if (frozen := now - looked) > _FROZEN_SECONDS:
                self._began += frozen
                self._heard = {rank: min(heard + frozen, now) for rank, heard in self._heard.items()}
            looked = now
            peers = {
                rank: Peer(peer.report, now - self._heard[rank], peer.connected, peer.error)
                for rank, peer in self._peers.items()
            }
            waited = now - self._began
            verdict = judge(
                peers, self.world_size, waited=waited, timeout=self.timeout, start_timeout=self.start_timeout
            )
            if verdict:
                self._tell(verdict)
                self._end(verdict, say=True)

    def _accept(self) -> None:
        assert self._listener is not None
        strangers = [connection for connection, visitor in self._visitors.items() if visitor.rank is None]
        if len(strangers) >= _MOST_STRANGERS:
            self._drop(strangers[0])  # the oldest: a rank proves itself within milliseconds
        try:
            connection, _ = self._listener.accept()
        except OSError as error:  # it is already gone, or this process has no descriptor left
            if error.errno in (errno.EMFILE, errno.ENFILE):
                if strangers:
                    self._drop(strangers[0])
                else:
                    self._ending.wait(_TICK_SECONDS)
            return
        connection.settimeout(_TICK_SECONDS)
        visitor = self._visitors[connection] = _Visitor(challenge())
        self._selector.register(connection, selectors.EVENT_READ)
        try:
            send(connection, {"challenge": visitor.challenge})
        except OSError:
            self._drop(connection)

    def _read(self, connection: socket.socket) -> None:
        visitor = self._visitors.get(connection)
        if visitor is None:  # closed since the selector found it readable; it may also be the listener
            return
        try:
            for message in visitor.lines.read(connection):
                if visitor.rank is None:
                    self._admit(connection, visitor, message)
                else:
                    self._take(connection, visitor.rank, message)
        except (OSError, ValueError, KeyError, TypeError):  # it ended, or is not ours
            self._drop(connection)

    def _admit(self, connection: socket.socket, visitor: _Visitor, message: dict[str, Any]) -> None:
        """Admit a rank that proves itself; ValueError for anyone else."""
        rank, asked = message["rank"], message["challenge"]
        if type(rank) is not int or not 0 < rank < self.world_size or not isinstance(asked, str):
            raise ValueError("no rank of this run")
        if not proves(message["proof"], self._secret, visitor.challenge, rank, "rank"):
            raise ValueError("of another run")
        if rank in self._came:
            send(
                connection, {"refused": f"rank {rank} is already there: another run with the same folder uses the port"}
            )
            raise ValueError("came twice")
        visitor.rank = rank
        self._came.add(rank)
        send(connection, {"proof": proof(self._secret, asked, rank, "hub")})
        if len(self._came) == self.world_size - 1:
            self._stop_listening()

    def _take(self, connection: socket.socket, rank: int, message: dict[str, Any]) -> None:
        error = message.pop("bye", None)
        report = Report(**message)
        if report.rank != rank:
            raise ValueError("speaks for another rank")
        self._hear(rank, report, error)
        own = asdict(self._peers[0].report if 0 in self._peers else self._reporter.report())
        send(connection, {"go": self.others_may_go.is_set(), **own})

    def _hear(self, rank: int, report: Report, error: str | None = None) -> None:
        self._peers[rank], self._heard[rank] = Peer(report, 0.0, error=error), time.monotonic()

    def _drop(self, connection: socket.socket) -> None:
        self._selector.unregister(connection)
        connection.close()
        rank = self._visitors.pop(connection).rank
        if rank is None:
            return
        if rank not in self._peers:  # it ended before its first report
            self._came.discard(rank)
            return
        peer = self._peers[rank]
        self._peers[rank] = Peer(peer.report, 0.0, connected=False, error=peer.error)

    def _tell(self, verdict: Verdict) -> None:
        for connection in self._ranks():
            with contextlib.suppress(OSError):
                send(connection, {"verdict": asdict(verdict)})


class Link(Contact):
    """The side of any other rank, which reports to rank 0 and notices when rank 0 is gone."""

    def __init__(self, rank: int, connection: socket.socket, secret: str, timeout: float) -> None:
        """Introduce this rank; raises the errors of `handshake.introduce`."""
        super().__init__()
        self.silent = min(SILENT_SECONDS, timeout)
        self._reporter = Reporter(rank)
        self._main: Report | None = None
        self._connection = connection
        connection.settimeout(self.silent)
        self._lines = introduce(connection, secret, rank)
        self._sending = threading.Lock()
        self._thread.start()

    def wait_for_main(self) -> None:
        """See `Contact`."""
        self.others_may_go.wait()

    def leave(self, error: str) -> None:
        """See `Contact`. Tells rank 0, with the reason if this rank failed."""
        self._ending.set()
        with contextlib.suppress(OSError):
            self._send(bye=error)
        self._connection.close()

    def _send(self, **more: Any) -> None:
        with self._sending:
            send(self._connection, {**asdict(self._reporter.report()), **more})

    def _run(self) -> None:
        looked = heard = time.monotonic()
        reported = 0.0
        self._connection.settimeout(_TICK_SECONDS)
        while not self._ending.is_set():
            now = time.monotonic()
            try:
                if now - reported > REPORT_SECONDS:
                    self._send()
                    reported = now
                for message in self._lines.read(self._connection):
                    heard = time.monotonic()
                    self._take(message)
            except TimeoutError:
                pass
            except (OSError, ValueError, KeyError, TypeError):
                self._end(self._about_main("ended without a word: killed, or crashed"), say=True)
                return
            last, looked = looked, time.monotonic()
            if (frozen := looked - last) > _FROZEN_SECONDS:
                heard = min(heard + frozen, looked)
            if looked - heard > self.silent:
                text = f"has given no sign of life for {self.silent:.0f} s: its host or the network is down"
                self._end(self._about_main(text), say=True)

    def _take(self, message: dict[str, Any]) -> None:
        if "verdict" in message:
            self._end(Verdict(**message["verdict"]), say=False)  # rank 0 prints it
            return
        error, go = message.pop("bye", None), message.pop("go", False)
        self._main = Report(**message)
        if go:
            self.others_may_go.set()
        if error is None:
            return
        if error and not self._ending.wait(GRACE_SECONDS):
            self._end(Verdict(0, f"{self._main.name} failed: {error}"), say=True)
        self._ending.set()

    def _about_main(self, what: str) -> Verdict:
        if self._main is None:
            return Verdict(0, f"rank 0 {what}, before its first report.")
        return Verdict(0, f"{self._main.name} {what}. It was at {self._main.doing}.")
