"""Turns records into tokens with labels on responses only, and packs documents into rows by best fit."""

from __future__ import annotations

import json
import re
from collections import deque
from collections.abc import Iterator, Mapping, Sequence, Sized
from dataclasses import dataclass, replace
from functools import cache
from itertools import chain
from typing import Any, cast

import numpy as np
from transformers import PreTrainedTokenizerBase

from srde_ds.data.conversation import Message, Tools
from srde_ds.data.labels import Part, prompt_text, split_all
from srde_ds.data.records import Record
from srde_ds.data.template import turn_ends
from srde_ds.errors import SRDEError

NO_LABEL = -100
"""Label of tokens that carry no loss: prompts and padding."""


@dataclass(frozen=True)
class Document:
    """A tokenised record. `is_response` [T] is True for tokens with loss."""

    input_ids: np.ndarray
    is_response: np.ndarray
    where: str
    by_parts: bool

    def __len__(self) -> int:
        return len(self.input_ids)


def prompt_ids(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Message],
    *,
    tools: Tools | None = None,
    where: str = "prompt",
) -> list[int]:
    """The tokens that generation starts from, which are those that training saw before the response.

    Raises:
        SRDEError: the chat template refuses the messages or leaves out a part of them. The message begins with `where`.
    """
    return _encode(tokenizer, [prompt_text(tokenizer, messages, tools=tools, where=where)])[0]


def pad_token_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """The token that fills the end of a row: the pad token, or EOS if there is none."""
    return int(tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id)


def stop_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The tokens that end a response: EOS, and the one with which the chat template closes it."""
    tokens = (tokenizer.eos_token, turn_ends(tokenizer).stop)
    ids = tokenizer.convert_tokens_to_ids([token for token in dict.fromkeys(tokens) if token is not None])
    return cast("list[int]", ids)


def check_markers(tokenizer: PreTrainedTokenizerBase, record: Record) -> None:
    """Refuse a response that contains the text of a token that ends a turn: the model would learn to stop there."""
    eos = _eos_token(tokenizer)
    if eos is None:
        raise SRDEError(f"tokenizer '{tokenizer.name_or_path}' has no EOS token: a response could never end.")
    try:
        markers = turn_ends(tokenizer).markers
    except SRDEError as error:
        raise SRDEError(f"{record.where}: {str(error).removeprefix('chat template: ')}") from None
    for message in record.messages:
        if message["role"] != "assistant":
            continue
        text = message["content"] if len(message) == 2 else json.dumps(message, ensure_ascii=False)
        found = next((marker for marker in markers if marker in text), None)
        if found is not None:
            what = "EOS token" if found == eos else "end of turn"
            raise SRDEError(f"{record.where}: a response holds the tokenizer's {what} '{found}': remove it.")


def tokenize(records: Sequence[Record], tokenizer: PreTrainedTokenizerBase) -> list[Document]:
    """`tokenize_each`, for all records or none.

    Raises:
        SRDEError: the error of the first refused record.
    """
    documents = []
    for document in tokenize_each(records, tokenizer):
        if isinstance(document, SRDEError):
            raise document
        documents.append(document)
    return documents


def tokenize_each(records: Sequence[Record], tokenizer: PreTrainedTokenizerBase) -> list[Document | SRDEError]:
    """The tokens of each record, or the reason why it is refused.

    Labels are on the assistant's turns as the chat template writes them, including what closes them, and on one EOS at
    the end. Turns that are marked to carry no labels have none.

    The text up to a turn must give the first tokens of the whole text. If it does not, because tokens merge across the
    border, the parts are tokenised one by one, as at inference.
    """
    split = split_all(records, tokenizer)
    refused = {index: parts for index, parts in enumerate(split) if isinstance(parts, SRDEError)}
    parts_of = [parts for parts in split if not isinstance(parts, SRDEError)]
    kept = iter(_documents([r for i, r in enumerate(records) if i not in refused], parts_of, tokenizer))
    return [refused[index] if index in refused else next(kept) for index in range(len(records))]


def _documents(
    records: Sequence[Record], parts_of: Sequence[list[Part]], tokenizer: PreTrainedTokenizerBase
) -> list[Document]:
    segments_of: list[list[list[str]]] = []
    for parts in parts_of:
        # The text up to each border; the last one is the whole text.
        segments_of.append(
            [_segments(tokenizer, "".join(text for text, _ in parts[: i + 1])) for i in range(len(parts))]
        )
    # Many segments are repeated, such as a template's system message, but each is tokenised only once.
    distinct = list(dict.fromkeys(chain.from_iterable(chain.from_iterable(segments_of))))
    tokens = dict(zip(distinct, _encode(tokenizer, distinct), strict=True))
    eos = tokenizer.eos_token_id
    documents = []
    for record, parts, beginnings in zip(records, parts_of, segments_of, strict=True):
        *prefixes, whole = beginnings
        ids = list(chain.from_iterable(tokens[segment] for segment in whole))
        lengths = [*(sum(len(tokens[segment]) for segment in segments) for segments in prefixes), len(ids)]
        # A border is usually also a segment's; then tokens need not be compared.
        by_parts = any(
            whole[: len(segments)] != segments
            and ids[:length] != list(chain.from_iterable(tokens[segment] for segment in segments))
            for segments, length in zip(prefixes, lengths, strict=False)
        )
        if by_parts:
            encoded = _encode(tokenizer, [text for text, _ in parts])
            ids = list(chain.from_iterable(encoded))
            lengths = np.cumsum([len(part) for part in encoded]).tolist()
        is_response = np.zeros(len(ids) + 1, dtype=bool)
        for (_, labelled), start, end in zip(parts, [0, *lengths], lengths, strict=False):
            is_response[start:end] = labelled
        # Not every template ends the text with EOS.
        if ids[-1] != eos:
            ids = [*ids, eos]
        is_response[len(ids) - 1] = True
        documents.append(Document(np.array(ids, np.int32), is_response[: len(ids)], record.where, by_parts))
    return documents


def _segments(tokenizer: PreTrainedTokenizerBase, text: str) -> list[str]:
    """Cut the text before each token that is always a token by itself, whatever is beside it."""
    border = _borders(tokenizer)
    if border is None:
        return [text]
    starts = [match.start() for match in border.finditer(text)]
    return [text[start:end] for start, end in zip([0, *starts], [*starts, len(text)], strict=True) if start < end]


@cache
def _borders(tokenizer: PreTrainedTokenizerBase) -> re.Pattern[str] | None:
    """A pattern of the special tokens that the tokenizer cuts out of a text before anything else."""
    added = [
        token.content
        for token in tokenizer.added_tokens_decoder.values()
        if token.special and not (token.normalized or token.lstrip or token.rstrip or token.single_word)
    ]
    if not tokenizer.is_fast or not added:
        return None
    # If one token begins with another, the longer one is taken.
    return re.compile("|".join(re.escape(token) for token in sorted(added, key=len, reverse=True)))


@cache
def _eos_token(tokenizer: PreTrainedTokenizerBase) -> str | None:
    # The tokenizer's own attribute is too slow to be read for each record.
    return tokenizer.eos_token


def _encode(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[list[int]]:
    # Templates write BOS themselves, so adding special tokens here would double it.
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None and backend.truncation is None and backend.padding is None:
        # Does the same as the call below in four fifths of the time.
        return [encoding.ids for encoding in backend.encode_batch_fast(texts, add_special_tokens=False)]
    # `verbose` is off since `too_long` handles long documents; the tokenizer need not warn.
    batch = tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False)
    return list(batch["input_ids"])


def fit(document: Document, max_length: int, too_long: str) -> Document | None:
    """The document, or, if it is longer than `max_length`, an error, None (drop) or its beginning, as `too_long` says.

    Truncation cuts the end, so that the prompt stays whole. A document is dropped if no response token would remain. A
    truncated response has no EOS.
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
    """Rows of indices into `lengths`, with a total length of at most `capacity` each.

    Each row takes the longest remaining document, then those that together best fill the rest of it. This subset sum is
    found with the bits of an integer: bit s says that some of the documents so far add up to s. If documents are about
    as long as a simple fraction of a row, this fills rows several percentage points better than giving each document to
    the fullest row that has room (docs/decisions.md). Among equal documents the first comes first.
    """
    waiting: dict[int, deque[int]] = {}
    for index, length in enumerate(lengths):
        waiting.setdefault(length, deque()).append(index)
    longest_first = sorted(waiting, reverse=True)
    rows = []
    while longest_first:
        row = []
        for length in _fill(longest_first, waiting, capacity):
            row.append(waiting[length].popleft())
            if not waiting[length]:
                longest_first.remove(length)
        rows.append(row)
    return rows


