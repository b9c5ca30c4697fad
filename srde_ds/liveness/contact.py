"""The ranks keep in touch beside torch.distributed, so that a lost one ends the run soon and is named.

Every rank holds a connection to rank 0 and reports over it. A connection that ends, silence, and a rank that is late
for a collective lead to a verdict, which all ranks print or pass on, and which ends them: torch itself would wait for
its timeout, in NCCL's case without a Python exception, and would not say for whom.

One JSON object a line. The messages carry no code, and are refused without the run's token.
"""

from __future__ import annotations

import contextlib
import datetime
import itertools
import json
import logging
import os
import secrets
import selectors
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any

import torch.distributed as dist
from torch._C._distributed_c10d import TCPStore

from srde_ds.errors import LostContact, SRDEError
from srde_ds.liveness.status import Report, Reporter
from srde_ds.liveness.verdict import GRACE_SECONDS, SILENT_SECONDS, Peer, Verdict, judge
from srde_ds.utils.escape import one_line
from srde_ds.utils.launcher import launched_rank, launched_world_size

logger = logging.getLogger(__name__)

REPORT_SECONDS = 2.0
_TICK_SECONDS = 0.5
_LONGEST_LINE = 1 << 16
# A rank whose collective failed because another one is lost waits so long for the verdict that names it.
VERDICT_SECONDS = 15.0
_LATECOMER_SECONDS = 5.0
# All ranks of a process count their runs alike; tests have many in one process.
_runs = itertools.count()


class Contact:
    """This rank's side; alone it does nothing.

    Attributes:
        on_verdict: called once with the verdict before it ends the process.
        store: torch's, held until the process group has it, too.
    """

    store: TCPStore | None = None

    def __init__(self) -> None:
        self.on_verdict: Callable[[Verdict], None] = lambda verdict: None
        self.others_may_go = threading.Event()
        self._ending = threading.Event()
        self._thread = threading.Thread(target=self._run_safely, name="contact", daemon=True)

    def release_others(self) -> None:
        """On rank 0: the others, which wait for its preparations, may go on."""
        self.others_may_go.set()

    def wait_for_main(self) -> None:
        """On the other ranks: wait until rank 0 has called `release_others`, as long as it lives."""

    def leave(self, error: str) -> None:
        """Say goodbye; `error` is empty in good order. The others end if it is not."""

    def _run(self) -> None:
        raise NotImplementedError

    def _run_safely(self) -> None:
        try:
            self._run()
        except Exception:  # training must not depend on this thread
            logger.exception("The contact between the ranks has ended; a lost rank trips collective_timeout only.")

    def _end(self, verdict: Verdict, *, say: bool) -> None:
        """Act on a verdict: the main thread may be in a collective that never ends, so the process goes from here."""
        if self._ending.is_set():
            return
        with contextlib.suppress(Exception):  # whatever it is, the process must end
            self.on_verdict(verdict)
        if say:
            print(f"srde-ds: error: {one_line(verdict.text)}", file=sys.stderr)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(1)


