"""Renders conversations with the chat template, and finds out what the template reads and how it closes a turn."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal, cast

import jinja2
from transformers import PreTrainedTokenizerBase

from srde_ds.data.conversation import REASONING, Message, Tools
from srde_ds.errors import SRDEError

# For tokenizers without a chat template: each message on its own line, each response closed by EOS.
FALLBACK_TEMPLATE = (
    "{% if with_bos %}{{ bos_token }}{% endif %}{% for message in messages %}{{ message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}{{ '\\n' }}{% endfor %}"
)
# A template is a program in a sandbox, and may raise any of these on messages that its author did not expect.
TEMPLATE_ERRORS = (
    jinja2.TemplateError,
    TypeError,
    ValueError,
    LookupError,
    AttributeError,
    ArithmeticError,
    RecursionError,
)
CHANGE_TEMPLATE = "change the chat template in a copy of the base's folder"


@dataclass(frozen=True)
class TurnEnds:
    """What the template writes after a response, found by rendering two short conversations.

    Attributes:
        last: text after the last response, up to and including EOS if the template writes it.
        rest: white space after `last`, which no turn needs.
        earlier: text between an earlier response and the next message's text.
        earlier_end: the beginning of `earlier` that closes the response.
        markers: tokens that close a turn. No response may contain their text.
        stop: the token that ends the last response.
    """

    last: str
    rest: str
    earlier: str
    earlier_end: str
    markers: tuple[str, ...]
    stop: str | None


def template_kind(tokenizer: PreTrainedTokenizerBase) -> Literal["tokenizer", "fallback"]:
    """Whether conversations are rendered with the tokenizer's own chat template or with FALLBACK_TEMPLATE."""
    return "tokenizer" if tokenizer.chat_template else "fallback"


def template_text(tokenizer: PreTrainedTokenizerBase) -> str:
    """The chat template in use."""
    return tokenizer.get_chat_template() if tokenizer.chat_template else FALLBACK_TEMPLATE


def render(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Message],
    *,
    generation: bool,
    where: str,
    tools: Tools | None = None,
) -> str:
    """The conversation as text; with `generation`, up to where the assistant starts to write.

    Raises:
        SRDEError: the template refuses the conversation (some know no system role), or fails.
    """
    messages = _as_template_wants(tokenizer, messages, where)
    try:
        return render_batch(tokenizer, [messages], generation, tools)[0]
    except TEMPLATE_ERRORS as error:
        raise SRDEError(f"{where}: {_refusal(tokenizer, messages, generation, tools, error)}") from None


def _refusal(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Message],
    generation: bool,
    tools: Tools | None,
    error: Exception,
) -> str:
    """The fault and its remedy."""
    raised = "" if isinstance(error, jinja2.TemplateError) else f" ({type(error).__name__})"
    reason = f"the tokenizer's chat template refuses these messages: {' '.join(str(error).split())}{raised}. "
    roles = {message["role"] for message in messages}
    if any("tool_calls" in message for message in messages) or "tool" in roles:
        return f"{reason}They hold tool calls ('tool_calls'): leave them out, or {CHANGE_TEMPLATE}."
    if "system" in roles:
        try:
            render_batch(tokenizer, [messages[1:]], generation, tools)
        except TEMPLATE_ERRORS:
            pass
        else:
            return f"{reason}It takes them without the system message: write that into the first user message."
    return f"{reason}Change the record, or {CHANGE_TEMPLATE}."


def render_batch(
    tokenizer: PreTrainedTokenizerBase,
    conversations: Sequence[Sequence[Message]],
    generation: bool,
    tools: Tools | None = None,
) -> list[str]:
    """`render` for several conversations of roles and texts only. Raises the template's own errors."""
    options: dict[str, Any] = {"tokenize": False, "add_generation_prompt": generation, "tools": tools}
    if template_kind(tokenizer) == "fallback":
        options |= {"chat_template": FALLBACK_TEMPLATE, "with_bos": starts_with_bos(tokenizer)}
    texts: Any = tokenizer.apply_chat_template(cast("Any", conversations), **options)
    return list(texts)


