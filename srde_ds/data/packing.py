"""Records to tokens with response-only labels, and documents to rows of `max_length` by best fit."""

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

IGNORED = -100
"""Label of tokens that carry no loss: prompts and padding."""


@dataclass(frozen=True)
class Document:
    """A tokenised record. `is_response` [T] is True where the loss counts."""

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
    """The tokens that generation starts from: the same that training saw before the response.

    Raises:
        SRDEError: the chat template refuses the messages or leaves out a part of them; it begins with `where`.
    """
    return _encode(tokenizer, [prompt_text(tokenizer, messages, tools=tools, where=where)])[0]


def pad_token_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """What fills a row's end: the pad token, or EOS if there is none."""
    return int(tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id)


def stop_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The tokens that end a response: EOS, and the one by which the chat template closes it."""
    tokens = (tokenizer.eos_token, turn_ends(tokenizer).stop)
    ids = tokenizer.convert_tokens_to_ids([token for token in dict.fromkeys(tokens) if token is not None])
    return cast("list[int]", ids)


def check_markers(tokenizer: PreTrainedTokenizerBase, record: Record) -> None:
    """Refuse a response that holds the text of a token that ends a turn: the model would learn to stop there."""
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
    """`tokenize_each`, all or none.

    Raises:
        SRDEError: of the first record that is refused.
    """
    documents = []
    for document in tokenize_each(records, tokenizer):
        if isinstance(document, SRDEError):
            raise document
        documents.append(document)
    return documents


def tokenize_each(records: Sequence[Record], tokenizer: PreTrainedTokenizerBase) -> list[Document | SRDEError]:
    """Tokens of each record, or why it is refused.

    Labelled are the assistant's turns as the chat template writes them, but for those marked to carry no labels, with
    what closes them, and one EOS at the end.

    The text up to a turn must give the first tokens of the whole text; where it does not (a merge across
    the border), the parts are tokenised one by one, as they are at inference.
    """
    split = split_all(records, tokenizer)
    refused = {index: parts for index, parts in enumerate(split) if isinstance(parts, SRDEError)}
    parts_of = [parts for parts in split if not isinstance(parts, SRDEError)]
    kept = iter(_documents([r for i, r in enumerate(records) if i not in refused], parts_of, tokenizer))
    return [refused[index] if index in refused else next(kept) for index in range(len(records))]


def _documents(
    records: Sequence[Record], parts_of: Sequence[list[Part]], tokenizer: PreTrainedTokenizerBase
) -> list[Document]:
    pieces_of: list[list[list[str]]] = []
    for parts in parts_of:
        # The beginnings of the text up to each border, the whole text last.
        pieces_of.append([_pieces(tokenizer, "".join(text for text, _ in parts[: i + 1])) for i in range(len(parts))])
    # The same pieces come again and again, such as a template's system message: each is tokenised once.
    distinct = list(dict.fromkeys(piece for beginnings in pieces_of for pieces in beginnings for piece in pieces))
    tokens = dict(zip(distinct, _encode(tokenizer, distinct), strict=True))
    eos = tokenizer.eos_token_id
    documents = []
    for record, parts, beginnings in zip(records, parts_of, pieces_of, strict=True):
        *prefixes, whole = beginnings
        ids = list(chain.from_iterable(tokens[piece] for piece in whole))
        lengths = [*(sum(len(tokens[piece]) for piece in pieces) for pieces in prefixes), len(ids)]
        # Mostly a border of the pieces: then there is nothing to compare.
        by_parts = any(
            whole[: len(pieces)] != pieces
            and ids[:length] != list(chain.from_iterable(tokens[piece] for piece in pieces))
            for pieces, length in zip(prefixes, lengths, strict=False)
        )
        if by_parts:
            encoded = _encode(tokenizer, [text for text, _ in parts])
            ids = [token for piece in encoded for token in piece]
            lengths = np.cumsum([len(piece) for piece in encoded]).tolist()
        is_response = np.zeros(len(ids) + 1, dtype=bool)
        for (_, labelled), start, end in zip(parts, [0, *lengths], lengths, strict=False):
            is_response[start:end] = labelled
        # The EOS's text ends the last part only where the template writes it.
        if ids[-1] != eos:
            ids = [*ids, eos]
        is_response[len(ids) - 1] = True
        documents.append(Document(np.array(ids, np.int32), is_response[: len(ids)], record.where, by_parts))
    return documents


def _pieces(tokenizer: PreTrainedTokenizerBase, text: str) -> list[str]:
    """The text cut before each token that is always one of its own, whatever stands beside it."""
    border = _borders(tokenizer)
    if border is None:
        return [text]
    starts = [match.start() for match in border.finditer(text)]
    return [text[start:end] for start, end in zip([0, *starts], [*starts, len(text)], strict=True) if start < end]


@cache
def _borders(tokenizer: PreTrainedTokenizerBase) -> re.Pattern[str] | None:
    """Finds the special tokens that the tokenizer takes out of a text before anything else, as they are."""
    added = [
        token.content
        for token in tokenizer.added_tokens_decoder.values()
        if token.special and not (token.normalized or token.lstrip or token.rstrip or token.single_word)
    ]
    if not tokenizer.is_fast or not added:
        return None
    # Where one token begins another one, the longer one is taken.
    return re.compile("|".join(re.escape(token) for token in sorted(added, key=len, reverse=True)))


@cache
def _eos_token(tokenizer: PreTrainedTokenizerBase) -> str | None:
    # The tokenizer's own attribute is slow, and this is asked for each record.
    return tokenizer.eos_token


def _encode(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[list[int]]:
    # Templates write BOS themselves: adding special tokens here would double it.
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None and backend.truncation is None and backend.padding is None:
        # What the call below comes to, without a fifth of its time.
        return [encoding.ids for encoding in backend.encode_batch_fast(texts, add_special_tokens=False)]
    # `verbose` off: long documents are dealt with by `too_long`, not by the tokenizer's warning.
    batch = tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False)
    return list(batch["input_ids"])


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
    """Rows of indices into `lengths`, each at most `capacity` in sum.

    Each row takes the longest document that is left, then those that together fill the rest of it best. That is a
    subset sum, found over the bits of an integer: bit s says that some of the documents looked at add up to s.
    Where documents are about as long as a fraction of a row, this fills several points more than giving each document
    to the fullest row that has room (docs/decisions.md). Of equal documents the first comes first.
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
    """Lengths of the documents of one row: the longest, and those that leave the least space beside it."""
    chosen = [longest_first[0]]
    space = capacity - chosen[0]
    sums, all_sums = 1, (1 << (space + 1)) - 1
    before: list[tuple[int, int]] = []  # a document's length, and the sums without it
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
    """Rows of one domain's documents, in an order that `generator` fixes; without `packing` one document each.

    Each row: `input_ids`, `labels`, `position_ids` int32 [max_length] and `length`, its number of real tokens.
    Positions restart at 0 at each document and at the padding tail, so that no attention crosses a border.
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
            "labels": np.pad(np.where(is_response, ids, IGNORED), (0, padding), constant_values=IGNORED),
            "position_ids": np.concatenate(
                [np.arange(length, dtype=np.int32) for length in (*map(len, members), padding)]
            ),
            "length": len(ids),
        }
