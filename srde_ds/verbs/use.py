"""What is done with trained experts: `evaluate`, `inference`, `convert` and `report`."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from srde_ds.verbs.flags import Parser


def evaluate(arguments: Sequence[str]) -> None:
    parser = Parser(prog="srde-ds evaluate", description="Loss and accuracy on held-out items, by domain.")
    parser.add_argument("--checkpoint", required=True, help="run folder, checkpoint-<step> or srde_weights.safetensors")
    parser.add_argument("--eval_file", required=True, help="held-out JSONL with answers")
    parser.add_argument("--base", help="folder or id of the base, if it is not where it was in training")
    parser.boolean("--compare_baseline", False, "also run the bare base on the same items")
    parser.boolean("--each_expert", False, "also the loss of every domain with each expert alone")
    parser.boolean("--run_code", False, "score items with tests: run the programs that the model writes, in a sandbox")
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


def inference(arguments: Sequence[str]) -> None:
    parser = Parser(prog="srde-ds inference", description="Ask a trained model.")
    parser.add_argument("--srde_weights", required=True, help="srde_weights.safetensors, or a finished run's folder")
    parser.add_argument("--base", help="folder or id of the base, if it is not where it was in training")
    parser.add_argument("--prompt", help="one question")
    parser.add_argument("--prompts_file", metavar="FILE", help="many: JSONL with prompt or messages, or one a line")
    parser.add_argument("--output_file", metavar="FILE", help="of prompts_file: JSONL (default: standard output)")
    parser.boolean("--interactive", False, "chat; /help lists its commands")
    parser.add_argument("--expert", metavar="NAME", help="use this expert alone")
    parser.add_argument("--best_of_n", type=int, default=1, metavar="N", help="the answer that most of N samples give")
    parser.add_argument("--self_refine", type=int, default=0, metavar="N", help="rounds of checking its own answer")
    parser.add_argument("--batch_size", type=int, default=16, help="of prompts_file: prompts in a batch")
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


def convert(arguments: Sequence[str]) -> None:
    parser = Parser(prog="srde-ds convert", description="Trained experts as files for others to load.")
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


def report(arguments: Sequence[str]) -> None:
    parser = Parser(prog="srde-ds report", description="A run as one page: report.md and its plots.")
    parser.add_argument("--run", required=True, help="folder of a run that was trained and evaluated")
    options = parser.parse(arguments)

    from srde_ds.evaluation.report import examples, write_report

    page = write_report(options.run)
    print(f"{examples(page)}\n\nReport: {page}")
