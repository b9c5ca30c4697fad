"""Generates text with a base and its experts: chat template, KV cache, streaming, and the experts of each token."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Collection, Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import cache
from itertools import takewhile
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedTokenizerBase
from transformers.generation.streamers import BaseStreamer

from srde_ds.data.conversation import Message, Tools
from srde_ds.data.packing import pad_token_id, prompt_ids, stop_ids
from srde_ds.data.template import turn_ends
from srde_ds.errors import SRDEError
from srde_ds.inference.routing import RoutingRecord
from srde_ds.model.adapter import SRDEModel
from srde_ds.model.policy import RoutingPolicy
from srde_ds.utils.tables import aligned_table

ANSWER_TOKENS = 256
UNLIMITED_CONTEXT = 1_000_000


@dataclass
class Generation:
    """An answer, or its beginning while it is being generated.

    Attributes:
        text: the answer, see `decode`.
        tokens: text of each token, prompt first; the answer begins at `prompt_length`.
        routing: the experts of the tokens; None if not requested. The last token is not read by the model, so it has
            no experts.
        token_texts: what each token of a streamed answer adds to `text`, see `settled_text`.
    """

    text: str
    tokens: list[str]
    prompt_length: int
    routing: RoutingRecord | None = None
    token_texts: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Sampling:
    """How the tokens of an answer are chosen.

    Attributes:
        max_new_tokens: length limit of the answer in tokens.
        temperature: 0 takes the likeliest token each time.
        top_p: sample from the likeliest tokens that together have this probability.
    """

    max_new_tokens: int = 256
    temperature: float = 0.7
    top_p: float = 0.9


def generate(
    model: SRDEModel,
    tokenizer: PreTrainedTokenizerBase,
    messages: list[Message],
    sampling: Sampling,
    *,
    tools: Tools | None = None,
    stream: Callable[[Generation], None] | None = None,
    show_routing: bool = False,
    policy: RoutingPolicy | None = None,
) -> Generation:
    """The model's answer to a conversation in the tokenizer's chat template (`data.template` has a fallback for
    tokenizers without one).

    Args:
        messages: messages in the form of `data.conversation`.
        tools: descriptions of functions that the answer may call.
        stream: is called after each token with the answer so far, always the same object.
        show_routing: fill `routing`.
        policy: how tokens are routed; default: the model's current policy.

    Raises:
        SRDEError: a value is out of range, or prompt and answer do not fit into the base's context.
    """
    settings = generation_settings(model, tokenizer, sampling)
    prompt = prompt_ids(tokenizer, messages, tools=tools)
    check_context(model, len(prompt), sampling.max_new_tokens, where="prompt")
    input_ids = torch.tensor([prompt], device=model.base.device)
    policy = model.routing.policy if policy is None else policy
    record = RoutingRecord() if show_routing else None
    generation = Generation("", [str(tokenizer.decode([token])) for token in prompt], len(prompt), record)
    with torch.inference_mode(), record.recording(model, policy) if record else nullcontext(policy) as policy:
        streamer = _Streamer(tokenizer, generation, settings.eos_token_id, stream) if stream else None
        (ids,) = new_tokens(model, settings, input_ids, torch.ones_like(input_ids), policy=policy, streamer=streamer)
    generation.text = decode(tokenizer, before_stop(ids, settings.eos_token_id))
    generation.tokens[len(prompt) :] = [str(tokenizer.decode([token])) for token in ids]
    return generation


def generation_settings(model: SRDEModel, tokenizer: PreTrainedTokenizerBase, sampling: Sampling) -> GenerationConfig:
    """The settings for transformers, for `new_tokens`."""
    temperature, top_p = sampling.temperature, sampling.top_p
    if sampling.max_new_tokens < 1:
        raise SRDEError(f"max_new_tokens={sampling.max_new_tokens}: must be at least 1.")
    if not temperature >= 0:
        raise SRDEError(f"temperature={temperature}: must be 0 (greedy) or more.")
    if not 0 < top_p <= 1:
        raise SRDEError(f"top_p={top_p}: must be above 0 and at most 1.")
    drawing: dict[str, Any] = {"do_sample": False}
    if temperature > 0:
        drawing = {"do_sample": True, "temperature": temperature, "top_p": top_p, "top_k": 0}
    return GenerationConfig(
        max_new_tokens=sampling.max_new_tokens,
        eos_token_id=_stop_ids(model, tokenizer),
        pad_token_id=pad_token_id(tokenizer),
        **drawing,
    )


def new_tokens(
    model: SRDEModel,
    settings: GenerationConfig,
    ids_BS: Tensor,
    mask_BS: Tensor,
    *,
    policy: RoutingPolicy,
    streamer: BaseStreamer | None = None,
) -> list[list[int]]:
    """The tokens that `model` adds to each row, with padding after a row's end.

    The base's own generation config is out of the way meanwhile: transformers fills the gaps of `settings` with it.
    """
    base = model.base
    own = base.generation_config
    base.generation_config = GenerationConfig()
    try:
        output = model.generate(
            input_ids=ids_BS, attention_mask=mask_BS, generation_config=settings, streamer=streamer, policy=policy
        )
    finally:
        base.generation_config = own
    rows: list[list[int]] = output[:, ids_BS.shape[1] :].tolist()
    return rows


def context_length(model: SRDEModel) -> int:
    """The base's context in tokens; a million where it sets none, as recurrent bases do."""
    limit = getattr(model.base.config.get_text_config(), "max_position_embeddings", None)
    return UNLIMITED_CONTEXT if limit is None else int(limit)


