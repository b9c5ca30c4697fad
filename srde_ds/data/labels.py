"""Finds the characters of a rendered conversation that the assistant says. Only these are labelled.

A turn is cut out of the rendered text: it starts where the text continues the generation prompt, and ends with what
closes the turn. If its borders cannot be found, or the template leaves out a part of a message, the conversation is
refused.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from os.path import commonprefix
from typing import Any

from transformers import PreTrainedTokenizerBase

from srde_ds.data.conversation import Message, Tools, after_thought
from srde_ds.data.records import Record
from srde_ds.data.template import CHANGE_TEMPLATE, TEMPLATE_ERRORS, render, render_batch, turn_ends, writes_tools
from srde_ds.errors import SRDEError

Part = tuple[str, bool]
"""A text, and whether it is labelled"""


def prompt_text(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], *, tools: Tools | None = None, where: str
) -> str:
    """The text that generation starts from.

    Raises:
        SRDEError: the template refuses the conversation, or leaves out a part of it.
    """
    text = render(tokenizer, messages, generation=True, where=where, tools=tools)
    _check_context(tokenizer, messages, tools, text, where)
    return text


def split_all(records: Sequence[Record], tokenizer: PreTrainedTokenizerBase) -> list[list[Part] | SRDEError]:
    """Cut each conversation's text into alternating prompts and responses, or say why that is impossible.

    A conversation ends with the last turn that is trained on, since nothing after it has an effect.
    """
    jobs = [_Job(record, _trained(record)) for record in records]
    wholes = _render_each(tokenizer, [(job, job.messages) for job in jobs], False)
    prompts = _render_each(tokenizer, [(job, job.messages[:turn]) for job in jobs for turn in job.trained], True)
    # Each earlier turn as the template writes it at the end of a conversation.
    earlier = _render_each(
        tokenizer, [(job, job.messages[: turn + 1]) for job in jobs for turn in job.trained[:-1]], False
    )
    parts: list[list[Part] | SRDEError] = []
    for job, whole in zip(jobs, wholes, strict=True):
        before = [next(prompts) for _ in job.trained]
        alone = [next(earlier) for _ in job.trained[:-1]]
        error = next((text for text in (whole, *before, *alone) if isinstance(text, SRDEError)), None)
        try:
            parts.append(error or _split(tokenizer, job, str(whole), list(map(str, before)), list(map(str, alone))))
        except SRDEError as refused:
            parts.append(refused)
    return parts


@dataclass(frozen=True)
class _Job:
    """A record, and the indices of the messages that are trained on."""

    record: Record
    trained: list[int]

    @property
    def messages(self) -> list[Message]:
        return self.record.messages[: self.trained[-1] + 1]


def _trained(record: Record) -> list[int]:
    return [i for i, m in enumerate(record.messages) if m["role"] == "assistant" and m.get("train", True)]


def _render_each(
    tokenizer: PreTrainedTokenizerBase, items: list[tuple[_Job, list[Message]]], generation: bool
) -> Iterator[str | SRDEError]:
    """`render` for many conversations. Those without tools are rendered together, which takes half the time."""
    plain = [messages for job, messages in items if job.record.tools is None and all(len(m) == 2 for m in messages)]
    try:
        together = iter(render_batch(tokenizer, plain, generation)) if plain else iter(())
    except TEMPLATE_ERRORS:  # find the refused one by rendering them one by one
        together = None
    for job, messages in items:
        if together and job.record.tools is None and all(len(m) == 2 for m in messages):
            yield next(together)
            continue
        try:
            where = job.record.where
            yield render(tokenizer, messages, generation=generation, where=where, tools=job.record.tools)
        except SRDEError as error:
            yield error


def _split(
    tokenizer: PreTrainedTokenizerBase, job: _Job, whole: str, prompts: list[str], alone: list[str]
) -> list[Part]:
    """The parts of one conversation.

    Args:
        prompts: the text before each trained turn.
        alone: for each trained turn but the last, the text of the conversation that ends with it.
    """
    ends, where, last = turn_ends(tokenizer), job.record.where, job.trained[-1]
    parts: list[Part] = []
    position = 0
    for number, (turn, prompt) in enumerate(zip(job.trained, prompts, strict=True)):
        if not whole.startswith(prompt):
            raise SRDEError(f"{where}: {_does_not_go_on(whole, prompt, earlier=turn != last)}")
        start = len(prompt)
        if turn == last or whole.startswith(alone[number]):
            text = whole if turn == last else alone[number]
            end = len(text) - (len(ends.rest) if text.endswith(ends.rest) else 0)
        else:
            end = _end_of_earlier(tokenizer, job, whole, turn, start)
        said = whole[start:end]
        _check_said(job.record.messages[turn], said, prompt, f"{where}: {_turn_name(job.record, turn)}", turn != last)
        parts += [(whole[position:start], False), (said, True)]
        position = end
    _check_context(tokenizer, job.messages, job.record.tools, whole, where)
    return parts


def _end_of_earlier(tokenizer: PreTrainedTokenizerBase, job: _Job, whole: str, turn: int, start: int) -> int:
    """The end of an earlier turn that the template writes unlike a last turn, found by changing the next message."""
    ends, record = turn_ends(tokenizer), job.record
    following = job.messages[turn + 1]
    other = "y" if following["content"].lstrip().startswith("x") else "x"
    changed = [*job.messages[: turn + 1], following | {"content": other}, *job.messages[turn + 2 :]]
    try:
        text = render(tokenizer, changed, generation=False, where=record.where, tools=record.tools)
        same = commonprefix([whole, text])
    except SRDEError:
        same = ""
    if ends.earlier and same.endswith(ends.earlier):
        end = len(same) - len(ends.earlier) + len(ends.earlier_end)
    else:
        found = same.rfind(ends.earlier_end, start) if ends.earlier_end else -1
        end = found + len(ends.earlier_end) if found >= 0 else -1
    if end <= start:
        raise SRDEError(
            f"{record.where}: {_turn_name(record, turn)}: its end cannot be found in the chat template's text: give "
            '--train_on last, or mark the turn with "train": false.'
        )
    return end


def _does_not_go_on(whole: str, prompt: str, *, earlier: bool) -> str:
    same = len(commonprefix([whole, prompt]))
    written, asked = whole[same : same + 40], prompt[max(0, same - 10) :][-60:]
    if earlier:
        return (
            f"the chat template writes an earlier turn ({written!r}) unlike its prompt ({asked!r}): give "
            '--train_on last, or mark the earlier turns with "train": false.'
        )
    thought = "give the thought that the prompt opens ('reasoning_content', or the beginning of 'content'), or "
    return (
        f"the chat template's text of the response ({written!r}) does not continue its generation prompt, "
        f"which ends in {asked!r}: {thought if 'think' in prompt[-20:].lower() else ''}{CHANGE_TEMPLATE}."
    )


def _turn_name(record: Record, turn: int) -> str:
    number = sum(message["role"] == "assistant" for message in record.messages[: turn + 1])
    return f"turn {number} of the assistant"


# --- completeness


def _check_said(message: Message, said: str, prompt: str, place: str, earlier: bool) -> None:
    """Refuse a turn if the template leaves out a part of it. The prompt may hold the part's beginning."""
    for field, text in _fields(message):
        if _holds(said, text):
            continue
        rest = _packed(text)
        end = _packed(prompt[-80:])
        opened = next((n for n in range(min(len(rest), len(end)), 0, -1) if end.endswith(rest[:n])), 0)
        if rest[opened:] in _packed(said):
            continue
        remedy = (
            'give --train_on last, or mark the turn with "train": false'
            if earlier
            else f"leave it out, or {CHANGE_TEMPLATE}"
        )
        raise SRDEError(f"{place}: the chat template leaves out {field} ({text[:40]!r}): {remedy}.")


