"""Watches a run through its heartbeat, and notifies a webhook when its state changes."""

from __future__ import annotations

import json
import logging
import os
import socket
import time
import urllib.error
import urllib.request
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

from srde_ds.errors import SRDEError
from srde_ds.liveness.heartbeat import FILE, read_heartbeat
from srde_ds.training.run_lock import held_since
from srde_ds.utils.escape import one_line
from srde_ds.weights.locate import COMPLETED

logger = logging.getLogger(__name__)

State = Literal["waiting", "starting", "running", "stalled", "died", "stopped", "failed", "finished"]
GOOD: tuple[State, ...] = ("waiting", "starting", "running", "finished")
# A step that evaluates or saves takes longer than usual.
USUAL_STEPS = 10.0
SHORTEST_STALL_SECONDS = 120.0
# Before the first step has finished, the base is loaded and kernels are compiled.
FIRST_STEP_SECONDS = 1800.0
# A supervisor restarts within seconds.
GIVE_UP_SECONDS = 300.0
WEBHOOK_SECONDS = 10.0


@dataclass(frozen=True)
class Observation:
    """The state of a run at some moment. `text` is a line for people."""

    state: State
    text: str


def observe(run: str | Path, *, now: float, stall_seconds: float | None = None) -> Observation:
    """Determine a run's state from its folder.

    Stalled means that no step has finished for the time of ten usual ones (or `stall_seconds`), whatever is printed.

    Args:
        now: seconds since the epoch, by the run's clock.
    """
    folder = Path(run)
    heartbeat = read_heartbeat(folder)
    if not heartbeat:
        found = f"{FILE} is damaged" if (folder / FILE).exists() else "no heartbeat yet"
        return Observation("waiting", f"{folder}: {found}")
    place = _describe(heartbeat)
    # Until data and base are there, heartbeat and marker are those of an earlier attempt.
    started = held_since(folder, now) or 0.0
    if started > heartbeat["time"]:
        starting = now - started
        late = starting > (stall_seconds or FIRST_STEP_SECONDS)
        text = f"{folder}: starting again for {starting:.0f} s, after {place}"
        return Observation("stalled" if late else "starting", text)
    if (folder / COMPLETED).exists():
        return Observation("finished", f"{folder}: finished, {place}")
    state, reason = heartbeat["state"], heartbeat.get("reason", "")
    if state in ("failed", "stopped"):
        return Observation(state, f"{folder}: {state}, {place}: {reason}")
    if heartbeat["host"] == socket.gethostname() and not Path(f"/proc/{heartbeat['pid']}").exists():
        return Observation("died", f"{folder}: its process {heartbeat['pid']} ended without a word, {place}")
    silent = now - heartbeat["time"]
    usual = heartbeat.get("seconds_per_step")
    longest = FIRST_STEP_SECONDS if usual is None else max(SHORTEST_STALL_SECONDS, USUAL_STEPS * usual)
    if silent > (stall_seconds or longest):
        return Observation("stalled", f"{folder}: no progress for {silent:.0f} s, {place}")
    return Observation("running", f"{folder}: running, {place}")


def monitor(
    run: str | Path,
    *,
    webhook: str | None = None,
    once: bool = False,
    interval: float = 10.0,
    stall_seconds: float | None = None,
) -> int:
    """Print the run's state whenever it changes, until the run has finished or has ended for good.

    Args:
        webhook: URL to which each change of state is posted as `{"text": ..., "content": ...}` (Slack reads the first,
            Discord the second). Failures are warnings. The URL is a secret and never printed.
        once: print the state and return.

    Returns:
        0 for a run that has finished, is running or has not started yet, else 1.

    Raises:
        SRDEError: the webhook is not an http(s) URL, or the folder does not exist.
    """
    if webhook and not _is_url(webhook):
        raise SRDEError("webhook: not an http(s) URL. Give the whole URL, or leave it out.")
    if not Path(run).is_dir() and once:
        raise SRDEError(f"run={run}: no such folder. Give the --output_dir of a run.")
    last, since = None, time.monotonic()
    while True:
        seen = observe(run, now=time.time(), stall_seconds=stall_seconds)
        if seen.state != last:
            print(one_line(seen.text), flush=True)
            if webhook and seen.state != "waiting":
                notify(webhook, seen)
            last, since = seen.state, time.monotonic()
        ended = seen.state in ("died", "stopped", "failed") and time.monotonic() - since > GIVE_UP_SECONDS
        if once or ended or seen.state == "finished":
            return 0 if seen.state in GOOD else 1
        time.sleep(interval)


def _is_url(text: str) -> bool:
    try:
        parts = urlsplit(text)
        return parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:  # an invalid port or address
        return False


def notify(webhook: str, seen: Observation) -> None:
    """Notify the webhook. Failures are warnings without the URL."""
    text = f"[{seen.state}] {seen.text}"
    body = json.dumps({"text": text, "content": text}).encode()
    # Some services refuse urllib's default user agent.
    headers = {"Content-Type": "application/json", "User-Agent": "srde-ds"}
    try:
        with urllib.request.urlopen(urllib.request.Request(webhook, body, headers), timeout=WEBHOOK_SECONDS):
            pass
    except urllib.error.HTTPError as error:
        logger.warning("webhook: HTTP status %s; the state was not reported there.", error.code)
    except (OSError, ValueError, HTTPException) as error:  # the error's text may contain the URL
        logger.warning("webhook: %s; the state was not reported there.", type(error).__name__)


def _describe(heartbeat: dict[str, Any]) -> str:
    parts = [f"step {heartbeat['step']}/{heartbeat.get('max_steps')}"]
    if heartbeat.get("loss") is not None:
        parts.append(f"loss {heartbeat['loss']:.4f}")
    if heartbeat.get("tokens_per_second") is not None:
        parts.append(f"{heartbeat['tokens_per_second']:.0f} tokens/s")
    return ", ".join(parts)


def webhook_from_environment() -> str | None:
    """The webhook's URL from the environment, since every user of the machine can see a command line."""
    return os.environ.get("WEBHOOK_URL") or None
