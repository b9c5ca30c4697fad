"""Long work on rank 0 while the other ranks wait, and the way of their data to it."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from srde_ds.distributed.processes import Topology, all_reduce_max, on_main_rank
from srde_ds.errors import SRDEError

SIGN_OF_LIFE_SECONDS = 1.0  # far below any collective_timeout

Result = TypeVar("Result")


def in_thread_on_main_rank(function: Callable[[], Result], topology: Topology) -> Result:
    """`on_main_rank` for a function that may take longer than a collective waits.

    Rank 0 runs it in a thread and tells the others every second that it still does, so that only a lost rank trips
    the timeout. The function must not communicate.

    Raises:
        SRDEError: on every rank, when the function raises anything; rank 0 raises what it was, if no SRDEError.
    """
    with ThreadPoolExecutor(1) as executor:
        future = executor.submit(function) if topology.is_main else None
        while all_reduce_max(int(not _finished(future)), topology.device):
            pass
    unexpected = None if future is None else future.exception()
    if isinstance(unexpected, SRDEError):
        unexpected = None  # on_main_rank carries it
    if all_reduce_max(int(unexpected is not None), topology.device):
        if unexpected is not None:
            raise unexpected
        raise SRDEError("rank 0 failed; its error stands in its output.")

    def result() -> Result:
        assert future is not None
        return future.result()

    return on_main_rank(result, topology)


def _finished(future: Future[Result] | None) -> bool:
    """Waits a moment for it; ranks without one are always ready."""
    if future is None:
        return True
    wait([future], timeout=SIGN_OF_LIFE_SECONDS)
    return future.done()


def gather_rows(own: Tensor, counts: list[int], topology: Topology) -> Tensor | None:
    """[sum(counts), D] on rank 0: every rank's rows, rank by rank; None on the others.

    Args:
        own: [counts[rank], D], on any device.
    """
    padded = torch.zeros(max(counts), own.shape[1], dtype=own.dtype, device=topology.device)
    padded[: len(own)] = own
    parts = [torch.empty_like(padded) for _ in counts] if topology.is_main else None
    dist.gather(padded, parts, dst=0)
    return None if parts is None else torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)])
