"""The verbs of `srde-ds` and of the scripts in launch/. Heavy libraries load when a verb runs, not before."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

from srde_ds.config import DOMAINS, Config, load_yaml, resolve
from srde_ds.errors import SRDEError, nearest


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
    values = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}
    if text.lower() not in values:
        raise argparse.ArgumentTypeError(f"'{text}': must be true or false")
    return values[text.lower()]


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]


def _add_config_flags(parser: _Parser) -> None:
    """One flag for each field of the config; only flags that were given end up in the namespace."""
    config = Config()
    for section in fields(config):
        values = getattr(config, section.name)
        hints = get_type_hints(type(values))
        group = parser.add_argument_group(section.name)
        for field in fields(values):
            hint, default = hints[field.name], getattr(values, field.name)
            flags = [f"--{name}" for name in (field.name, *field.metadata["aliases"])]
            shown = ",".join(default) if isinstance(default, list) else default
            options: dict[str, Any] = {
                "dest": field.name,
                "default": argparse.SUPPRESS,
                "help": f"{field.metadata['help']} (default: {shown})".replace("%", "%%"),
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
    parser.boolean("--dry_run", False, "print the resolved config, the parameters and the memory, and stop")
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

        print(describe_run(config, world_size=int(os.environ.get("WORLD_SIZE", "1"))))
    else:
        from srde_ds.training.trainer import train

        train(config)


def _build_dataset(arguments: Sequence[str]) -> None:
    parser = _Parser(prog="srde-ds build_dataset", description="Tokenise and pack a JSONL into rows for training.")
    parser.add_argument("--jsonl_data", required=True, help="training JSONL")
    parser.add_argument("--eval_file", help="held-out JSONL")
    parser.add_argument("--model_name", required=True, help="base whose tokenizer and chat template are used")
    parser.add_argument("--work_dir", default="data", help="folder; the dataset is written to its tokenized/")
    parser.add_argument("--domains", type=_names, default=list(DOMAINS), help="domain names joined by commas")
    parser.add_argument("--max_length", type=int, default=2048, help="tokens in a packed row")
    parser.add_argument("--too_long", choices=["error", "drop", "truncate"], default="drop", help="longer documents")
    parser.add_argument("--seed", type=int, default=42, help="seed of the document order")
    parser.add_argument("--num_processes", type=int, default=1, help="tokenising processes")
    options = parser.parse(arguments)

    from srde_ds.data.build import build_dataset
    from srde_ds.model.base import load_tokenizer

    folder = Path(options.work_dir) / "tokenized"
    manifest = build_dataset(
        tokenizer=load_tokenizer(options.model_name),
        jsonl_data=options.jsonl_data,
        eval_file=options.eval_file,
        output_dir=folder,
        domains=options.domains,
        max_length=options.max_length,
        too_long=options.too_long,
        seed=options.seed,
        num_processes=options.num_processes,
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
    parser.add_argument("--srde_weights", required=True, help="srde_weights.safetensors, a run or checkpoint folder")
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

    source = find_checkpoint(options.checkpoint, options.checkpoint)
    print(export_weights(source, options.output_file, dtype=getattr(torch, options.dtype)))


VERBS: dict[str, Callable[[Sequence[str]], None]] = {
    "train": _train,
    "build_dataset": _build_dataset,
    "evaluate": _evaluate,
    "inference": _inference,
    "convert": _convert,
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a verb. Returns the exit status: 0, or 2 for bad input, which is printed as one line."""
    arguments = sys.argv[1:] if arguments is None else arguments
    try:
        if not arguments or arguments[0] in ("-h", "--help"):
            print(f"usage: srde-ds {{{','.join(VERBS)}}} [options]\n\n`srde-ds VERB --help` lists the options of a verb.")
            return 0
        verb = arguments[0]
        if verb not in VERBS:
            raise SRDEError(f"unknown verb '{verb}': choose one of {', '.join(VERBS)}.{nearest(verb, VERBS)}")
        VERBS[verb](arguments[1:])
    except SRDEError as error:
        rank = os.environ.get("RANK", "0")
        print(f"srde-ds: error: {f'rank {rank}: ' if rank != '0' else ''}{error}", file=sys.stderr, flush=True)
        return 2
    return 0


def entry_point() -> None:
    """The console command."""
    sys.exit(main())
