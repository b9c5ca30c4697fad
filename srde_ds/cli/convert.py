"""`srde-ds convert`: writes trained experts as files for other programs."""

from __future__ import annotations

from collections.abc import Sequence

from srde_ds.cli.flags import Parser
from srde_ds.export.options import ConvertOptions


def convert(arguments: Sequence[str]) -> None:
    """Convert weights as the command line says, and print the path of the result."""
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
