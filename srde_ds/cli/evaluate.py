"""`srde-ds evaluate`: loss and accuracy on held-out items."""

from __future__ import annotations

from collections.abc import Sequence

from srde_ds.cli.flags import Parser
from srde_ds.evaluation.options import EvaluateOptions


def evaluate(arguments: Sequence[str]) -> None:
    """Evaluate weights as the command line says."""
    parser = Parser(
        "srde-ds evaluate",
        "Measure loss and accuracy on held-out items, by domain.",
        usage="WEIGHTS --eval_file FILE [options]",
        positional="weights",
    )
    parser.add_options(EvaluateOptions)
    parser.add_launcher_flag()
    options = parser.options(EvaluateOptions, parser.parse(arguments))

    from srde_ds.evaluation.command import evaluate_command

    evaluate_command(options)
