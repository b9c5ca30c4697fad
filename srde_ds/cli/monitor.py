"""`srde-ds monitor`: watch a run and tell a webhook when its state changes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from srde_ds.cli.flags import Parser
from srde_ds.config.values import option


@dataclass(frozen=True)
class MonitorOptions:
    """Which run, how often to look, and who is told."""

    run: str = option("", "the output_dir of a run", metavar="RUN", required=True)
    webhook: str | None = option(
        None, "address that gets JSON by POST (default: WEBHOOK_URL of the environment)", metavar="URL"
    )
    once: bool = option(False, "print the state and stop; the exit status is 1 for a run that is not well")
    interval: float = option(10.0, "seconds between looks", metavar="SECONDS")
    stall_seconds: float | None = option(
        None,
        "seconds without a finished step after which a run has stalled (default: ten usual steps)",
        metavar="SECONDS",
    )


def monitor(arguments: Sequence[str]) -> int:
    """Watch a run. Returns 1 for one that is not well."""
    parser = Parser(
        "srde-ds monitor",
        "Watch the progress of a run, and tell a webhook when its state changes.",
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
