"""`srde-ds monitor`: watches a run and notifies a webhook when its state changes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from srde_ds.cli.flags import Parser
from srde_ds.config.values import option


@dataclass(frozen=True)
class MonitorOptions:
    """Which run to watch, how often, and whom to notify."""

    run: str = option("", "the output_dir of a run", metavar="RUN", required=True)
    webhook: str | None = option(
        None, "URL to post changes of state to, as JSON (default: WEBHOOK_URL of the environment)", metavar="URL"
    )
    once: bool = option(False, "print the state and exit, with status 1 if the run has failed, stopped or stalled")
    interval: float = option(10.0, "seconds between checks", metavar="SECONDS")
    stall_seconds: float | None = option(
        None,
        "seconds without a finished step after which a run counts as stalled (default: the time of ten usual steps)",
        metavar="SECONDS",
    )


def monitor(arguments: Sequence[str]) -> int:
    """Watch a run. Returns 1 if it has failed, stopped or stalled."""
    parser = Parser(
        "srde-ds monitor",
        "Watch the progress of a run, and notify a webhook when its state changes.",
        usage="RUN [options]",
        positional="run",
    )
    parser.add_options(MonitorOptions)
    options = parser.options(MonitorOptions, parser.parse(arguments))

    from srde_ds.cluster import monitor as monitoring

    return monitoring.monitor(
        options.run,
        webhook=options.webhook or monitoring.webhook_from_environment(),
        once=options.once,
        interval=options.interval,
        stall_seconds=options.stall_seconds,
    )
