"""The verb `inference`: answer one prompt, or chat."""

from __future__ import annotations

import sys
from functools import partial

import torch

from srde_ds.errors import SRDEError
from srde_ds.inference.chat import chat
from srde_ds.inference.generate import format_routing, generate
from srde_ds.inference.load import find_weights, load_model


def inference_command(
    *,
    srde_weights: str,
    base: str | None,
    prompt: str | None,
    interactive: bool,
    max_tokens: int,
    temperature: float,
    top_p: float,
    stream: bool,
    show_routing: bool,
    bf16: bool,
    seed: int,
) -> None:
    """Answer `prompt` on standard output, or hold a conversation over standard input and output.

    Raises:
        SRDEError: not exactly one of `prompt` and `interactive`, an empty prompt, missing weights, a wrong base.
    """
    if interactive == (prompt is not None):
        raise SRDEError("give either --prompt TEXT or --interactive.")
    if prompt is not None and not prompt.strip():
        raise SRDEError("prompt='': give a text.")
    model, tokenizer = load_model(find_weights(srde_weights), base=base, bf16=bf16)
    torch.manual_seed(seed)
    if prompt is None:
        chat(
            model,
            tokenizer,
            source=sys.stdin,
            target=sys.stdout,
            max_tokens=max_tokens,
            temperature=temperature,
            top_p=top_p,
            stream=stream,
            show_routing=show_routing,
        )
        return
    generation = generate(
        model,
        tokenizer,
        [{"role": "user", "content": prompt}],
        max_tokens=max_tokens,
        temperature=temperature,
        top_p=top_p,
        stream=partial(print, end="", flush=True) if stream else None,
        show_routing=show_routing,
    )
    print("" if stream else generation.text)
    if show_routing:
        print(format_routing(generation, model.expert_names))
