"""Text from a base with its experts: chat template, KV cache, streaming, and the experts that each token used."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedTokenizerBase
from transformers.generation.streamers import BaseStreamer

from srde_ds.data.conversation import Message, Tools
from srde_ds.data.packing import pad_token_id, prompt_ids, stop_ids
from srde_ds.errors import SRDEError
from srde_ds.model.adapter import SRDEModel
from srde_ds.model.policy import RoutingPolicy


@dataclass
class Generation:
    """An answer.

    Attributes:
        text: the answer without special tokens.
        tokens: text of each token, prompt first; the answer's begin at `prompt_length`.
        experts: `[T, E]` for each token the share of each expert in its choices over all layers; None if not asked
            for. The last token is not fed to the model, so T is one less than the number of tokens.
    """

    text: str
    tokens: list[str]
    prompt_length: int
    experts: Tensor | None


@dataclass(frozen=True)
class Sampling:
    """How the tokens of an answer are chosen.

    Attributes:
        max_tokens: longest answer, in tokens.
        temperature: 0 takes the likeliest token each time.
        top_p: sample from the likeliest tokens that together have this probability.
    """

    max_tokens: int = 256
    temperature: float = 0.7
    top_p: float = 0.9


def generate(
    model: SRDEModel,
    tokenizer: PreTrainedTokenizerBase,
    messages: list[Message],
    sampling: Sampling,
    *,
    tools: Tools | None = None,
    stream: Callable[[str], None] | None = None,
    show_routing: bool = False,
) -> Generation:
    """The model's answer to a conversation, written by the tokenizer's chat template (`data.packing` says what
    stands in for a missing one).

    Args:
        messages: in the one form of `data.conversation`; thoughts and tool calls as its template writes them.
        tools: descriptions of functions that the answer may call.
        stream: called with each new piece of text; the pieces joined are `text`.
        show_routing: fill `experts`.

    Raises:
        SRDEError: a value out of range, or prompt and answer do not fit into the base's context.
    """
    settings = generation_settings(model, tokenizer, sampling)
    prompt = prompt_ids(tokenizer, messages, tools=tools)
    check_context(model, len(prompt), sampling.max_tokens, where="prompt")
    input_ids = torch.tensor([prompt], device=model.base.device)
    streamer = _Streamer(tokenizer, stream) if stream else None
    forwards: list[Tensor] = []
    with torch.inference_mode(), recorded_experts(model, forwards) if show_routing else nullcontext():
        output = model.generate(
            input_ids=input_ids,
            attention_mask=torch.ones_like(input_ids),
            generation_config=settings,
            streamer=streamer,
        )
    ids = output[0].tolist()
    return Generation(
        text=decode(tokenizer, ids[len(prompt) :]),
        tokens=[str(tokenizer.decode([token])) for token in ids],
        prompt_length=len(prompt),
        experts=torch.cat(forwards) if show_routing else None,
    )


def generation_settings(model: SRDEModel, tokenizer: PreTrainedTokenizerBase, sampling: Sampling) -> GenerationConfig:
    """What transformers needs to know. Every value is set: the base's own generation config would fill gaps."""
    temperature, top_p = sampling.temperature, sampling.top_p
    if sampling.max_tokens < 1:
        raise SRDEError(f"max_tokens={sampling.max_tokens}: must be at least 1.")
    if not temperature >= 0:
        raise SRDEError(f"temperature={temperature}: must be 0 (greedy) or more.")
    if not 0 < top_p <= 1:
        raise SRDEError(f"top_p={top_p}: must be above 0 and at most 1.")
    drawing: dict[str, Any] = {"do_sample": False, "temperature": 1.0, "top_p": 1.0, "top_k": 50}
    if temperature > 0:
        drawing = {"do_sample": True, "temperature": temperature, "top_p": top_p, "top_k": 0}
    return GenerationConfig(
        max_new_tokens=sampling.max_tokens,
        eos_token_id=_stop_ids(model, tokenizer),
        pad_token_id=pad_token_id(tokenizer),
        num_beams=1,
        repetition_penalty=1.0,
        use_cache=True,
        **drawing,
    )


