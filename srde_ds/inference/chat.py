"""A conversation in the terminal, or with any two streams of lines."""

from __future__ import annotations

from functools import partial
from typing import TextIO

from transformers import PreTrainedTokenizerBase

from srde_ds.errors import SRDEError, nearest
from srde_ds.inference.generate import format_routing, generate
from srde_ds.model.adapter import SRDEModel

COMMANDS = {"/reset": "forget the conversation", "/experts": "show the experts of each token", "/quit": "end"}


def chat(
    model: SRDEModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    source: TextIO,
    target: TextIO,
    max_tokens: int,
    temperature: float,
    top_p: float,
    stream: bool,
    show_routing: bool,
) -> None:
    """Answer lines of `source` on `target` until `/quit` or the end of `source`.

    Ctrl-C stops an answer, which is then forgotten with its question; at the prompt it ends the conversation.
    """
    say = partial(print, file=target, flush=True)
    say("Type a message. " + ", ".join(f"{name}: {what}" for name, what in COMMANDS.items()) + ".")
    history: list[dict[str, str]] = []
    while (line := _read(source, target)) is not None:
        if line == "/quit":
            break
        if line == "/reset":
            history = []
            say("The conversation is forgotten.")
        elif line == "/experts":
            show_routing = not show_routing
            say(f"Experts are {'shown' if show_routing else 'hidden'} from now on.")
        elif line.startswith("/"):
            say(f"Unknown command '{line}': there are {', '.join(COMMANDS)}.{nearest(line, COMMANDS)}")
        elif line:
            messages = [*history, {"role": "user", "content": line}]
            try:
                generation = generate(
                    model,
                    tokenizer,
                    messages,
                    max_tokens=max_tokens,
                    temperature=temperature,
                    top_p=top_p,
                    stream=partial(say, end="") if stream else None,
                    show_routing=show_routing,
                )
            except KeyboardInterrupt:
                say("\nStopped; the question is forgotten.")
                continue
            except SRDEError as error:
                say(f"{error} (/reset forgets the conversation)")
                continue
            say("" if stream else generation.text)
            if show_routing:
                say(format_routing(generation, model.expert_names))
            history = [*messages, {"role": "assistant", "content": generation.text}]


def _read(source: TextIO, target: TextIO) -> str | None:
    """The next line without surrounding white space; None at the end of `source` or on Ctrl-C."""
    print("> ", end="", file=target, flush=True)
    try:
        line = source.readline()
    except KeyboardInterrupt:
        line = ""
    if not line:
        print(file=target)
        return None
    return line.strip()
