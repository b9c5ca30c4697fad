"""`srde-ds report`: shows a run on one page, or compares several runs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from srde_ds.cli.flags import Parser
from srde_ds.config.values import option
from srde_ds.errors import SRDEError
from srde_ds.utils.escape import terminal

COMPARISON = "comparison.html"


@dataclass(frozen=True)
class ReportOptions:
    """Which runs to show, and where to write the page."""

    run: list[str] = option(
        [],
        "folder of a run, finished or not; several runs are compared on one page",
        metavar="RUN",
        aliases=("weights", "checkpoint", "srde_weights"),
        required=True,
    )
    output_file: str | None = option(
        None,
        "HTML file to write (default: report.html in the run's folder; for several runs comparison.html here)",
        metavar="FILE",
        aliases=("output",),
    )


def report(arguments: Sequence[str]) -> None:
    """Write the page of a run and print its answers, or the page that compares several."""
    parser = Parser(
        "srde-ds report",
        "Show a run on one page, report.html, which opens offline; also report.md and its plots if it was evaluated.",
        usage="RUN [RUN...]",
        positional="run",
        many=True,
    )
    parser.add_options(ReportOptions)
    given = parser.parse(arguments)
    if isinstance(given.get("run"), str):
        given["run"] = [given["run"]]  # a path may contain a comma
    options = parser.options(ReportOptions, given)
    target = None if options.output_file is None else Path(options.output_file)
    if target is not None and (target.is_dir() or not target.parent.is_dir()):
        reason = "it is a folder" if target.is_dir() else f"there is no folder '{target.parent}'"
        raise SRDEError(f"output_file={target}: {reason}. Give another --output_file.")

    if len(options.run) > 1:
        from srde_ds.evaluation.comparison_page import write_comparison_page

        page = write_comparison_page(options.run, target or Path(COMPARISON))
        print(terminal(f"Report: {page}"))
        return
    from srde_ds.evaluation.run_page import write_run_page
    from srde_ds.weights.locate import run_folder

    (run,) = options.run
    markdown = None
    if (run_folder(run) / "evaluation.json").is_file():
        from srde_ds.evaluation.report import examples, write_report

        markdown = write_report(run)
        print(terminal(f"{examples(markdown)}\n"))
    page = write_run_page(run, target)
    if markdown is None:
        print("Not evaluated yet, so there is no report.md; `srde-ds evaluate` fills in what is missing.")
    else:
        print(terminal(f"Report: {markdown}"))
    print(terminal(f"Report: {page}"))