def _fill(longest_first: Sequence[int], waiting: Mapping[int, Sized], capacity: int) -> list[int]:
    """The lengths of the documents in one row: the longest, and those that leave the least space beside it."""
    chosen = [longest_first[0]]
    space = capacity - chosen[0]
    sums, all_sums = 1, (1 << (space + 1)) - 1
    before: list[tuple[int, int]] = []  # a document's length, and the sums before it was added
    for length in longest_first:
        copies = min(len(waiting[length]) - (length == chosen[0]), space // length)
        for _ in range(copies):
            before.append((length, sums))
            sums = (sums | sums << length) & all_sums
        if sums >> space:
            break
    filled = sums.bit_length() - 1
    for length, without in reversed(before):
        if not without >> filled & 1:
            chosen.append(length)
            filled -= length
    return chosen


def pack(
    documents: Sequence[Document],
    max_length: int,
    pad_id: int,
    generator: np.random.Generator,
    *,
    packing: bool = True,
) -> Iterator[dict[str, Any]]:
    """Pack one domain's documents into rows, in an order fixed by `generator`; without `packing`, one document in each.

    A row has `input_ids`, `labels` and `position_ids`, int32 [max_length], and `length`, its number of real tokens.
    Positions restart at 0 with each document and with the padding, so that no attention crosses a border.
    """
    documents = [documents[i] for i in generator.permutation(len(documents))]
    rows = [[index] for index in range(len(documents))]
    if packing:
        rows = best_fit([len(document) for document in documents], max_length)
    for row in generator.permutation(len(rows)):
        members = [documents[i] for i in rows[row]]
        ids = np.concatenate([document.input_ids for document in members])
        is_response = np.concatenate([document.is_response for document in members])
        padding = max_length - len(ids)
        yield {
            "input_ids": np.pad(ids, (0, padding), constant_values=pad_id),
            "labels": np.pad(np.where(is_response, ids, NO_LABEL), (0, padding), constant_values=NO_LABEL),
            "position_ids": np.concatenate(
                [np.arange(length, dtype=np.int32) for length in (*map(len, members), padding)]
            ),
            "length": len(ids),
        }
