"""`srde-ds build_dataset`: make a dataset from sources or from files."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from srde_ds.cli.flags import READING, Parser, resolved
from srde_ds.config.values import option
from srde_ds.data.build.request import BuildRequest

FILES = ("jsonl_data", "eval_file", *READING, "train_on")
RUN_OPTIONS = ("model_name", "model_revision", *FILES, "domains", "max_length", "too_long", "packing", "seed")


@dataclass(frozen=True)
class Listing:
    """What to show instead of building."""

    list_sources: bool = option(False, "print the sources with licence, size and columns, and stop")


def build_dataset(arguments: Sequence[str]) -> None:
    """Build a dataset as the command line says."""
    parser = Parser(
        "srde-ds build_dataset",
        "Build a dataset from sources, or pack the records of files into rows as they are.",
        usage="(--examples_per_domain N | --jsonl_data FILES) [options]",
    )
    parser.add_options(Listing)
    parser.add_options(BuildRequest)
    parser.add_config_options(only=RUN_OPTIONS)
    given = parser.parse(arguments)
    listing, request = parser.options(Listing, given), parser.options(BuildRequest, given)
    by_name = "domains" in given or "domain" in given
    if listing.list_sources:
        from srde_ds.data.sources.registry import choose_domains, load_sources, print_sources

        domains = resolved(given).data.domains if by_name else None
        return print_sources(choose_domains(load_sources(request.sources_file), domains))

    from srde_ds.data.build.command import build_dataset_command, check_request
    from srde_ds.training.run_inputs import read_base_inputs

    early = resolved(dict(given))
    check_request(early.model.model_name, early.data, request)  # before the base is required
    config = resolved(given, read_base_inputs)
    build_dataset_command(config, request, domains=config.data.domains if by_name else None)
