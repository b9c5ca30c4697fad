"""Run a function on several local processes that form a torch.distributed group."""

from __future__ import annotations

import os
import pickle
import socket
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing import get_context
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist


def run_distributed(
    function: Callable[..., Any], world_size: int, *args: Any, backend: str = "gloo", timeout: float = 120
) -> list[Any]:
    """Call `function(*args)` on `world_size` spawned processes inside an initialised process group.

    Args:
        function: a module-level function of an importable module; it finds its rank in torch.distributed or RANK.
        args: picklable arguments, the same on each rank.
        timeout: seconds for the whole call, and for each collective.

    Returns:
        What each rank returned (picklable), by rank.

    Raises:
        AssertionError: a rank raised (with the traceback of the first one), died, or ran out of time. No process
            outlives the call.
    """
    deadline = time.monotonic() + timeout
    context = get_context("spawn")
    environment = {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(_free_port()),
        "WORLD_SIZE": str(world_size),
        "LOCAL_WORLD_SIZE": str(world_size),
        "OMP_NUM_THREADS": "1",
        "GLOO_SOCKET_IFNAME": "lo",
    }
    processes: list[SpawnProcess] = []
    ranks: dict[Connection, int] = {}
    results: dict[int, Any] = {}
    try:
        for rank in range(world_size):
            receiver, sender = context.Pipe(duplex=False)
            # Spawned processes inherit the environment, which torch reads at import.
            with patch.dict(os.environ, environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)}), sender:
                process = context.Process(target=_child, args=(sender, function, args, backend, timeout))
                process.start()
            processes.append(process)
            ranks[receiver] = rank
        while ranks:
            ready = [c for c in wait(list(ranks), max(deadline - time.monotonic(), 0)) if isinstance(c, Connection)]
            if not ready:
                raise AssertionError(f"ranks {sorted(ranks.values())} did not finish within {timeout} s")
            reports = [(*_receive(connection), ranks.pop(connection)) for connection in ready]
            failures = [(when, rank, text) for when, ok, text, rank in reports if not ok]
            if failures:
                _, rank, text = min(failures)
                raise AssertionError(f"rank {rank} of {world_size} failed:\n{text}")
            results |= {rank: pickle.loads(value) for _, _, value, rank in reports}
        for process in processes:
            process.join(max(deadline - time.monotonic(), 1))
    finally:
        for process in processes:
            process.kill()
            process.join()
    return [results[rank] for rank in range(world_size)]


def _receive(connection: Connection) -> tuple[float, bool, Any]:
    """A rank's report: when, whether it succeeded, its pickled value or the text of its failure."""
    try:
        return connection.recv()
    except EOFError:
        return time.time(), False, "the process died without a report; its stderr is in the captured output"
    finally:
        connection.close()


def _child(
    sender: Connection, function: Callable[..., Any], args: tuple[Any, ...], backend: str, timeout: float
) -> None:
    try:
        torch.set_num_threads(1)
        dist.init_process_group(backend, timeout=timedelta(seconds=timeout))
        value = function(*args)
        # Plain pickle: tensors travel by value and need not outlive this process.
        report: tuple[float, bool, Any] = time.time(), True, pickle.dumps(value)
        # The function may have ended the group itself.
        if dist.is_initialized():
            dist.barrier()
            dist.destroy_process_group()
    except BaseException:
        report = time.time(), False, traceback.format_exc()
    sender.send(report)
    sender.close()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
