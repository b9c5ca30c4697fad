"""`srde-ds chat`: a conversation with a trained model in the browser."""

from __future__ import annotations

from collections.abc import Sequence

from srde_ds.cli.flags import Parser
from srde_ds.inference.page.options import ChatOptions


def chat(arguments: Sequence[str]) -> None:
    """Serve the page as the command line says."""
    parser = Parser(
        "srde-ds chat",
        "Talk to a trained model on a page in the browser: its answers, the base's, and the experts of each token.",
        usage="WEIGHTS [options]",
        positional="weights",
    )
    parser.add_options(ChatOptions)
    options = parser.options(ChatOptions, parser.parse(arguments))

    from srde_ds.inference.page.command import chat_command

    chat_command(options)