def _check_context(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], tools: Tools | None, whole: str, where: str
) -> None:
    """Refuse messages or tools that the template leaves out. It may leave out thoughts of earlier turns."""
    for message in messages:
        for field, text in _fields(message):
            if field == "'reasoning_content'" or _holds(whole, text):
                continue
            if message["role"] == "assistant" and _holds(whole, after_thought(text)):
                continue
            if _packed(text) not in _packed(whole):
                raise SRDEError(
                    f"{where}: the chat template leaves out {field} of a message of role {message['role']} "
                    f"({text[:40]!r}): remove it from the record, or {CHANGE_TEMPLATE}."
                )
    if tools and not (writes_tools(tokenizer) and all(_holds(whole, tool["function"]["name"]) for tool in tools)):
        raise SRDEError(
            f"{where}: the chat template leaves out the descriptions of the functions ('tools'): remove them from the "
            f"record, or {CHANGE_TEMPLATE}."
        )


def _fields(message: Message) -> Iterator[tuple[str, str]]:
    """The names and texts of a message's parts that must occur in the rendered text."""
    yield "'content'", message["content"]
    if len(message) == 2:
        return
    if "reasoning_content" in message:
        yield "'reasoning_content'", message["reasoning_content"]
    if "name" in message and message["role"] != "tool":
        yield "'name'", message["name"]
    for call in message.get("tool_calls", []):
        yield "'tool_calls'", call["function"]["name"]
        for text in _leaves(call["function"]["arguments"]):
            yield "'tool_calls'", text


def _leaves(value: Any) -> Iterator[str]:
    if isinstance(value, dict):
        for key, entry in value.items():
            yield str(key)
            yield from _leaves(entry)
    elif isinstance(value, list):
        for entry in value:
            yield from _leaves(entry)
    elif isinstance(value, str):
        yield value


def _holds(text: str, part: str) -> bool:
    """Whether `part` occurs in `text`, unchanged or in JSON, apart from white space around it."""
    part = part.strip()
    return part in text or json.dumps(part, ensure_ascii=False)[1:-1] in text or json.dumps(part)[1:-1] in text


def _packed(text: str) -> str:
    return "".join(text.split())
