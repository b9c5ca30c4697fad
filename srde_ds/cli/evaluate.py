"""`srde-ds evaluate`: loss and accuracy on held-out items."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from srde_ds.cli.flags import Parser


def evaluate(arguments: Sequence[str]) -> None:
    parser = Parser(prog="srde-ds evaluate", description="Loss and accuracy on held-out items, by domain.")
    parser.add_argument("--checkpoint", required=True, help="run folder, checkpoint-<step> or srde_weights.safetensors")
    parser.add_argument("--eval_file", required=True, help="held-out JSONL with answers")
    parser.add_argument("--base", help="folder or id of the base, if it is not where it was in training")
    parser.boolean("--allow_download", False, "fetch the base that the weights name from the Hub, if it is not here")
    parser.boolean("--compare_baseline", False, "also run the bare base on the same items")
    parser.boolean("--each_expert", False, "also the loss of every domain with each expert alone")
    parser.boolean("--run_code", False, "score items with tests: run the programs that the model writes, in a sandbox")
    parser.add_argument(
        "--sandbox",
        choices=["bubblewrap", "none"],
        default="bubblewrap",
        help="of run_code; none: programs can do all that you can",
    )
    parser.add_argument("--max_samples", type=int, default=1000, help="items, taken evenly from the domains")
    parser.add_argument("--max_new_tokens", type=int, default=64, help="longest generated answer")
    parser.add_argument("--batch_size", type=int, default=32, help="items in a batch")
    parser.boolean("--bf16", True, "compute in bfloat16")
    parser.add_argument("--seed", type=int, default=42, help="seed of the bootstrap")
    parser.add_argument("--output_file", help="JSON; default: evaluation.json beside the weights")
    parser.add_argument("--local_rank", help=argparse.SUPPRESS)  # the deepspeed launcher adds it
    options = vars(parser.parse(arguments))
    options.pop("local_rank")

    from srde_ds.evaluation.command import evaluate_command

    evaluate_command(**options)
