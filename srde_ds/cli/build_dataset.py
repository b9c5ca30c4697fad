"""`srde-ds build_dataset`: make a dataset from sources or from files."""

from __future__ import annotations

from collections.abc import Sequence

from srde_ds.cli.flags import READING, Parser, add_config_flags
from srde_ds.config import resolve


def build_dataset(arguments: Sequence[str]) -> None:
    parser = Parser(
        prog="srde-ds build_dataset", description="Make a dataset from sources, or rows from files as they are."
    )
    parser.add_argument(
        "--examples_per_domain", type=int, help="build from sources: documents of each domain, all splits"
    )
    parser.add_argument("--work_dir", default="data", help="folder; gets data.jsonl, tokenized/, README.md, report/")
    parser.add_argument(
        "--sources_file", metavar="FILE", help="YAML with domains and sources (default: the six domains)"
    )
    parser.boolean("--list_sources", False, "print the sources with licence, size and columns, and stop")
    parser.add_argument(
        "--on_missing_source", choices=["fail", "skip"], default="fail", help="a source that cannot be had"
    )
    parser.add_argument(
        "--on_shortfall",
        choices=["fail", "trim", "keep"],
        default="fail",
        help="a domain without enough clean documents: fail, as many of each domain, or unbalanced",
    )
    parser.add_argument("--validation_fraction", type=float, default=0.01, help="share of the documents held out")
    parser.add_argument("--test_fraction", type=float, default=0.01, help="share of the documents held out for the end")
    parser.add_argument("--near_duplicate_threshold", type=float, default=0.8, help="similarity that makes a duplicate")
    parser.add_argument(
        "--decontaminate_against",
        default="",
        metavar="SET,...",
        help="files of questions, or source:split, to keep out of training",
    )
    parser.boolean("--skip_download", False, "read no sources: tokenise work_dir/data.jsonl as it is")
    parser.boolean("--skip_tokenize", False, "stop after data.jsonl; needs no base")
    parser.boolean("--overwrite", False, "replace what work_dir holds if it is another dataset")
    parser.add_argument("--push_to_hub", "--repo_name", metavar="REPO", help="upload to the Hub, token from HF_TOKEN")
    parser.boolean("--private", True, "of --push_to_hub")
    parser.add_argument("--num_processes", type=int, help="default: one a core for sources, one for files")
    files = ("jsonl_data", "eval_file", *READING, "train_on")
    names = ("model_name", "model_revision", *files, "domains", "max_length", "too_long", "packing", "seed")
    add_config_flags(parser, only=names)
    given = vars(parser.parse(arguments))
    own = {key: given.pop(key) for key in list(given) if key not in names}
    config = resolve({}, given)
    domains = config.data.domains if "domains" in given or "domain" in given else None
    if own.pop("list_sources"):
        from srde_ds.data.sources.registry import choose_domains, load_sources, print_sources

        return print_sources(choose_domains(load_sources(own["sources_file"]), domains))

    from srde_ds.data.build.command import build_dataset_command

    build_dataset_command(config, domains=domains, **own)
