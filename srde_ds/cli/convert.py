"""`srde-ds convert`: trained experts as files for others to load."""

from __future__ import annotations

from collections.abc import Sequence

from srde_ds.cli.flags import Parser
from srde_ds.export.options import ConvertOptions


def convert(arguments: Sequence[str]) -> None:
    """Convert weights as the command line says, and print the path that was written."""
    parser = Parser(
        "srde-ds convert",
        "Write trained experts as files that other programs load.",
        usage="WEIGHTS [--to weights|peft|dense|moe|gguf] [--output PATH] [options]",
        positional="weights",
    )
    parser.add_options(ConvertOptions)
    options = parser.options(ConvertOptions, parser.parse(arguments))

    from srde_ds.export.command import convert_command

    print(convert_command(options))