def answer_length(model: SRDEModel, given: int | None, most: int = ANSWER_TOKENS) -> int:
    """The length limit of an answer in tokens: the given one, else `most`, at most half of the base's context."""
    return min(most, context_length(model) // 2) if given is None else given


def check_context(model: SRDEModel, prompt: int, answer: int, *, where: str) -> None:
    """Raise an SRDEError if `prompt` + `answer` tokens exceed the base's context."""
    limit = context_length(model)
    if prompt + answer > limit:
        raise SRDEError(
            f"{where}: {prompt} tokens and up to {answer} new ones exceed the base's context of {limit}: "
            "shorten the text or lower max_new_tokens."
        )


def format_routing(generation: Generation, expert_names: list[str]) -> str:
    """A line for each token with its experts, largest share first, and a line with the shares over the answer."""
    if generation.routing is None:
        raise SRDEError("this answer was generated without show_routing: its experts were not recorded.")
    experts_TE = generation.routing.shares_TE
    tokens = zip(generation.tokens, experts_TE, strict=False)  # the last token is not read, so it has no experts
    table = aligned_table([[repr(token), _shares(row_E, expert_names)] for token, row_E in tokens])
    rows, prompt = textwrap.indent(table, "  ").splitlines(), generation.prompt_length
    lines = ["prompt:", *rows[:prompt], *(["answer:", *rows[prompt:]] if rows[prompt:] else [])]
    used_TE = experts_TE[prompt:]
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


# -- the text of an answer -------------------------------------------------------------------------------------------


def before_stop(ids: Iterable[int], stops: Collection[int]) -> list[int]:
    """The tokens before the first one that ends an answer."""
    return list(takewhile(lambda token: token not in stops, ids))


def decode(tokenizer: PreTrainedTokenizerBase, ids: Iterable[int]) -> str:
    """The text of an answer's tokens, up to the end of the turn if the template writes that as plain text.

    Tokens that begin, end or fill up texts and turns add nothing. Others stay even if they are special, since those
    around a thought or a call say what is what.
    """
    end = _written_end(tokenizer)
    text = _raw_text(tokenizer, ids)
    return text.partition(end)[0] if end else text


def settled_text(tokenizer: PreTrainedTokenizerBase, ids: Iterable[int]) -> str:
    """The beginning of an unfinished answer's text that its next tokens cannot change.

    A character that is cut between two tokens waits for its rest, and so does what may be the turn's end.
    """
    text, end = decode(tokenizer, ids).rstrip("\ufffd"), _written_end(tokenizer)
    begun = next((count for count in range(len(end) - 1, 0, -1) if text.endswith(end[:count])), 0)
    return text[: len(text) - begun]


def is_cut(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], stops: Collection[int]) -> bool:
    """Whether generated tokens lack what ends an answer, so that only the length limit has ended it."""
    end = _written_end(tokenizer)
    return not (any(token in stops for token in ids) or (end and end in _raw_text(tokenizer, ids)))


def _raw_text(tokenizer: PreTrainedTokenizerBase, ids: Iterable[int]) -> str:
    silent = _silent_ids(tokenizer)
    said = [token for token in ids if token not in silent]
    return str(tokenizer.decode(said, skip_special_tokens=False, clean_up_tokenization_spaces=False))


@cache
def _silent_ids(tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """The tokens that begin, end or fill up texts and turns."""
    added = tokenizer.get_added_vocab()
    markers = [added[token] for token in turn_ends(tokenizer).markers if token in added]
    ids = [*markers, *stop_ids(tokenizer), pad_token_id(tokenizer)]
    return frozenset(ids if tokenizer.bos_token_id is None else [*ids, tokenizer.bos_token_id])


@cache
def _written_end(tokenizer: PreTrainedTokenizerBase) -> str:
    """The plain text that ends a turn, before the token that does so, if there is one; often empty."""
    ends = turn_ends(tokenizer)
    return (ends.last.partition(ends.stop)[0] if ends.stop else ends.last).strip()


class _Streamer(BaseStreamer):
    """Adds each token to a generation, and to its text what is settled."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        generation: Generation,
        stops: Collection[int],
        emit: Callable[[Generation], None],
    ) -> None:
        self.tokenizer, self.generation, self.stops, self.emit = tokenizer, generation, stops, emit
        self.ids: list[int] = []
        self.past_prompt = False

    def put(self, value: Tensor) -> None:
        if not self.past_prompt:
            self.past_prompt = True
            return
        for token in value.flatten().tolist():
            self.ids.append(token)
            self.generation.tokens.append(str(self.tokenizer.decode([token])))
            self.generation.token_texts.append("")
            self._add(settled_text(self.tokenizer, before_stop(self.ids, self.stops)))
        self.emit(self.generation)

    def end(self) -> None:
        self._add(decode(self.tokenizer, before_stop(self.ids, self.stops)))
        self.emit(self.generation)

    def _add(self, text: str) -> None:
        piece = text[len(self.generation.text) :]
        self.generation.token_texts[-1] += piece
        self.generation.text += piece
