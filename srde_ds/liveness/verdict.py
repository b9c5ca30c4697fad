"""Decides from the ranks' last reports which rank is at fault when a run cannot continue."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from srde_ds.liveness.status import Report

SILENT_SECONDS = 60.0  # or `timeout`, if that is shorter
# Time between a rank's error and the end of the others: if all of them raise, each reports its own error.
GRACE_SECONDS = 10.0


@dataclass(frozen=True)
class Peer:
    """What is known about a rank.

    Attributes:
        heard: seconds since its last report.
        connected: False once its connection has ended.
        error: None while it works, "" after a regular end, else its error.
    """

    report: Report
    heard: float
    connected: bool = True
    error: str | None = None


@dataclass(frozen=True)
class Verdict:
    """The rank at fault, and a sentence that says why."""

    rank: int
    text: str


def judge(
    peers: Mapping[int, Peer], world_size: int, *, waited: float, timeout: float, start_timeout: float
) -> Verdict | None:
    """Why the run must end now; None if it may continue.

    Args:
        peers: the ranks that have come. Those that ended regularly are never blamed.
        waited: seconds since this run's ranks began to gather.
        timeout: seconds that ranks wait for others in a collective.
        start_timeout: seconds that they wait for others to start.
    """
    missing = [rank for rank in range(world_size) if rank not in peers]
    if missing and waited > start_timeout:
        came = sorted({peer.report.host for peer in peers.values()})
        text = f"{ranks(missing)} did not start within {start_timeout:.0f} s; there are processes on {', '.join(came)}"
        return Verdict(missing[0], f"{text}. Is every host up, and can it reach the first one? (--start_timeout)")
    at_work = {rank: peer for rank, peer in peers.items() if peer.error is None}
    for rank, peer in at_work.items():
        if not peer.connected:
            return Verdict(rank, f"{peer.report.name} ended without a word: killed, or crashed. It was at {_at(peer)}.")
    for rank, peer in peers.items():
        if peer.error and peer.heard > GRACE_SECONDS:
            return Verdict(rank, f"{peer.report.name} failed: {peer.error}")
    for rank, peer in at_work.items():
        if peer.heard > min(SILENT_SECONDS, timeout):
            text = f"no sign of life from {peer.report.name} for {peer.heard:.0f} s: its host or the network is down"
            return Verdict(rank, f"{text}. It was at {_at(peer)}.")
    if missing:
        return None
    return _late(at_work, timeout)


def _late(at_work: Mapping[int, Peer], timeout: float) -> Verdict | None:
    """A verdict on ranks that did not come to a collective in which others wait."""
    most = max((peer.report.collectives for peer in at_work.values()), default=0)
    late = {rank: peer for rank, peer in at_work.items() if peer.report.collectives < most}
    waited = max(
        (peer.report.idle_seconds + peer.heard for peer in at_work.values() if peer.report.collectives == most),
        default=0.0,
    )
    if not late or waited <= timeout:
        return None
    which = "; ".join(f"{peer.report.name} is at {_at(peer)}" for peer in list(late.values())[:4])
    more = f"; and {len(late) - 4} more" if len(late) > 4 else ""
    text = f"{ranks(late)} did not arrive at a collective in which the others have waited {waited:.0f} s: {which}{more}"
    return Verdict(min(late), f"{text}.")


def ranks(numbers: Mapping[int, Peer] | list[int]) -> str:
    """`rank 3` or `ranks 3, 5`, for messages."""
    names = ", ".join(map(str, sorted(numbers)))
    return f"rank {names}" if len(numbers) == 1 else f"ranks {names}"


def _at(peer: Peer) -> str:
    return peer.report.doing
