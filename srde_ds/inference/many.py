"""Answers many conversations at once, optionally by a vote among samples, or with rounds of improvement."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field

import torch
from transformers import PreTrainedTokenizerBase

from srde_ds.data.conversation import Message
from srde_ds.data.packing import pad_token_id, prompt_ids
from srde_ds.inference.answers import exact_match, extract_answer
from srde_ds.inference.batches import batches_by_length
from srde_ds.inference.generate import (
    Sampling,
    before_stop,
    check_context,
    decode,
    generation_settings,
    is_cut,
    new_tokens,
    settled_text,
)
from srde_ds.inference.prompts import Prompt
from srde_ds.inference.routing import RoutingRecord
from srde_ds.model.adapter import SRDEModel

Messages = list[Message]

REFINE_PROMPT = (
    "Check your answer step by step. If you find a mistake, correct it; if the answer can be clearer, improve it. "
    "Then write the whole final answer."
)


@dataclass
class Answer:
    """The answer to one conversation.

    Attributes:
        text: the final answer.
        samples: the answers that were voted on, in the order in which they were drawn; a single one without a vote.
        votes: how many of `samples` agree with the first draft.
        drafts: the answers before each round of refinement, in order.
    """

    text: str
    samples: list[str]
    votes: int
    drafts: list[str] = field(default_factory=list)


@dataclass
class TokenExperts:
    """The experts that the tokens of an answer used.

    Attributes:
        tokens: the text that each token adds, without the one that ends the answer.
        shares: `[T, E]` for each token the share of each expert in its choices over all layers. The last token of an
            answer that has reached its length limit is not read, so it may be missing here.
    """

    tokens: list[str]
    shares: list[list[float]]


@dataclass
class Written:
    """What a model wrote in answer to a conversation.

    Attributes:
        cut: the length limit ended it.
        routing: the experts that its tokens used; None if not requested.
    """

    text: str
    cut: bool = False
    routing: TokenExperts | None = None


def answer_many(
    model: SRDEModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    sampling: Sampling,
    *,
    batch_size: int,
    best_of_n: int = 1,
    self_refine: int = 0,
) -> list[Answer]:
    """One answer for each conversation, in order.

    Args:
        batch_size: number of conversations at a time; `best_of_n` multiplies it.
        best_of_n: number of samples per conversation. The most frequent answer is taken, or the first of these.
        self_refine: number of rounds in which the model is asked to check and improve its answer (REFINE_PROMPT).

    Raises:
        SRDEError: a value is out of range, or a conversation does not fit into the base's context.
    """
    repeated = [prompt for prompt in prompts for _ in range(best_of_n)]
    written = generate_many(model, tokenizer, repeated, sampling, batch_size=batch_size * best_of_n)
    answers = []
    for first in range(0, len(written), best_of_n):
        samples = [sample.text for sample in written[first : first + best_of_n]]
        index, votes = majority(samples)
        answers.append(Answer(samples[index], samples, votes))
    for number in range(self_refine):
        asked = [
            Prompt(f"{prompt.place}, refinement {number + 1}", refinement(prompt.messages, answer.text), prompt.tools)
            for prompt, answer in zip(prompts, answers, strict=True)
        ]
        written = generate_many(model, tokenizer, asked, sampling, batch_size=batch_size)
        for answer, refined in zip(answers, written, strict=True):
            answer.drafts.append(answer.text)
            answer.text = refined.text
    return answers


def majority(texts: Sequence[str]) -> tuple[int, int]:
    """Index of the first text with the most frequent extracted answer (or the first of these), and its frequency.

    Answers are the same if `answers.exact_match` says so. Texts without an answer, such as unfinished thoughts, have no
    vote unless all are.
    """
    groups: list[list[int]] = []
    for index in [i for i, text in enumerate(texts) if extract_answer(text)] or range(len(texts)):
        group = next((group for group in groups if _agree(texts[index], texts[group[0]])), None)
        if group is None:
            groups.append([index])
        else:
            group.append(index)
    best = max(groups, key=len)  # the first of the largest
    return best[0], len(best)


def _agree(text: str, other: str) -> bool:
    return exact_match(text, other) or exact_match(other, text)


def refinement(messages: Messages, answer: str) -> Messages:
    """The conversation that asks to improve `answer`, without earlier rounds."""
    return [*messages, {"role": "assistant", "content": answer}, {"role": "user", "content": REFINE_PROMPT}]


def generate_many(
    model: SRDEModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    sampling: Sampling,
    *,
    batch_size: int,
    title: str = "answers",
    with_routing: bool = False,
) -> list[Written]:
    """The answer to each conversation up to a stop token, in order. Batches are by length, and padded on the left.

    Args:
        with_routing: also note the experts that each answer's tokens used.

    Raises:
        SRDEError: a value is out of range, or a conversation (named by its place) is refused by the chat template or
            does not fit into the base's context.
    """
    settings = generation_settings(model, tokenizer, sampling)
    asked = checked_prompts(model, tokenizer, prompts, sampling.max_new_tokens)
    answers: dict[int, Written] = {}
    stops = {*settings.eos_token_id}
    for batch in batches_by_length([len(ids) + sampling.max_new_tokens for ids in asked], batch_size, title):
        ids_BS, mask_BS = left_padded([asked[i] for i in batch], pad_token_id(tokenizer))
        record, policy = RoutingRecord(with_weights=False), model.routing.policy
        device = model.base.device
        with torch.inference_mode(), record.recording(model, policy) if with_routing else nullcontext(policy) as policy:
            rows = new_tokens(model, settings, ids_BS.to(device), mask_BS.to(device), policy=policy)
        # The first forward reads the prompts, and each later one reads a token of every answer.
        shares = [experts_BE.unbind() for experts_BE in record.forwards[1:]]
        for place, (index, row) in enumerate(zip(batch, rows, strict=True)):
            said = before_stop(row, stops)
            answers[index] = Written(decode(tokenizer, said), is_cut(tokenizer, row, stops))
            if with_routing:
                read = [experts_BE[place].tolist() for experts_BE in shares[: len(said)]]
                answers[index].routing = TokenExperts(token_texts(tokenizer, said), read)
    return [answers[index] for index in range(len(prompts))]


def checked_prompts(
    model: SRDEModel, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[Prompt], max_new_tokens: int
) -> list[list[int]]:
    """The tokens of each prompt.

    Raises:
        SRDEError: the chat template refuses one, or it does not fit into the base's context with its answer.
    """
    asked = [prompt_ids(tokenizer, messages, tools=tools, where=place) for place, messages, tools in prompts]
    for prompt, ids in zip(prompts, asked, strict=True):
        check_context(model, len(ids), max_new_tokens, where=prompt.place)
    return asked


def token_texts(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> list[str]:
    """The text that each token adds, see `settled_text`; together they give the result of `decode`."""
    texts, shown = [], 0
    for count in range(1, len(ids) + 1):
        text = decode(tokenizer, ids) if count == len(ids) else settled_text(tokenizer, ids[:count])
        texts.append(text[shown:])
        shown = max(shown, len(text))
    return texts


def left_padded(prompts: Sequence[Sequence[int]], pad: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens and attention mask `[B, S]`, int64."""
    width = max(len(prompt) for prompt in prompts)
    gaps = [width - len(prompt) for prompt in prompts]
    ids_BS = torch.tensor([[pad] * gap + list(prompt) for gap, prompt in zip(gaps, prompts, strict=True)])
    return ids_BS, (torch.arange(width) >= torch.tensor(gaps)[:, None]).long()
