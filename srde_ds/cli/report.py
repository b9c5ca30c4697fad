"""`srde-ds report`: a run as one page."""

from __future__ import annotations

from collections.abc import Sequence

from srde_ds.cli.flags import Parser
from srde_ds.utils.escape import terminal


def report(arguments: Sequence[str]) -> None:
    parser = Parser(prog="srde-ds report", description="A run as one page: report.md and its plots.")
    parser.add_argument("--run", required=True, help="folder of a run that was trained and evaluated")
    options = parser.parse(arguments)

    from srde_ds.evaluation.report import examples, write_report

    page = write_report(options.run)
    print(terminal(f"{examples(page)}\n\nReport: {page}"))
