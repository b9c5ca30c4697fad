"""`srde-ds report`: a run as one page."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from srde_ds.cli.flags import Parser
from srde_ds.config.values import option
from srde_ds.utils.escape import terminal


@dataclass(frozen=True)
class ReportOptions:
    """Which run."""

    run: str = option(
        "",
        "folder of a run that was trained and evaluated",
        metavar="RUN",
        aliases=("weights", "checkpoint", "srde_weights"),
        required=True,
    )


def report(arguments: Sequence[str]) -> None:
    """Write the page of a run and print its answers."""
    parser = Parser(
        "srde-ds report", "Describe a run on one page: report.md and its plots.", usage="RUN", positional="run"
    )
    parser.add_options(ReportOptions)
    options = parser.options(ReportOptions, parser.parse(arguments))

    from srde_ds.evaluation.report import examples, write_report

    page = write_report(options.run)
    print(terminal(f"{examples(page)}\n\nReport: {page}"))
