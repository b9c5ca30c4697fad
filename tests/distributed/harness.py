"""Run functions on several local processes that form a torch.distributed group."""

from __future__ import annotations

import os
import pickle
import socket
import sys
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing import get_context
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist


def run_distributed(
    function: Callable[..., Any], world_size: int, *args: Any, backend: str = "gloo", timeout: float = 300
) -> list[Any]:
    """`function(*args)` on processes that live for this call alone; see `Ranks`."""
    with Ranks(world_size, backend=backend, timeout=timeout) as ranks:
        return ranks(function, *args)


class Ranks:
    """Processes that form a group and stay for several calls, which then share the seconds that imports take.

    They start with the first call, on CPUs forked from one process that has done the imports. A call that fails ends
    them; the next one starts new ones.

    Args:
        timeout: seconds for a whole call, and for each collective.
    """

    def __init__(self, world_size: int, *, backend: str = "gloo", timeout: float = 300) -> None:
        self.world_size, self.backend, self.timeout = world_size, backend, timeout
        self._processes: list[BaseProcess] = []
        self._connections: list[Connection] = []

    def __call__(self, function: Callable[..., Any], *args: Any) -> list[Any]:
        """Call `function(*args)` on each process.

        Args:
            function: a module-level function of an importable module; it finds its rank in torch.distributed or RANK.
            args: picklable arguments, the same on each rank.

        Returns:
            What each rank returned (picklable), by rank.

        Raises:
            AssertionError: a rank raised (with the traceback of the first one), died, or ran out of time. No process
                outlives such a call.
        """
        deadline = time.monotonic() + self.timeout
        if not self._processes:
            self._start()
        try:
            for connection in self._connections:
                connection.send((function, args))
            return self._results(deadline)
        except BaseException:
            self._kill()
            raise

    def __enter__(self) -> Ranks:
        return self

    def __exit__(self, *exception: object) -> None:
        for connection in self._connections:
            connection.close()  # the processes take it as the end
        for process in self._processes:
            process.join(10)
        self._kill()

    def _start(self) -> None:
        # What has found GPUs must not fork; with gloo the processes are to find none.
        context: Any = _forks() if self.backend == "gloo" else get_context("spawn")
        environment = {
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(free_port()),
            "WORLD_SIZE": str(self.world_size),
            "LOCAL_WORLD_SIZE": str(self.world_size),
            "OMP_NUM_THREADS": "1",
            "GLOO_SOCKET_IFNAME": "lo",
        }
        if self.backend == "gloo":
            environment["CUDA_VISIBLE_DEVICES"] = ""
        for rank in range(self.world_size):
            ours, theirs = context.Pipe()
            own = environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            # Torch reads the number of threads at import, in this process's child or in the one that forks.
            with patch.dict(os.environ, own), theirs:
                process = context.Process(target=_serve, args=(theirs, own, self.backend, self.timeout))
                process.start()
            self._processes.append(process)
            self._connections.append(ours)

    def _results(self, deadline: float) -> list[Any]:
        ranks = {connection: rank for rank, connection in enumerate(self._connections)}
        results: dict[int, Any] = {}
        while ranks:
            ready = [c for c in wait(list(ranks), max(deadline - time.monotonic(), 0)) if isinstance(c, Connection)]
            if not ready:
                raise AssertionError(f"ranks {sorted(ranks.values())} did not finish within {self.timeout} s")
            reports = [(*_receive(connection), ranks.pop(connection)) for connection in ready]
            failures = [(when, rank, text) for when, ok, text, rank in reports if not ok]
            if failures:
                _, rank, text = min(failures)
                raise AssertionError(f"rank {rank} of {self.world_size} failed:\n{text}")
            results |= {rank: pickle.loads(value) for _, _, value, rank in reports}
        return [results[rank] for rank in range(self.world_size)]

    def _kill(self) -> None:
        for process in self._processes:
            process.kill()
            process.join()
        for connection in self._connections:
            connection.close()
        self._processes, self._connections = [], []


def _receive(connection: Connection) -> tuple[float, bool, Any]:
    """A rank's report: when, whether it succeeded, its pickled value or the text of its failure."""
    try:
        return connection.recv()
    except (EOFError, ConnectionResetError):
        return time.time(), False, "the process died without a report; its stderr is in the captured output"


def _serve(connection: Connection, environment: dict[str, str], backend: str, timeout: float) -> None:
    """A process's life: calls until the connection ends. After a failed one it waits to be killed."""
    os.environ.update(environment)
    torch.set_num_threads(1)
    dist.init_process_group(backend, timeout=timedelta(seconds=timeout))
    while True:
        try:
            function, args = connection.recv()
        except EOFError:
            break
        try:
            # Plain pickle: tensors travel by value and need not outlive this process.
            report: tuple[float, bool, Any] = time.time(), True, pickle.dumps(function(*args))
        except BaseException:
            report = time.time(), False, traceback.format_exc()
        connection.send(report)
    # A function may have ended the group itself.
    if dist.is_initialized():
        dist.destroy_process_group()


def _forks() -> Any:
    """The context of processes that are forked from one that has done the imports."""
    context = get_context("forkserver")
    context.set_forkserver_preload(["tests.distributed.preload"])
    return context


def fork(log: Path, function: Callable[..., int | None], *args: Any) -> BaseProcess:
    """Start `function(*args)` as a program: a process without a group that writes to `log` and ends with the result.

    Unlike a new interpreter it spends no seconds on imports.
    """
    process: BaseProcess = _forks().Process(target=_program, args=(log, function, args))
    process.start()
    return process


def run_forked(log: Path, function: Callable[..., int | None], *args: Any, timeout: float = 600) -> int | None:
    """`fork`, and its exit status; None: it was killed, since it took more than `timeout` seconds."""
    process = fork(log, function, *args)
    process.join(timeout)
    status = process.exitcode
    process.kill()
    process.join()
    return status


def _program(log: Path, function: Callable[..., int | None], args: Any) -> None:
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        os.environ.pop(name, None)  # of the ranks for which the forking process was started
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    torch.set_num_threads(1)
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    sys.exit(function(*args))


def free_port() -> int:
    """A TCP port of this host that nothing listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
