"""Records to tokens with response-only labels, and documents to rows of `max_length` by best fit."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, Literal

import jinja2
import numpy as np
from transformers import PreTrainedTokenizerBase

from srde_ds.data.records import Record
from srde_ds.errors import SRDEError

IGNORED = -100
"""Label of tokens that carry no loss: prompts and padding."""

# For tokenizers without a chat template: each message on a line of its own, each response closed by EOS.
FALLBACK_TEMPLATE = (
    "{% if with_bos %}{{ bos_token }}{% endif %}{% for message in messages %}{{ message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}{{ '\\n' }}{% endfor %}"
)


@dataclass(frozen=True)
class Document:
    """A tokenised record. `is_response` [T] is True where the loss counts."""

    input_ids: np.ndarray
    is_response: np.ndarray
    where: str
    by_parts: bool

    def __len__(self) -> int:
        return len(self.input_ids)


def template_kind(tokenizer: PreTrainedTokenizerBase) -> Literal["tokenizer", "fallback"]:
    """Whether conversations are written by the tokenizer's own chat template or by FALLBACK_TEMPLATE."""
    return "tokenizer" if tokenizer.chat_template else "fallback"


def template_text(tokenizer: PreTrainedTokenizerBase) -> str:
    """The chat template in use."""
    return tokenizer.get_chat_template() if tokenizer.chat_template else FALLBACK_TEMPLATE


def render(tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, str]], *, generation: bool, where: str) -> str:
    """The conversation as text; `generation`: up to where the assistant starts to write.

    Raises:
        SRDEError: the template refuses the conversation (some know no system role).
    """
    options: dict[str, Any] = {"tokenize": False, "add_generation_prompt": generation}
    if template_kind(tokenizer) == "fallback":
        options |= {"chat_template": FALLBACK_TEMPLATE, "with_bos": _starts_with_bos(tokenizer)}
    try:
        return str(tokenizer.apply_chat_template(messages, **options))
    except jinja2.TemplateError as error:
        reason = " ".join(str(error).split())
        raise SRDEError(f"{where}: the tokenizer's chat template refuses these messages: {reason}") from None


def prompt_ids(tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, str]]) -> list[int]:
    """The tokens that generation starts from: the same that training saw before the response."""
    return _encode(tokenizer, [render(tokenizer, messages, generation=True, where="prompt")])[0]


def check_markers(tokenizer: PreTrainedTokenizerBase, record: Record) -> None:
    """Refuse a response that holds the text of the EOS token: the model would learn to stop there."""
    eos = tokenizer.eos_token
    if eos is None:
        raise SRDEError(f"tokenizer '{tokenizer.name_or_path}' has no EOS token: a response could never end.")
    for message in record.messages:
        if message["role"] == "assistant" and eos in message["content"]:
            raise SRDEError(f"{record.where}: a response holds the tokenizer's EOS token '{eos}': remove it.")


def tokenize(records: Sequence[Record], tokenizer: PreTrainedTokenizerBase) -> list[Document]:
    """Tokens of each record, labelled on every assistant turn, with one EOS at the end, which is labelled too.

    The text up to a turn must give the first tokens of the whole text; where it does not (a merge across
    the border), the parts are tokenised one by one, as they are at inference.
    """
    parts_of = [_split(record, tokenizer) for record in records]
    texts: list[str] = []
    for parts in parts_of:
        # The beginnings of the text up to each border, the whole text last.
        texts += ["".join(text for text, _ in parts[: end + 1]) for end in range(len(parts))]
    encoded = iter(_encode(tokenizer, texts))
    documents = []
    for record, parts in zip(records, parts_of, strict=True):
        beginnings = [next(encoded) for _ in parts]
        ids, lengths = beginnings[-1], [len(beginning) for beginning in beginnings]
        by_parts = any(ids[: len(beginning)] != beginning for beginning in beginnings)
        if by_parts:
            pieces = _encode(tokenizer, [text for text, _ in parts])
            ids = [token for piece in pieces for token in piece]
            lengths = np.cumsum([len(piece) for piece in pieces]).tolist()
        is_response = np.zeros(len(ids) + 1, dtype=bool)
        for (_, labelled), start, end in zip(parts, [0, *lengths], lengths, strict=False):
            is_response[start:end] = labelled
        # The EOS's text ends the last part only where the template writes it.
        if ids[-1] != tokenizer.eos_token_id:
            ids = [*ids, tokenizer.eos_token_id]
        is_response[len(ids) - 1] = True
        documents.append(Document(np.array(ids, np.int32), is_response[: len(ids)], record.where, by_parts))
    return documents


