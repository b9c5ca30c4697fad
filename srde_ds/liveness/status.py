"""What this process is doing, for messages that name a rank that has failed or did not arrive."""

from __future__ import annotations

import os
import socket
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch.distributed import distributed_c10d


@dataclass(frozen=True)
class Report:
    """A rank's view of itself. Times are durations, so that the hosts' clocks need not agree.

    Attributes:
        step: the current optimizer step, from 1; 0 before the first.
        activity: such as "forward of micro-step 3", for `activity_seconds`.
        place: source line of the main thread.
        collectives: number of collectives of all ranks begun; equal on ranks that wait in the same one.
        idle_seconds: seconds since the last one began, in whatever group.
    """

    rank: int
    host: str
    pid: int
    step: int
    activity: str
    activity_seconds: float
    place: str
    collectives: int
    idle_seconds: float

    @property
    def name(self) -> str:
        """The rank with its host and process, for messages."""
        return f"rank {self.rank} (host {self.host}, process {self.pid})"

    @property
    def doing(self) -> str:
        """What the rank was doing, for messages."""
        return f"step {self.step}, {self.activity}, for {self.activity_seconds:.0f} s, in {self.place}"


class _Current:
    step = 0
    activity = "starting"
    since = time.monotonic()


def doing(activity: str, step: int | None = None) -> None:
    """Note what this process does from now on. Without `step`, the step stays the same."""
    _Current.activity, _Current.since = activity, time.monotonic()
    if step is not None:
        _Current.step = step


class Reporter:
    """Makes this rank's reports. Call it regularly, since it measures progress from one report to the next."""

    def __init__(self, rank: int) -> None:
        self.rank, self.host, self.pid = rank, socket.gethostname(), os.getpid()
        self._begun, self._progress = 0, time.monotonic()

    def report(self) -> Report:
        """What this rank is doing now."""
        now, (of_all_ranks, begun) = time.monotonic(), _collectives_begun()
        if begun != self._begun:
            self._begun, self._progress = begun, now
        return Report(
            self.rank,
            self.host,
            self.pid,
            _Current.step,
            _Current.activity,
            round(now - _Current.since, 1),
            _place(),
            of_all_ranks,
            round(now - self._progress, 1),
        )


def _collectives_begun() -> tuple[int, int]:
    """Numbers of collectives that this process has called: in groups of all ranks, and in all groups.

    Only the former are comparable: in a group of some ranks there may be more of them than in another. torch counts
    them in each group, for gloo and NCCL, for its debug mode. There is no public way to read the numbers.
    """
    if not dist.is_initialized():
        return 0, 0
    groups: list[Any] = list(distributed_c10d._world.pg_map)
    counts = [(group.size(), group._get_sequence_number_for_group()) for group in groups]
    world_size = dist.get_world_size()  # DeepSpeed has a group of all ranks of its own
    return sum(count for size, count in counts if size == world_size), sum(count for _, count in counts)


def _place() -> str:
    frame = sys._current_frames().get(threading.main_thread().ident or 0)
    if frame is None:
        return "no Python code"
    file = Path(frame.f_code.co_filename)
    return f"{file.parent.name}/{file.name}:{frame.f_lineno} {frame.f_code.co_name}"
