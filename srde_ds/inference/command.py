"""The verb `inference`: answers one prompt or a file of prompts, or chats."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from srde_ds.config import DataConfig
from srde_ds.data.conversation import Message
from srde_ds.data.inputs import ReadOptions
from srde_ds.errors import SRDEError
from srde_ds.inference.chat import Chat
from srde_ds.inference.generate import Generation, Sampling, answer_length, format_routing, generate
from srde_ds.inference.load import load_model
from srde_ds.inference.many import Answer, answer_many
from srde_ds.inference.options import InferenceOptions
from srde_ds.inference.output import check_output, write_lines
from srde_ds.inference.prompts import Prompt, read_prompts
from srde_ds.model.adapter import SRDEModel
from srde_ds.utils.escape import json_line, terminal


def inference_command(options: InferenceOptions, reading: DataConfig | None = None) -> None:
    """Answer on standard output or in `output_file`, or hold a conversation over standard input and output.

    Raises:
        SRDEError: options contradict each other, a prompt is empty, weights are missing, or the base is wrong.
    """
    check_options(vars(options))
    how_read = ReadOptions.of(reading) if reading else None
    conversations = read_prompts(options.prompts_file, how_read) if options.prompts_file is not None else []
    model, tokenizer = load_model(options)
    if options.expert is not None:
        model.set_active_experts(options.expert)
    torch.manual_seed(options.seed)
    longest = answer_length(model, options.max_new_tokens)
    sampling = Sampling(longest, options.temperature, options.top_p)

    def answers_to(prompts: list[Prompt]) -> list[Answer]:
        several = {"batch_size": options.batch_size, "best_of_n": options.best_of_n, "self_refine": options.self_refine}
        return answer_many(model, tokenizer, prompts, sampling, **several)

    if options.interactive:
        shown = {"stream": options.stream, "show_routing": options.show_routing}
        Chat(model, tokenizer, sampling, source=sys.stdin, target=sys.stdout, **shown).run()
    elif options.prompts_file is not None:
        answers = answers_to(conversations)
        items = [_item(prompt.messages, answer) for prompt, answer in zip(conversations, answers, strict=True)]
        lines = [json.dumps(item, ensure_ascii=False) for item in items]
        if options.output_file is None:
            print("\n".join(map(json_line, lines)))
        else:
            write_lines(Path(options.output_file), lines)
    else:
        question = [{"role": "user", "content": str(options.prompt)}]
        if options.best_of_n > 1 or options.self_refine:
            (answer,) = answers_to([Prompt("prompt", question, None)])
            print(terminal(_shown(answer)))
        else:
            shown = {"stream": options.stream, "show_routing": options.show_routing}
            _answer_one(model, tokenizer, question, sampling, **shown)


def check_options(options: Mapping[str, Any]) -> None:
    """Raise an SRDEError for options that contradict each other, before anything is loaded."""
    ways = ["prompt", "prompts_file", "interactive"]
    given = [name for name in ways if options[name] is not None and options[name] is not False]
    if len(given) != 1:
        both = f", not {' and '.join(f'--{name}' for name in given)}" if given else ""
        raise SRDEError(f"give one of --prompt TEXT, --prompts_file FILE and --interactive{both}.")
    if options["prompt"] is not None and not options["prompt"].strip():
        raise SRDEError("prompt='': give a text.")
    for name, least in (("best_of_n", 1), ("self_refine", 0), ("batch_size", 1)):
        if options[name] < least:
            raise SRDEError(f"{name}={options[name]}: must be at least {least}.")
    if options["best_of_n"] > 1 and options["temperature"] == 0:
        raise SRDEError(
            f"best_of_n={options['best_of_n']} with temperature=0: all samples would be equal; raise temperature."
        )
    if options["output_file"] is not None and options["prompts_file"] is None:
        raise SRDEError("--output_file is for the answers to --prompts_file: give both, or redirect the output.")
    if options["output_file"] is not None:
        check_output(Path(options["output_file"]))
    for name, off in (("best_of_n", 1), ("self_refine", 0)):
        if options[name] != off and options["interactive"]:
            raise SRDEError(f"--{name} is for --prompt and --prompts_file, not for --interactive; leave one out.")
    for name in ("stream", "show_routing"):
        if options[name] and options["prompts_file"] is not None:
            raise SRDEError(f"--{name} is for --prompt and --interactive, not for --prompts_file; leave one out.")
        for other, off in (("best_of_n", 1), ("self_refine", 0)):
            if options[name] and options[other] != off:
                raise SRDEError(f"--{name} shows one answer as it comes, but --{other} makes several; leave one out.")


def _answer_one(
    model: SRDEModel,
    tokenizer: PreTrainedTokenizerBase,
    messages: list[Message],
    sampling: Sampling,
    *,
    stream: bool,
    show_routing: bool,
) -> None:
    shown = 0

    def show(answer: Generation) -> None:
        nonlocal shown
        print(terminal(answer.text[shown:]), end="", flush=True)
        shown = len(answer.text)

    generation = generate(
        model, tokenizer, messages, sampling, stream=show if stream else None, show_routing=show_routing
    )
    print("" if stream else terminal(generation.text))
    if show_routing:
        print(terminal(format_routing(generation, model.expert_names)))


def _item(messages: list[Message], answer: Answer) -> dict[str, Any]:
    """An answer's line in the output file. If the conversation has a single message, the prompt is its text."""
    item: dict[str, Any] = {"prompt": messages[0]["content"] if len(messages) == 1 else messages, "answer": answer.text}
    if len(answer.samples) > 1:
        item |= {"votes": answer.votes, "samples": answer.samples}
    return item | ({"drafts": answer.drafts} if answer.drafts else {})


def _shown(answer: Answer) -> str:
    parts = []
    if len(answer.samples) > 1:
        parts += [f"sample {number}: {text}" for number, text in enumerate(answer.samples, start=1)]
        parts.append(f"{answer.votes} of {len(answer.samples)} agree.")
    texts = [*answer.drafts, answer.text]
    if len(texts) == 1:
        return "\n".join([*parts, f"answer: {texts[0]}"])
    labels = ["first answer", *(f"refined, round {number}" for number in range(1, len(texts)))]
    return "\n".join([*parts, *(f"{label}: {text}" for label, text in zip(labels, texts, strict=True))])