def context_length(model: SRDEModel) -> int:
    """Most tokens that the base can read."""
    return int(model.base.config.get_text_config().max_position_embeddings)


def answer_length(model: SRDEModel, most: int) -> int:
    """Tokens of the longest answer where none were asked for: `most`, at most half of the base's context."""
    return min(most, context_length(model) // 2)


def check_context(model: SRDEModel, prompt: int, answer: int, *, where: str) -> None:
    """Raise SRDEError if `prompt` + `answer` tokens exceed the positions that the base knows."""
    limit = context_length(model)
    if prompt + answer > limit:
        raise SRDEError(
            f"{where}: {prompt} tokens and up to {answer} new ones exceed the base's context of {limit}: "
            "shorten the text or lower max_tokens."
        )


@contextmanager
def recorded_experts(model: SRDEModel, forwards: list[Tensor]) -> Iterator[None]:
    """Append the expert shares `[T, E]` (mean over layers) of each forward inside to `forwards`."""
    num_experts = len(model.expert_names)
    choices: dict[int, Tensor] = {}

    def record(*_: Any) -> None:
        # -1 stands for "no expert": moved to column 0, which is dropped.
        columns_TC = torch.cat(list(choices.values()), dim=1) + 1
        counts_TE = columns_TC.new_zeros(len(columns_TC), num_experts + 1)
        counts_TE = counts_TE.scatter_add_(1, columns_TC, torch.ones_like(columns_TC))[:, 1:]
        forwards.append((counts_TE / counts_TE.sum(1, keepdim=True)).cpu())

    handle = model.base.register_forward_hook(record)
    try:
        with model.routing.running(RoutingPolicy(choices=choices)):
            yield
    finally:
        handle.remove()


def format_routing(generation: Generation, expert_names: list[str]) -> str:
    """A line for each token with the experts that it used, largest share first, and the shares over the answer."""
    experts_TE = generation.experts
    if experts_TE is None:
        raise SRDEError("this answer was generated without show_routing: its experts were not recorded.")
    width = max(len(repr(token)) for token in generation.tokens)
    lines = []
    for index, row_E in enumerate(experts_TE):
        if index in (0, generation.prompt_length):
            lines.append("prompt:" if index == 0 else "answer:")
        lines.append(f"  {generation.tokens[index]!r:<{width}}  {_shares(row_E, expert_names)}")
    used_TE = experts_TE[generation.prompt_length :]
    if len(used_TE):
        lines.append(f"answer, mean: {_shares(used_TE.mean(0), expert_names)}")
    return "\n".join(lines)


def _shares(shares_E: Tensor, names: list[str]) -> str:
    ranked = sorted(zip(shares_E.tolist(), names, strict=True), key=lambda pair: -pair[0])
    return "  ".join(f"{name} {share:.0%}" for share, name in ranked if share > 0)


def _stop_ids(model: SRDEModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    known = model.base.generation_config.eos_token_id if model.base.generation_config else None
    stops = known if isinstance(known, list) else [known]
    return sorted({int(stop) for stop in [*stops, *stop_ids(tokenizer)] if stop is not None})


def decode(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> str:
    """Text without special tokens: what stands after EOS in a batch is padding, and goes with it."""
    return str(tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))


class _Streamer(BaseStreamer):
    """Hands on text as it is completed; a character cut between two tokens waits for its rest."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, emit: Callable[[str], None]) -> None:
        self.tokenizer, self.emit = tokenizer, emit
        self.ids: list[int] = []
        self.shown = 0
        self.past_prompt = False

    def put(self, value: Tensor) -> None:
        if not self.past_prompt:
            self.past_prompt = True
            return
        self.ids += value.flatten().tolist()
        text = decode(self.tokenizer, self.ids)
        if not text.endswith("\ufffd"):
            self._show(text)

    def end(self) -> None:
        self._show(decode(self.tokenizer, self.ids))

    def _show(self, text: str) -> None:
        if len(text) > self.shown:
            self.emit(text[self.shown :])
            self.shown = len(text)
