"""Answers many conversations at once, optionally by a vote among samples, or with rounds of improvement."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from itertools import takewhile

import torch
from transformers import PreTrainedTokenizerBase

from srde_ds.data.conversation import Message
from srde_ds.data.packing import pad_token_id, prompt_ids
from srde_ds.inference.answers import exact_match
from srde_ds.inference.batches import batches_by_length
from srde_ds.inference.generate import Sampling, check_context, decode, generation_settings
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
    texts = generate_many(model, tokenizer, repeated, sampling, batch_size=batch_size * best_of_n)
    answers = []
    for first in range(0, len(texts), best_of_n):
        samples = texts[first : first + best_of_n]
        index, votes = majority(samples)
        answers.append(Answer(samples[index], samples, votes))
    for number in range(self_refine):
        asked = [
            Prompt(f"{prompt.place}, refinement {number + 1}", refinement(prompt.messages, answer.text), prompt.tools)
            for prompt, answer in zip(prompts, answers, strict=True)
        ]
        texts = generate_many(model, tokenizer, asked, sampling, batch_size=batch_size)
        for answer, text in zip(answers, texts, strict=True):
            answer.drafts.append(answer.text)
            answer.text = text
    return answers


def majority(texts: Sequence[str]) -> tuple[int, int]:
    """Index of the first text with the most frequent extracted answer (or the first of these), and its frequency.

    Answers are the same if `answers.exact_match` says so.
    """
    groups: list[list[int]] = []
    for index, text in enumerate(texts):
        group = next((group for group in groups if exact_match(text, texts[group[0]])), None)
        if group is None:
            groups.append([index])
        else:
            group.append(index)
    best = max(groups, key=len)  # the first of the largest
    return best[0], len(best)


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
    routing: dict[int, TokenExperts] | None = None,
) -> list[str]:
    """The answer to each conversation up to a stop token, in order. Batches are by length, and padded on the left.

    Args:
        routing: is filled with the experts that each answer's tokens used, by number of the conversation.

    Raises:
        SRDEError: a value is out of range, or a conversation (named by its place) is refused by the chat template or
            does not fit into the base's context.
    """
    settings = generation_settings(model, tokenizer, sampling)
    written = [prompt_ids(tokenizer, messages, tools=tools, where=place) for place, messages, tools in prompts]
    for prompt, ids in zip(prompts, written, strict=True):
        check_context(model, len(ids), sampling.max_new_tokens, where=prompt.place)
    answers: dict[int, str] = {}
    stops = {*settings.eos_token_id}
    for batch in batches_by_length([len(ids) + sampling.max_new_tokens for ids in written], batch_size, title):
        ids_BS, mask_BS = left_padded([written[i] for i in batch], pad_token_id(tokenizer))
        record, policy = RoutingRecord(with_weights=False), model.routing.policy
        recording = nullcontext(policy) if routing is None else record.recording(model, policy)
        with torch.inference_mode(), recording as policy:
            output = model.generate(
                input_ids=ids_BS.to(model.base.device),
                attention_mask=mask_BS.to(model.base.device),
                generation_config=settings,
                policy=policy,
            )
        for index, row in zip(batch, output[:, ids_BS.shape[1] :].tolist(), strict=True):
            answers[index] = decode(tokenizer, row)
        if routing is not None:
            # The first forward reads the prompts, and each later one reads a token of every answer.
            shares = [experts_BE.unbind() for experts_BE in record.forwards[1:]]
            for place, (index, row) in enumerate(zip(batch, output[:, ids_BS.shape[1] :].tolist(), strict=True)):
                said = list(takewhile(lambda token: token not in stops, row))
                read = [experts_BE[place].tolist() for experts_BE in shares[: len(said)]]
                routing[index] = TokenExperts(token_texts(tokenizer, said), read)
    return [answers[index] for index in range(len(prompts))]


def token_texts(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> list[str]:
    """The text that each token adds; together they give the result of `decode`. Special tokens add nothing.

    A character that is split between tokens comes with the last of them.
    """
    texts, shown = [], ""
    for count in range(1, len(ids) + 1):
        text = decode(tokenizer, list(ids[:count]))
        whole = text if count == len(ids) or not text.endswith("\ufffd") else shown
        texts.append(whole[len(shown) :])
        shown = whole
    return texts


def left_padded(prompts: Sequence[Sequence[int]], pad: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens and attention mask `[B, S]`, int64."""
    width = max(len(prompt) for prompt in prompts)
    gaps = [width - len(prompt) for prompt in prompts]
    ids_BS = torch.tensor([[pad] * gap + list(prompt) for gap, prompt in zip(gaps, prompts, strict=True)])
    return ids_BS, (torch.arange(width) >= torch.tensor(gaps)[:, None]).long()
