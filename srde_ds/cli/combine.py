"""`srde-ds combine`: puts the experts of several adapters into one."""

from __future__ import annotations

from collections.abc import Sequence

from srde_ds.cli.flags import Parser
from srde_ds.compose.options import CombineOptions


def combine(arguments: Sequence[str]) -> None:
    """Combine adapters of one base, and print the path of the result."""
    parser = Parser(
        "srde-ds combine",
        "Put the experts of several adapters of one base into one. Routers are made from the statistics of the domains "
        "in the weights: neither data nor the base is needed.",
        usage="WEIGHTS WEIGHTS... --output FILE [options]",
        positional="weights",
        many=True,
    )
    parser.add_options(CombineOptions)
    options = parser.options(CombineOptions, parser.parse(arguments))

    from srde_ds.compose.combine import combine_command

    print(combine_command(options))
