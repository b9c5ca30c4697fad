"""`srde-ds inspect`: shows what is in trained weights."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass

from srde_ds.cli.flags import Parser
from srde_ds.config.values import option, weights_option
from srde_ds.utils.escape import terminal


@dataclass(frozen=True)
class InspectOptions:
    """Which weights to describe, and how."""

    weights: str = weights_option()
    json: bool = option(False, "print JSON instead of text")


def inspect(arguments: Sequence[str]) -> None:
    """Print what is in an adapter."""
    parser = Parser(
        "srde-ds inspect",
        "Print what is in trained weights: base, experts, supports, norms, router, domains and history. The base is "
        "not loaded.",
        usage="WEIGHTS [--json]",
        positional="weights",
    )
    parser.add_options(InspectOptions)
    options = parser.options(InspectOptions, parser.parse(arguments))

    from srde_ds.compose.summary import inspect_weights

    summary = inspect_weights(options.weights)
    print(json.dumps(summary.to_dict(), indent=2) if options.json else terminal(summary.describe()))
