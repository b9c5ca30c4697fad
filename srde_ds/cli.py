"""The verbs of `srde-ds` and of the scripts in launch/. Heavy libraries load when a verb runs, not before."""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields
from typing import Any, Literal, get_args, get_origin, get_type_hints

from srde_ds import __version__
from srde_ds.config import Config, resolve
from srde_ds.config_values import BOOLEANS, load_yaml
from srde_ds.errors import SRDEError, nearest
from srde_ds.launcher import launched_rank, launched_world_size


class _Parser(argparse.ArgumentParser):
    """Errors become SRDEError: one line, and the nearest known flag for an unknown one."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(allow_abbrev=False, formatter_class=argparse.ArgumentDefaultsHelpFormatter, **kwargs)

    def error(self, message: str) -> Any:
        raise SRDEError(f"{message} (see {self.prog} --help)")

    def parse(self, arguments: Sequence[str]) -> argparse.Namespace:
        namespace, unknown = self.parse_known_args(arguments)
        if unknown:
            name = unknown[0].split("=")[0]
            known = [flag for action in self._actions for flag in action.option_strings]
            raise SRDEError(f"unknown argument '{name}'.{nearest(name, known)} (see {self.prog} --help)")
        return namespace

    def boolean(self, flag: str, default: bool, help: str) -> None:
        self.add_argument(flag, nargs="?", const=True, default=default, type=_boolean, metavar="true|false", help=help)


def _boolean(text: str) -> bool:
    if text.lower() not in BOOLEANS:
        raise argparse.ArgumentTypeError(f"'{text}': must be true or false")
    return BOOLEANS[text.lower()]


def _add_config_flags(parser: _Parser, only: Sequence[str] | None = None) -> None:
    """One flag for each field of the config, or for those in `only`; just the given ones end up in the namespace."""
    config = Config()
    for section in fields(config):
        values = getattr(config, section.name)
        hints = get_type_hints(type(values))
        chosen = [field for field in fields(values) if only is None or field.name in only]
        group = parser.add_argument_group(section.name) if chosen else parser
        for field in chosen:
            hint, default = hints[field.name], getattr(values, field.name)
            flags = [f"--{name}" for name in (field.name, *field.metadata["aliases"])]
            shown = ",".join(default) if isinstance(default, list) else default
            text = field.metadata["help"] + ("" if default is None else f" (default: {shown})")
            options: dict[str, Any] = {
                "dest": field.name,
                "default": argparse.SUPPRESS,
                "help": text.replace("%", "%%"),
            }
            if hint is bool:
                options.update(nargs="?", const="true", metavar="true|false")
            else:
                choices = "|".join(get_args(hint)) if get_origin(hint) is Literal else None
                options.update(metavar=choices or "VALUE")
            group.add_argument(*flags, **options)


def _resolved(given: dict[str, Any]) -> Config:
    """The config of the flags, with `config` naming the YAML file that they take precedence over."""
    path = given.pop("config")
    return resolve(load_yaml(path) if path else {}, given)


def train_config(arguments: Sequence[str]) -> tuple[Config, bool]:
    """The resolved config of a `train` command line, and whether it is a dry run."""
    parser = _Parser(prog="srde-ds train", description="Train experts on a frozen base.")
    parser.add_argument("--config", metavar="FILE", help="YAML with sections and keys; flags take precedence")
    parser.boolean("--dry_run", False, "print the resolved config, parameters, memory and time line, and stop")
    parser.add_argument("--local_rank", help=argparse.SUPPRESS)  # the deepspeed launcher adds it
    _add_config_flags(parser)
    given = vars(parser.parse(arguments))
    dry_run = given.pop("dry_run")
    given.pop("local_rank")
    return _resolved(given), dry_run


def _train(arguments: Sequence[str]) -> None:
    config, dry_run = train_config(arguments)
    if dry_run:
        from srde_ds.parallel.describe import describe_run
        from srde_ds.parallel.shapes import base_shape
        from srde_ds.training.phases import describe_timeline
        from srde_ds.training.stage_sizes import describe_stages

        parts = [describe_run(config, world_size=launched_world_size()), describe_timeline(config)]
        if config.curriculum.initial_density:
            parts.insert(1, describe_stages(config, base_shape(config).blocks))
        if launched_rank() == 0:
            print("\n\n".join(parts))
    else:
        from srde_ds.training.trainer import train

        train(config)


def _plan(arguments: Sequence[str]) -> None:
    parser = _Parser(
        prog="srde-ds plan", description="Memory, traffic, time and price of a run; needs a base's config.json alone."
    )
    parser.add_argument("--config", metavar="FILE", help="YAML of the run; flags take precedence")
    parser.add_argument("--output_file", help="JSON to write")
    machines = parser.add_argument_group("machines")
    machines.add_argument("--gpus", type=int, default=1, help="in each node")
    machines.add_argument("--nodes", type=int, default=1, help="that share a network")
    machines.add_argument("--gpu_memory_gib", type=float, default=72.0, help="of a GPU that tensors may take")
    machines.add_argument("--peak_tflops", type=float, default=989.0, help="of a GPU in the training dtype, dense")
    machines.add_argument("--utilisation", type=float, default=0.4, help="share of the peak that computation reaches")
    machines.add_argument("--intra_node_gb_s", type=float, default=450.0, help="GB/s into a GPU from its node")
    machines.add_argument("--inter_node_gbit_s", type=float, default=400.0, help="Gbit/s into a node from the others")
    machines.add_argument("--labelled_share", type=float, default=1.0, help="share of positions that carry a label")
    machines.add_argument("--hourly_price", type=float, help="of one GPU")
    _add_config_flags(parser)
    given = vars(parser.parse(arguments))

    output_file = given.pop("output_file")

    from srde_ds.parallel.describe import describe_plan
    from srde_ds.parallel.plan import Machines, make_plan, write_plan

    own = {field.name: given.pop(field.name) for field in fields(Machines)}
    plan = make_plan(_resolved(given), Machines(**own))
    print(describe_plan(plan))
    if output_file:
        write_plan(plan, output_file)
        print(f"Plan: {output_file}")


def _build_dataset(arguments: Sequence[str]) -> None:
    parser = _Parser(
        prog="srde-ds build_dataset", description="Make a dataset from sources, or rows from a JSONL file as it is."
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
        help="JSONL files, or source:split, to keep out of training",
    )
    parser.boolean("--skip_download", False, "read no sources: tokenise work_dir/data.jsonl as it is")
    parser.boolean("--skip_tokenize", False, "stop after data.jsonl; needs no base")
    parser.boolean("--overwrite", False, "replace work_dir/tokenized if it holds another dataset")
    parser.add_argument("--push_to_hub", "--repo_name", metavar="REPO", help="upload to the Hub, token from HF_TOKEN")
    parser.boolean("--private", True, "of --push_to_hub")
    parser.add_argument("--num_processes", type=int, help="default: one a core for sources, one for a JSONL file")
    names = ("model_name", "model_revision", "jsonl_data", "eval_file", "domains", "max_length", "too_long", "seed")
    _add_config_flags(parser, only=names)
    given = vars(parser.parse(arguments))
    own = {key: given.pop(key) for key in list(given) if key not in names}
    config = resolve({}, given)
    domains = config.data.domains if "domains" in given else None
    if own.pop("list_sources"):
        from srde_ds.data.sources import choose_domains, load_sources, print_sources

        return print_sources(choose_domains(load_sources(own["sources_file"]), domains))

    from srde_ds.data.command import build_dataset_command

    build_dataset_command(config, domains=domains, **own)


def _evaluate(arguments: Sequence[str]) -> None:
    parser = _Parser(prog="srde-ds evaluate", description="Loss and accuracy on held-out items, by domain.")
    parser.add_argument("--checkpoint", required=True, help="run folder, checkpoint-<step> or srde_weights.safetensors")
    parser.add_argument("--eval_file", required=True, help="held-out JSONL with answers")
    parser.add_argument("--base", help="folder or id of the base, if it is not where it was in training")
    parser.boolean("--compare_baseline", False, "also run the bare base on the same items")
    parser.add_argument("--max_samples", type=int, default=1000, help="items, taken evenly from the domains")
    parser.add_argument("--max_new_tokens", type=int, default=64, help="longest generated answer")
    parser.add_argument("--batch_size", type=int, default=32, help="items in a batch")
    parser.boolean("--bf16", True, "compute in bfloat16")
    parser.add_argument("--seed", type=int, default=42, help="seed of the bootstrap")
    parser.add_argument("--output_file", help="JSON; default: evaluation.json beside the weights")
    options = parser.parse(arguments)

    from srde_ds.evaluation.command import evaluate_command

    evaluate_command(**vars(options))


def _inference(arguments: Sequence[str]) -> None:
    parser = _Parser(prog="srde-ds inference", description="Ask a trained model.")
    parser.add_argument("--srde_weights", required=True, help="srde_weights.safetensors, or a finished run's folder")
    parser.add_argument("--base", help="folder or id of the base, if it is not where it was in training")
    parser.add_argument("--prompt", help="one question")
    parser.boolean("--interactive", False, "chat; /experts shows routing, /reset forgets, /quit ends")
    parser.add_argument("--max_tokens", type=int, default=256, help="longest answer")
    parser.add_argument("--temperature", type=float, default=0.7, help="0: greedy")
    parser.add_argument("--top_p", type=float, default=0.9, help="nucleus of the sampling distribution")
    parser.boolean("--stream", False, "print tokens as they come")
    parser.boolean("--show_routing", False, "print the experts that each token used")
    parser.boolean("--bf16", True, "compute in bfloat16")
    parser.add_argument("--seed", type=int, default=42, help="seed of the sampling")
    options = parser.parse(arguments)

    from srde_ds.inference.command import inference_command

    inference_command(**vars(options))


def _convert(arguments: Sequence[str]) -> None:
    parser = _Parser(prog="srde-ds convert", description="Trained experts as files for others to load.")
    parser.add_argument("--checkpoint", required=True, help="run folder, checkpoint-<step> or srde_weights.safetensors")
    parser.add_argument(
        "--to",
        choices=["weights", "dense", "moe", "gguf"],
        default="weights",
        help="the adapter in one file; the base with one expert merged; a stock mixture of experts for transformers "
        "and vLLM; the same for llama.cpp",
    )
    parser.add_argument(
        "--output",
        "--output_file",
        metavar="PATH",
        help="file, of dense and moe folder, to write (default: srde_weights.safetensors, dense, moe, model.gguf)",
    )
    parser.add_argument(
        "--dtype", choices=["float32", "bfloat16"], help="type of the weights (default: float32, or the base's)"
    )
    parser.add_argument("--experts", metavar="NAME,...", help="leave out all other experts")
    parser.add_argument("--expert", metavar="NAME", help="dense: the expert to merge")
    parser.add_argument("--base", help="folder or id of the base, if it is not where it was in training")
    parser.add_argument("--gguf_converter", metavar="FILE", help="gguf: llama.cpp's convert_hf_to_gguf.py")
    options = vars(parser.parse(arguments))
    experts = options.pop("experts")

    from srde_ds.checkpoint.command import convert_command

    print(convert_command(experts=None if experts is None else experts.split(","), **options))


def _report(arguments: Sequence[str]) -> None:
    parser = _Parser(prog="srde-ds report", description="A run as one page: report.md and its plots.")
    parser.add_argument("--run", required=True, help="folder of a run that was trained and evaluated")
    options = parser.parse(arguments)

    from srde_ds.evaluation.report import examples, write_report

    page = write_report(options.run)
    print(f"{examples(page)}\n\nReport: {page}")


VERBS: dict[str, Callable[[Sequence[str]], None]] = {
    "train": _train,
    "plan": _plan,
    "build_dataset": _build_dataset,
    "evaluate": _evaluate,
    "inference": _inference,
    "convert": _convert,
    "report": _report,
}


@contextmanager
def _console() -> Iterator[None]:
    """On rank 0 the package's messages go to stderr, and progress bars only if that is a terminal."""
    if launched_rank() != 0 or not sys.stderr.isatty():
        # Read when datasets and huggingface_hub (for transformers too) are imported, here and in child processes.
        os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    logger, handler = logging.getLogger("srde_ds"), logging.StreamHandler()
    handler.setFormatter(logging.Formatter("srde-ds: %(message)s"))
    before = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO if launched_rank() == 0 else logging.WARNING)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(before)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a verb. Returns the exit status: 0, or 2 for bad input, which is printed as one line."""
    arguments = sys.argv[1:] if arguments is None else arguments
    try:
        if not arguments or arguments[0] in ("-h", "--help"):
            print(f"usage: srde-ds {{{','.join(VERBS)}}} [options]\n")
            print("`srde-ds VERB --help` lists the options of a verb, `srde-ds --version` the version.")
            return 0
        if arguments[0] == "--version":
            print(__version__)
            return 0
        verb = arguments[0]
        if verb not in VERBS:
            raise SRDEError(f"unknown verb '{verb}': choose one of {', '.join(VERBS)}.{nearest(verb, VERBS)}")
        with _console():
            VERBS[verb](arguments[1:])
    except SRDEError as error:
        place = f"rank {launched_rank()}: " if launched_rank() else ""
        print(f"srde-ds: error: {place}{error}", file=sys.stderr, flush=True)
        return 2
    return 0


def entry_point() -> None:
    """The console command."""
    sys.exit(main())