def _split(record: Record, tokenizer: PreTrainedTokenizerBase) -> list[tuple[str, bool]]:
    """The conversation's text cut into (text, labelled) parts: prompt, response, prompt, response."""
    messages, closing = record.messages, _closing(tokenizer)
    turns = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
    whole = render(tokenizer, messages, generation=False, where=record.where)
    parts: list[tuple[str, bool]] = []
    position = 0
    for turn in turns:
        prompt = render(tokenizer, messages[:turn], generation=True, where=record.where)
        content, start = messages[turn]["content"].strip(), len(prompt)
        found = whole.find(content, start)
        if turn != turns[-1]:
            regular = found >= 0 and not whole[start:found].strip()
            end = found + len(content)
            end += len(closing) if whole.startswith(closing, end) else 0
        else:
            regular = found >= 0 and closing in whole[found:]
            end = whole.rindex(closing) + len(closing) if regular and closing else len(whole.rstrip())
        if not regular or not whole.startswith(prompt):
            # The template writes the history otherwise than it prompts: keep what inference sees, the last turn.
            last = render(tokenizer, messages[:-1], generation=True, where=record.where)
            return [(last, False), (messages[-1]["content"] + closing, True)]
        parts += [(whole[position:start], False), (whole[start:end], True)]
        position = end
    return parts


@cache
def _closing(tokenizer: PreTrainedTokenizerBase) -> str:
    """What the template writes after a response, up to and including EOS where it writes that."""
    probe = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "PROBE"}]
    tail = render(tokenizer, probe, generation=False, where="chat template").rpartition("PROBE")[2]
    eos = str(tokenizer.eos_token)
    return tail[: tail.index(eos) + len(eos)] if eos in tail else tail.rstrip()


def _encode(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[list[int]]:
    # Templates write BOS themselves: adding special tokens here would double it. `verbose` off: long documents
    # are dealt with by `too_long`, not by the tokenizer's warning.
    batch = tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False)
    return list(batch["input_ids"])


@cache
def _starts_with_bos(tokenizer: PreTrainedTokenizerBase) -> bool:
    return tokenizer.bos_token_id is not None and tokenizer("a")["input_ids"][0] == tokenizer.bos_token_id


def fit(document: Document, max_length: int, too_long: str) -> Document | None:
    """A document longer than `max_length`, treated by policy: an error, None (drop), or without its end.

    Truncation cuts the end, so that the prompt stays whole; where no response token would remain, the
    document is dropped. A truncated response has no EOS.
    """
    if len(document) <= max_length:
        return document
    if too_long == "error":
        raise SRDEError(
            f"{document.where}: {len(document)} tokens exceed max_length={max_length}. "
            "Raise max_length, or give --too_long drop or truncate."
        )
    if too_long == "drop" or not document.is_response[:max_length].any():
        return None
    return replace(document, input_ids=document.input_ids[:max_length], is_response=document.is_response[:max_length])


def best_fit(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Rows of indices into `lengths`, each at most `capacity` in sum: best-fit decreasing, stable for equal lengths."""
    rows: list[list[int]] = []
    spaces: list[tuple[int, int]] = []  # (space left, row), sorted
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        place = bisect_left(spaces, (lengths[index], 0))
        if place < len(spaces):
            space, row = spaces.pop(place)
        else:
            space, row = capacity, len(rows)
            rows.append([])
        rows[row].append(index)
        if space > lengths[index]:
            insort(spaces, (space - lengths[index], row))
    return rows


def pack(
    documents: Sequence[Document], max_length: int, pad_id: int, generator: np.random.Generator
) -> Iterator[dict[str, Any]]:
    """Packed rows of one domain's documents, in an order that `generator` fixes.

    Each row: `input_ids`, `labels`, `position_ids` int32 [max_length] and `length`, its number of real tokens.
    Positions restart at 0 at each document and at the padding tail, so that no attention crosses a border.
    """
    documents = [documents[i] for i in generator.permutation(len(documents))]
    rows = best_fit([len(document) for document in documents], max_length)
    for row in generator.permutation(len(rows)):
        members = [documents[i] for i in rows[row]]
        ids = np.concatenate([document.input_ids for document in members])
        is_response = np.concatenate([document.is_response for document in members])
        padding = max_length - len(ids)
        yield {
            "input_ids": np.pad(ids, (0, padding), constant_values=pad_id),
            "labels": np.pad(np.where(is_response, ids, IGNORED), (0, padding), constant_values=IGNORED),
            "position_ids": np.concatenate(
                [np.arange(length, dtype=np.int32) for length in (*map(len, members), padding)]
            ),
            "length": len(ids),
        }