class _Hub(Contact):
    """Rank 0: hears all ranks and judges."""

    def __init__(self, world_size: int, timeout: float, start_timeout: float, token: str) -> None:
        super().__init__()
        self.world_size, self.timeout, self.start_timeout, self.token = world_size, timeout, start_timeout, token
        # All interfaces, as torch's own store does: which of them the others use is theirs to know.
        local = os.environ["MASTER_ADDR"] in ("127.0.0.1", "localhost")
        self._listener = socket.create_server(("127.0.0.1" if local else "", 0), backlog=1024)
        self.port = int(self._listener.getsockname()[1])
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._listener, selectors.EVENT_READ)
        self._lines: dict[socket.socket, _Lines] = {}
        self._rank_of: dict[socket.socket, int] = {}
        self._peers: dict[int, Peer] = {}
        self._heard: dict[int, float] = {}
        self._began = time.monotonic()
        self._reporter = Reporter(0)
        self._thread.start()

    def leave(self, error: str) -> None:
        deadline = time.monotonic() + _LATECOMER_SECONDS
        while error and len(self._peers) < self.world_size and time.monotonic() < deadline:
            time.sleep(_TICK_SECONDS)  # who comes later would find nobody, and say only that
        self._ending.set()
        self._thread.join(5 * _TICK_SECONDS)
        for connection in list(self._rank_of):
            with contextlib.suppress(OSError):
                connection.sendall(_line({"bye": error, **asdict(self._reporter.report())}))
        for connection in [*self._lines, self._listener]:
            connection.close()
        self._selector.close()

    def _run(self) -> None:
        while not self._ending.is_set():
            for key, _ in self._selector.select(_TICK_SECONDS):
                if key.fileobj is self._listener:
                    self._accept()
                else:
                    assert isinstance(key.fileobj, socket.socket)
                    self._read(key.fileobj)
            self._hear(0, self._reporter.report())
            now = time.monotonic()
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
        connection, _ = self._listener.accept()
        connection.settimeout(_TICK_SECONDS)
        self._lines[connection] = _Lines()
        self._selector.register(connection, selectors.EVENT_READ)

    def _read(self, connection: socket.socket) -> None:
        try:
            messages = self._lines[connection].read(connection)
            for message in messages:
                self._take(connection, message)
        except (OSError, ValueError, KeyError, TypeError):  # it ended, or is none of ours
            self._drop(connection)

    def _take(self, connection: socket.socket, message: dict[str, Any]) -> None:
        if message.pop("token") != self.token:
            raise ValueError("of another run")
        error = message.pop("bye", None)
        report = Report(**message)
        self._rank_of[connection] = report.rank
        self._hear(report.rank, report, error)
        own = asdict(self._peers[0].report if 0 in self._peers else self._reporter.report())
        connection.sendall(_line({"go": self.others_may_go.is_set(), **own}))

    def _hear(self, rank: int, report: Report, error: str | None = None) -> None:
        self._peers[rank], self._heard[rank] = Peer(report, 0.0, error=error), time.monotonic()

    def _drop(self, connection: socket.socket) -> None:
        self._selector.unregister(connection)
        connection.close()
        del self._lines[connection]
        rank = self._rank_of.pop(connection, None)
        if rank is not None:
            peer = self._peers[rank]
            self._peers[rank] = Peer(peer.report, 0.0, connected=False, error=peer.error)

    def _tell(self, verdict: Verdict) -> None:
        for connection in self._rank_of:
            with contextlib.suppress(OSError):
                connection.sendall(_line({"verdict": asdict(verdict)}))


class _Link(Contact):
    """Any other rank: reports to rank 0, and notices when that is gone."""

    def __init__(self, rank: int, address: str, port: int, token: str, timeout: float) -> None:
        super().__init__()
        self.token, self.silent = token, min(SILENT_SECONDS, timeout)
        self._reporter = Reporter(rank)
        self._main: Report | None = None
        self._connection = socket.create_connection((address, port), timeout=self.silent)
        self._sending = threading.Lock()
        self._thread.start()

    def wait_for_main(self) -> None:
        self.others_may_go.wait()

    def leave(self, error: str) -> None:
        self._ending.set()
        with contextlib.suppress(OSError):
            self._send(bye=error)
        self._connection.close()

    def _send(self, **more: Any) -> None:
        with self._sending:
            self._connection.sendall(_line({"token": self.token, **asdict(self._reporter.report()), **more}))

    def _run(self) -> None:
        lines, heard, reported = _Lines(), time.monotonic(), 0.0
        self._connection.settimeout(_TICK_SECONDS)
        while not self._ending.is_set():
            now = time.monotonic()
            try:
                if now - reported > REPORT_SECONDS:
                    self._send()
                    reported = now
                for message in lines.read(self._connection):
                    heard = time.monotonic()
                    self._take(message)
            except TimeoutError:
                pass
            except (OSError, ValueError):
                self._end(self._about_main("ended without a word: killed, or crashed"), say=True)
                return
            if time.monotonic() - heard > self.silent:
                text = f"gives no sign of life for {self.silent:.0f} s: its host or the network is down"
                self._end(self._about_main(text), say=True)

    def _take(self, message: dict[str, Any]) -> None:
        if "verdict" in message:
            self._end(Verdict(**message["verdict"]), say=False)  # rank 0 says it
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
            return Verdict(0, f"rank 0 {what}, before it had reported.")
        return Verdict(0, f"{self._main.name} {what}. It was at {self._main.doing}.")


