"""Records to tokens with response-only labels, and documents to rows of `max_length` by best fit."""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Iterator, Mapping, Sequence, Sized
from dataclasses import dataclass, replace
from functools import cache
from itertools import chain
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


Messages = list[dict[str, str]]


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


def render(tokenizer: PreTrainedTokenizerBase, messages: Messages, *, generation: bool, where: str) -> str:
    """The conversation as text; `generation`: up to where the assistant starts to write.

    Raises:
        SRDEError: the template refuses the conversation (some know no system role).
    """
    try:
        return _render(tokenizer, [messages], generation)[0]
    except jinja2.TemplateError as error:
        reason = " ".join(str(error).split())
        raise SRDEError(f"{where}: the tokenizer's chat template refuses these messages: {reason}") from None


def _render_each(
    tokenizer: PreTrainedTokenizerBase, conversations: list[Messages], generation: bool, places: list[str]
) -> list[str]:
    """`render` for many, which takes half of the time; `places` name them in errors."""
    try:
        return _render(tokenizer, conversations, generation)
    except jinja2.TemplateError:  # which one it is shows one by one
        pairs = zip(conversations, places, strict=True)
        return [render(tokenizer, messages, generation=generation, where=where) for messages, where in pairs]


def _render(tokenizer: PreTrainedTokenizerBase, conversations: list[Messages], generation: bool) -> list[str]:
    options: dict[str, Any] = {"tokenize": False, "add_generation_prompt": generation}
    if template_kind(tokenizer) == "fallback":
        options |= {"chat_template": FALLBACK_TEMPLATE, "with_bos": _starts_with_bos(tokenizer)}
    return list(tokenizer.apply_chat_template(conversations, **options))


def prompt_ids(tokenizer: PreTrainedTokenizerBase, messages: Messages) -> list[int]:
    """The tokens that generation starts from: the same that training saw before the response."""
    return _encode(tokenizer, [render(tokenizer, messages, generation=True, where="prompt")])[0]


def pad_token_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """What fills a row's end: the pad token, or EOS if there is none."""
    return int(tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id)


def check_markers(tokenizer: PreTrainedTokenizerBase, record: Record) -> None:
    """Refuse a response that holds the text of the EOS token: the model would learn to stop there."""
    eos = _eos_token(tokenizer)
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
    parts_of = _split_all(records, tokenizer)
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
        *prefixes, ids = [list(chain.from_iterable(tokens[piece] for piece in pieces)) for pieces in beginnings]
        lengths = [*map(len, prefixes), len(ids)]
        by_parts = any(ids[: len(prefix)] != prefix for prefix in prefixes)
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


def _split_all(records: Sequence[Record], tokenizer: PreTrainedTokenizerBase) -> list[list[tuple[str, bool]]]:
    """Each conversation's text cut into (text, labelled) parts: prompt, response, prompt, response."""
    turns_of = [[i for i, m in enumerate(record.messages) if m["role"] == "assistant"] for record in records]
    beginnings = [r.messages[:turn] for r, turns in zip(records, turns_of, strict=True) for turn in turns]
    places = [r.where for r, turns in zip(records, turns_of, strict=True) for _ in turns]
    wholes = _render_each(tokenizer, [r.messages for r in records], False, [r.where for r in records])
    prompts = iter(_render_each(tokenizer, beginnings, True, places))
    return [
        _split(record, tokenizer, whole, dict(zip(turns, prompts, strict=False)))
        for record, turns, whole in zip(records, turns_of, wholes, strict=True)
    ]


def _split(
    record: Record, tokenizer: PreTrainedTokenizerBase, whole: str, prompts: dict[int, str]
) -> list[tuple[str, bool]]:
    """One conversation's parts; `prompts`: the text before each assistant turn."""
    messages, closing = record.messages, _closing(tokenizer)
    last_turn = len(messages) - 1
    parts: list[tuple[str, bool]] = []
    position = 0
    for turn, prompt in prompts.items():
        content, start = messages[turn]["content"].strip(), len(prompt)
        found = whole.find(content, start)
        if turn != last_turn:
            regular = found >= 0 and not whole[start:found].strip()
            end = found + len(content)
            end += len(closing) if whole.startswith(closing, end) else 0
        else:
            regular = found >= 0 and closing in whole[found:]
            end = whole.rindex(closing) + len(closing) if regular and closing else len(whole.rstrip())
        if not regular or not whole.startswith(prompt):
            # The template writes the history otherwise than it prompts: keep what inference sees, the last turn.
            return [(prompts[last_turn], False), (messages[-1]["content"] + closing, True)]
        parts += [(whole[position:start], False), (whole[start:end], True)]
        position = end
    return parts


@cache
def _eos_token(tokenizer: PreTrainedTokenizerBase) -> str | None:
    # The tokenizer's own attribute is slow, and this is asked for each record.
    return tokenizer.eos_token


@cache
def _closing(tokenizer: PreTrainedTokenizerBase) -> str:
    """What the template writes after a response, up to and including EOS where it writes that."""
    probe = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "PROBE"}]
    tail = render(tokenizer, probe, generation=False, where="chat template").rpartition("PROBE")[2]
    eos = str(tokenizer.eos_token)
    return tail[: tail.index(eos) + len(eos)] if eos in tail else tail.rstrip()


def _encode(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[list[int]]:
    # Templates write BOS themselves: adding special tokens here would double it.
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None and backend.truncation is None and backend.padding is None:
        # What the call below comes to, without a fifth of its time.
        return [encoding.ids for encoding in backend.encode_batch_fast(texts, add_special_tokens=False)]
    # `verbose` off: long documents are dealt with by `too_long`, not by the tokenizer's warning.
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
