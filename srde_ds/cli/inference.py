"""`srde-ds inference`: ask a trained model."""

from __future__ import annotations

from collections.abc import Sequence

from srde_ds.cli.flags import Parser
from srde_ds.inference.options import InferenceOptions


def inference(arguments: Sequence[str]) -> None:
    """Answer as the command line says."""
    parser = Parser(
        "srde-ds inference",
        "Ask a trained model: one question, a file of questions, or a conversation.",
        usage="WEIGHTS (--prompt TEXT | --prompts_file FILE | --interactive) [options]",
        positional="weights",
    )
    parser.add_options(InferenceOptions)
    options = parser.options(InferenceOptions, parser.parse(arguments))

    from srde_ds.inference.command import inference_command

    inference_command(options)
