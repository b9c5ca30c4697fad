"""`srde-ds monitor`: watch a run and tell a webhook when its state changes."""

from __future__ import annotations

from collections.abc import Sequence

from srde_ds.cli.flags import Parser


def monitor(arguments: Sequence[str]) -> int:
    parser = Parser(prog="srde-ds monitor", description="Watch a run by its progress, and tell a webhook of changes.")
    parser.add_argument("run", help="the --output_dir of a run")
    parser.add_argument("--webhook", metavar="URL", help="gets JSON by POST (default: WEBHOOK_URL of the environment)")
    parser.boolean("--once", False, "print the state and stop; the status is 1 for a run that is not well")
    parser.add_argument("--interval", type=float, default=10.0, help="seconds between looks")
    parser.add_argument("--stall_seconds", type=float, help="without a finished step (default: ten usual steps)")
    options = vars(parser.parse(arguments))

    from srde_ds.cluster import monitor as monitoring

    options["webhook"] = options["webhook"] or monitoring.webhook_from_environment()
    return monitoring.monitor(**options)
