"""`srde-ds remove`: writes weights without some of their experts."""

from __future__ import annotations

from collections.abc import Sequence

from srde_ds.cli.flags import Parser
from srde_ds.compose.options import RemoveOptions


def remove(arguments: Sequence[str]) -> None:
    """Write weights without some of their experts, and print the path."""
    parser = Parser(
        "srde-ds remove",
        "Write weights without some of their experts.",
        usage="WEIGHTS --experts NAME,... --output FILE",
        positional="weights",
    )
    parser.add_options(RemoveOptions)
    options = parser.options(RemoveOptions, parser.parse(arguments))

    from srde_ds.compose.names import remove_command

    print(remove_command(options.weights, options.experts, options.output))
