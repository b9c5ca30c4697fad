"""`srde-ds inference`: ask a trained model."""

from __future__ import annotations

from collections.abc import Sequence

from srde_ds.cli.flags import Parser


def inference(arguments: Sequence[str]) -> None:
    parser = Parser(prog="srde-ds inference", description="Ask a trained model.")
    parser.add_argument("--srde_weights", required=True, help="srde_weights.safetensors, or a finished run's folder")
    parser.add_argument("--base", help="folder or id of the base, if it is not where it was in training")
    parser.boolean("--allow_download", False, "fetch the base that the weights name from the Hub, if it is not here")
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