@cache
def starts_with_bos(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the tokenizer begins a text with BOS."""
    return tokenizer.bos_token_id is not None and tokenizer("a")["input_ids"][0] == tokenizer.bos_token_id


# --- the form in which the template wants its messages


def _as_template_wants(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], where: str) -> list[Message]:
    """The messages with thoughts and tool calls in the form that this template reads."""
    return [_message(tokenizer, message, where) if len(message) > 2 else message for message in messages]


def _message(tokenizer: PreTrainedTokenizerBase, message: Message, where: str) -> Message:
    message = {key: value for key, value in message.items() if key != "train"}
    if "reasoning_content" in message:
        write = reasoning_form(tokenizer)
        if write is None:
            raise SRDEError(
                f"{where}: the tokenizer's chat template does not write a thought ('reasoning_content'): put it into "
                f"'content' as this base writes thoughts, leave it out, or {CHANGE_TEMPLATE}."
            )
        message = write(message)
    if "tool_calls" in message:
        write = tool_call_form(tokenizer)
        if write is None:
            raise SRDEError(
                f"{where}: the tokenizer's chat template does not write tool calls ('tool_calls'): leave them out, or "
                f"{CHANGE_TEMPLATE}."
            )
        message = write(message)
    return message


Form = Callable[[Message], Message]


@cache
def reasoning_form(tokenizer: PreTrainedTokenizerBase) -> Form | None:
    """How a message must hold its thought for this template; None if the template does not write thoughts."""

    def by_key(key: str) -> Form:
        return lambda message: {
            **{name: value for name, value in message.items() if name != "reasoning_content"},
            key: message["reasoning_content"],
        }

    def by_part(message: Message) -> Message:
        parts = [{"type": "thinking", "thinking": message["reasoning_content"]}]
        parts += [{"type": "text", "text": message["content"]}] if message["content"] else []
        kept = {name: value for name, value in message.items() if name != "reasoning_content"}
        return {**kept, "content": parts}

    probe = {"role": "assistant", "content": "ANSWER", "reasoning_content": "THOUGHT"}
    for form in (*map(by_key, REASONING), by_part):
        # A template that does not know parts writes the list as it is.
        text = _try(tokenizer, [{"role": "user", "content": "a"}, form(probe)])
        if text.count("THOUGHT") == text.count("ANSWER") == 1 and "'thinking'" not in text and '"thinking"' not in text:
            return form
    return None


@cache
def tool_call_form(tokenizer: PreTrainedTokenizerBase) -> Form | None:
    """How a message must hold its tool calls for this template; None if the template does not write them."""

    def as_text(message: Message) -> Message:
        calls = [
            call | {"function": call["function"] | {"arguments": json.dumps(arguments, ensure_ascii=False)}}
            for call in message["tool_calls"]
            for arguments in [call["function"]["arguments"]]
        ]
        return {**message, "tool_calls": calls}

    call = {"type": "function", "id": "call00000", "function": {"name": "NAME", "arguments": {"KEY": "VALUE"}}}
    probe = {"role": "assistant", "content": "", "tool_calls": [call]}
    for form in (dict, as_text):
        text = _try(tokenizer, [{"role": "user", "content": "a"}, form(probe)])
        # A template that inserts the arguments as text would write an object in Python's form, not as JSON.
        if all(name in text for name in ("NAME", "KEY", "VALUE")) and "'KEY'" not in text and '\\"KEY' not in text:
            return form
    return None


def _try(tokenizer: PreTrainedTokenizerBase, messages: list[Message]) -> str:
    """The text of a probe; empty if the template refuses it."""
    try:
        return render_batch(tokenizer, [messages], generation=False)[0]
    except TEMPLATE_ERRORS:
        return ""


@cache
def writes_tools(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the template writes the descriptions of the functions that the assistant may call."""
    described = {"name": "NAME", "description": "WHAT", "parameters": {"type": "object", "properties": {}}}
    question: list[Message] = [{"role": "user", "content": "a"}]
    try:
        text = render_batch(tokenizer, [question], True, [{"type": "function", "function": described}])[0]
    except TEMPLATE_ERRORS:
        return False
    return "NAME" in text


# --- where turns end


@cache
def turn_ends(tokenizer: PreTrainedTokenizerBase) -> TurnEnds:
    """Find out how the template closes its turns.

    Raises:
        SRDEError: the template refuses a question with an answer.
    """
    question = {"role": "user", "content": "QUESTION"}
    answer = {"role": "assistant", "content": "PROBE"}
    tail = render(tokenizer, [question, answer], generation=False, where="chat template").rpartition("PROBE")[2]
    eos = str(tokenizer.eos_token)
    last = tail[: tail.index(eos) + len(eos)] if eos in tail else tail.rstrip()
    head, _, going_on = _try(tokenizer, [question, answer, question | {"content": "NEXT"}]).rpartition("PROBE")
    earlier = going_on.partition("NEXT")[0]
    added = sorted((token.content for token in tokenizer.added_tokens_decoder.values()), key=len, reverse=True)
    first, opens = _first(added, earlier), _last(added, head.partition("QUESTION")[0])
    if last and earlier.startswith(last):
        earlier_end = last
    elif last and first and first != opens and not earlier[: earlier.index(first)].strip():
        # Earlier turns are closed by another token than the last turn, which EOS may follow.
        earlier_end = earlier[: earlier.index(first) + len(first)]
    else:
        earlier_end = ""
    stop = _first(added, last)
    markers = [eos, stop or last.strip(), first if earlier_end and first else ""]
    distinct = tuple(dict.fromkeys(marker for marker in markers if marker))
    return TurnEnds(last, tail[len(last) :], earlier, earlier_end, distinct, stop)


def _first(tokens: list[str], text: str) -> str | None:
    return min((token for token in tokens if token in text), key=text.index, default=None)


def _last(tokens: list[str], text: str) -> str | None:
    return max((token for token in tokens if token in text), key=text.rindex, default=None)
