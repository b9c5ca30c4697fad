"""`srde-ds inference`: asks a trained model."""

from __future__ import annotations

from collections.abc import Sequence

from srde_ds.cli.flags import READING, Parser
from srde_ds.config import resolve
from srde_ds.inference.options import InferenceOptions

READING_PROMPTS = tuple(name for name in READING if name != "domain")


def inference(arguments: Sequence[str]) -> None:
    """Answer as the command line says."""
    parser = Parser(
        "srde-ds inference",
        "Ask a trained model: one question, a file of questions, or a conversation.",
        usage="WEIGHTS (--prompt TEXT | --prompts_file FILE | --interactive) [options]",
        positional="weights",
    )
    parser.add_options(InferenceOptions)
    parser.add_config_options(only=READING_PROMPTS)
    given = parser.parse(arguments)
    options = parser.options(InferenceOptions, given)
    reading = resolve({}, given).data

    from srde_ds.inference.command import inference_command

    inference_command(options, reading)