class _Lines:
    """Cuts what a connection brings into JSON objects."""

    def __init__(self) -> None:
        self._rest = b""

    def read(self, connection: socket.socket) -> Iterator[dict[str, Any]]:
        """What has come. ConnectionError at the connection's end, ValueError for what is no message."""
        received = connection.recv(_LONGEST_LINE)
        if not received:
            raise ConnectionError("the connection has ended")
        *lines, self._rest = (self._rest + received).split(b"\n")
        if len(self._rest) > _LONGEST_LINE:
            raise ValueError("a line without end")
        for line in lines:
            message = json.loads(line)
            if not isinstance(message, dict):
                raise ValueError("no object")
            yield message


def _line(message: dict[str, Any]) -> bytes:
    return json.dumps(message).encode() + b"\n"


@contextmanager
def contact(timeout: float, start_timeout: float) -> Iterator[Contact]:
    """Gather the launched processes, and stay in touch until the block ends.

    Args:
        timeout: seconds that ranks wait for others in a collective.
        start_timeout: seconds that they wait for others to come. Long work at the start belongs into the block.

    Raises:
        LostContact: rank 0 did not answer in time.
    """
    rank, world_size = launched_rank(), launched_world_size()
    ours = Contact() if world_size == 1 else _meet(rank, world_size, timeout, start_timeout)
    error = ""
    try:
        yield ours
    except SRDEError as failure:
        error = str(failure)
        raise
    except BaseException as failure:
        error = f"{type(failure).__name__}: {failure}".splitlines()[0]
        if _another_rank_is_lost(failure):
            time.sleep(0 if world_size == 1 else VERDICT_SECONDS)  # the verdict ends this process
        raise
    finally:
        ours.leave(error)


def _meet(rank: int, world_size: int, timeout: float, start_timeout: float) -> Contact:
    """Rank 0 opens its port and tells the others over the store through which torch's processes meet, too."""
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    # torchrun's agent holds the store itself; and after a restart the store is still the old one.
    by_agent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    key = f"srde_ds/contact/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}/{next(_runs)}"
    is_master = rank == 0 and not by_agent
    try:
        if not is_master:
            _wait_for_port(address, port, start_timeout)
        store = TCPStore(
            address,
            port,
            None,
            is_master=is_master,
            timeout=datetime.timedelta(seconds=start_timeout),
            wait_for_workers=False,
            multi_tenant=True,  # init_process_group finds the same one
        )
        if rank == 0:
            hub = _Hub(world_size, timeout, start_timeout, secrets.token_hex(8))
            hub.store = store  # held until the group has it
            store.set(key, f"{hub.port} {hub.token}")
            return hub
        text = store.get(key).decode().split()
        return _Link(rank, address, int(text[0]), text[1], timeout)
    except (dist.DistError, OSError) as error:
        reason = str(error).splitlines()[0]
        raise LostContact(
            f"rank 0 did not answer at {address}:{port} within {start_timeout:.0f} s ({reason}). Did it start, can "
            "this host reach it, and is the port free?"
        ) from None


def _wait_for_port(address: str, port: int, seconds: float) -> None:
    """Until something listens there. Torch's store waits by itself, but up to three times as long as it is told to.

    Raises:
        OSError: nothing did.
    """
    deadline = time.monotonic() + seconds
    while True:
        try:
            socket.create_connection((address, port), timeout=max(deadline - time.monotonic(), 0.1)).close()
            return
        except OSError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.1)


def _another_rank_is_lost(error: BaseException) -> bool:
    """gloo raises a plain RuntimeError."""
    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "gloo" in str(error))
