"""`srde-ds rename`: writes weights with other names for their experts."""

from __future__ import annotations

from collections.abc import Sequence

from srde_ds.cli.flags import Parser
from srde_ds.compose.options import RenameOptions


def rename(arguments: Sequence[str]) -> None:
    """Write weights with other names for their experts, and print the path."""
    parser = Parser(
        "srde-ds rename",
        "Write weights with other names for their experts.",
        usage="WEIGHTS --names OLD=NEW,... --output FILE",
        positional="weights",
    )
    parser.add_options(RenameOptions)
    options = parser.options(RenameOptions, parser.parse(arguments))

    from srde_ds.compose.names import rename_command

    print(rename_command(options.weights, options.names, options.output))
