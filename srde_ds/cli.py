"""The verbs of `srde-ds` and of the scripts in launch/. Heavy libraries load when a verb runs, not before."""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
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


def train_config(arguments: Sequence[str]) -> tuple[Config, bool]:
    """The resolved config of a `train` command line, and whether it is a dry run."""
    parser = _Parser(prog="srde-ds train", description="Train experts on a frozen base.")
    parser.add_argument("--config", metavar="FILE", help="YAML with sections and keys; flags take precedence")
    parser.boolean("--dry_run", False, "print the resolved config, parameters, memory and time line, and stop")
    parser.add_argument("--local_rank", help=argparse.SUPPRESS)  # the deepspeed launcher adds it
    _add_config_flags(parser)
    given = vars(parser.parse(arguments))
    path, dry_run = given.pop("config"), given.pop("dry_run")
    given.pop("local_rank")
    return resolve(load_yaml(path) if path else {}, given), dry_run


def _train(arguments: Sequence[str]) -> None:
    config, dry_run = train_config(arguments)
    if dry_run:
        from srde_ds.parallel.cost import describe_run
        from srde_ds.training.phases import describe_timeline

        text = describe_run(config, world_size=launched_world_size())
        if launched_rank() == 0:
            print(f"{text}\n\n{describe_timeline(config)}")
    else:
        from srde_ds.training.trainer import train

        train(config)


def _build_dataset(arguments: Sequence[str]) -> None:
    parser = _Parser(prog="srde-ds build_dataset", description="Tokenise and pack a JSONL into rows for training.")
    parser.add_argument("--work_dir", default="data", help="folder; the dataset is written to its tokenized/")
    parser.add_argument("--num_processes", type=int, default=1, help="tokenising processes")
    names = ("model_name", "model_revision", "jsonl_data", "eval_file", "domains", "max_length", "too_long", "seed")
    _add_config_flags(parser, only=names)
    given = vars(parser.parse(arguments))
    work_dir, num_processes = given.pop("work_dir"), given.pop("num_processes")
    config = resolve({}, given)
    model, data = config.model, config.data
    if not model.model_name or not data.jsonl_data:
        missing = "jsonl_data" if model.model_name else "model_name"
        raise SRDEError(f"{missing} is missing: give --{missing} (see {parser.prog} --help)")
    if num_processes < 1:
        raise SRDEError(f"num_processes={num_processes}: must be at least 1.")

    from srde_ds.data.build import build_dataset
    from srde_ds.model.base import load_tokenizer

    folder = Path(work_dir) / "tokenized"
    manifest = build_dataset(
        tokenizer=load_tokenizer(model.model_name, revision=model.model_revision),
        jsonl_data=data.jsonl_data,
        eval_file=data.eval_file,
        output_dir=folder,
        domains=data.domains,
        max_length=data.max_length,
        too_long=data.too_long,
        seed=config.training.seed,
        num_processes=num_processes,
    )
    for split, counts in manifest.splits.items():
        print(f"{split}: {counts.rows} rows, {counts.fill_rate:.1%} of their positions used")
    print(f"Dataset: {folder}")


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
    parser = _Parser(prog="srde-ds convert", description="Turn a checkpoint into single-file weights.")
    parser.add_argument("--checkpoint", required=True, help="run folder or checkpoint-<step>")
    parser.add_argument("--output_file", default="srde_weights.safetensors", help="file to write")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32", help="type of the weights")
    options = parser.parse(arguments)

    import torch

    from srde_ds.checkpoint.convert import export_weights
    from srde_ds.checkpoint.resume import find_checkpoint

    source = find_checkpoint(options.checkpoint, options.checkpoint, field="checkpoint")
    print(export_weights(source, options.output_file, dtype=getattr(torch, options.dtype)))


def _report(arguments: Sequence[str]) -> None:
    parser = _Parser(prog="srde-ds report", description="A run as one page: report.md and its plots.")
    parser.add_argument("--run", required=True, help="folder of a run that was trained and evaluated")
    options = parser.parse(arguments)

    from srde_ds.evaluation.report import examples, write_report

    page = write_report(options.run)
    print(f"{examples(page)}\n\nReport: {page}")


VERBS: dict[str, Callable[[Sequence[str]], None]] = {
    "train": _train,
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
