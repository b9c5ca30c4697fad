"""The verb `inference`: answer one prompt or a file of prompts, or chat."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from srde_ds.errors import SRDEError
from srde_ds.inference.chat import Chat
from srde_ds.inference.generate import format_routing, generate
from srde_ds.inference.load import find_weights, load_model
from srde_ds.inference.many import Answer, answer_many
from srde_ds.inference.output import check_output, write_lines
from srde_ds.inference.prompts import read_prompts
from srde_ds.model.adapter import SRDEModel
from srde_ds.utils.escape import json_line, terminal


def inference_command(
    *,
    srde_weights: str,
    base: str | None,
    allow_download: bool,
    prompt: str | None,
    prompts_file: str | None,
    output_file: str | None,
    interactive: bool,
    expert: str | None,
    best_of_n: int,
    self_refine: int,
    batch_size: int,
    max_tokens: int,
    temperature: float,
    top_p: float,
    stream: bool,
    show_routing: bool,
    bf16: bool,
    seed: int,
) -> None:
    """Answer on standard output or in `output_file`, or hold a conversation over standard input and output.

    Raises:
        SRDEError: options that contradict each other, an empty prompt, missing weights, a wrong base.
    """
    check_options(locals())
    conversations = read_prompts(prompts_file) if prompts_file is not None else []
    model, tokenizer = load_model(find_weights(srde_weights), base=base, bf16=bf16, allow_download=allow_download)
    if expert is not None:
        model.set_active_experts(expert)
    torch.manual_seed(seed)
    sampling = {"max_tokens": max_tokens, "temperature": temperature, "top_p": top_p}
    several = {"batch_size": batch_size, "best_of_n": best_of_n, "self_refine": self_refine}
    if interactive:
        streams = {"source": sys.stdin, "target": sys.stdout}
        Chat(model, tokenizer, **streams, stream=stream, show_routing=show_routing, **sampling).run()  # type: ignore[arg-type]
    elif prompts_file is not None:
        places, messages = zip(*conversations, strict=True)
        answers = answer_many(model, tokenizer, messages, places=places, **sampling, **several)  # type: ignore[arg-type]
        items = [_item(question, answer) for question, answer in zip(messages, answers, strict=True)]
        lines = [json.dumps(item, ensure_ascii=False) for item in items]
        if output_file is None:
            print("\n".join(map(json_line, lines)))
        else:
            write_lines(Path(output_file), lines)
    else:
        question = [{"role": "user", "content": str(prompt)}]
        if best_of_n > 1 or self_refine:
            answer = answer_many(model, tokenizer, [question], **sampling, **several)[0]  # type: ignore[arg-type]
            print(terminal(_shown(answer)))
        else:
            _answer_one(model, tokenizer, question, stream=stream, show_routing=show_routing, **sampling)


def check_options(options: Mapping[str, Any]) -> None:
    """Raise SRDEError for options that contradict each other, before anything is loaded."""
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
            f"best_of_n={options['best_of_n']} with temperature=0: all samples are equal; raise temperature."
        )
    if options["output_file"] is not None and options["prompts_file"] is None:
        raise SRDEError("--output_file is for the answers to --prompts_file; give that too, or redirect the output.")
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
                raise SRDEError(f"--{name} shows one answer as it comes, --{other} makes several; leave one out.")


def _answer_one(
    model: SRDEModel,
    tokenizer: PreTrainedTokenizerBase,
    messages: list[dict[str, str]],
    *,
    stream: bool,
    show_routing: bool,
    **sampling: Any,
) -> None:
    show = (lambda piece: print(terminal(piece), end="", flush=True)) if stream else None
    generation = generate(model, tokenizer, messages, stream=show, show_routing=show_routing, **sampling)
    print("" if stream else terminal(generation.text))
    if show_routing:
        print(terminal(format_routing(generation, model.expert_names)))


def _item(messages: list[dict[str, str]], answer: Answer) -> dict[str, Any]:
    """An answer's line in the output file: of a conversation with one message the prompt is its text."""
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
