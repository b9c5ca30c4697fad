"""`srde-ds evaluate`: measures loss and accuracy on held-out items."""

from __future__ import annotations

from collections.abc import Sequence

from srde_ds.cli.flags import READING, Parser
from srde_ds.config import resolve
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
    parser.add_config_options(only=READING)
    parser.add_launcher_flag()
    given = parser.parse(arguments)
    options = parser.options(EvaluateOptions, given)
    reading = resolve({}, given).data

    from srde_ds.evaluation.command import evaluate_command

    evaluate_command(options, reading)
