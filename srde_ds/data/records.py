"""Parses a record of training or held-out data, or a prompt."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from srde_ds.data.choices import right_option
from srde_ds.data.conversation import (
    REASONING,
    Message,
    Tools,
    TrainOn,
    check_text,
    kind,
    only_last_trained,
    parse_messages,
    parse_tools,
    with_system,
)
from srde_ds.errors import SRDEError, nearest

SPLITS = ("train", "validation", "test")
PLAIN = ("role", "content", "train")


@dataclass(frozen=True)
class Record:
    """A document: a conversation that ends with the assistant, and its domain."""

    domain: str
    messages: list[Message]
    """in the form of `data.conversation`"""
    answer: str | None
    source: str
    where: str = ""
    """`file:line`, for error messages."""
    split: str = "train"
    choices: list[str] | None = None
    """For a multiple-choice item, the texts to choose from; `answer` is one of them."""
    tests: str | None = None
    """For a programming item, Python code that fails unless the program before it is right."""
    tools: Tools | None = None
    """Functions that the assistant may call."""

    @property
    def prompt(self) -> list[Message]:
        """Everything before the last response."""
        return self.messages[:-1]

    def plain_messages(self, *, prompt_only: bool = False) -> list[Message]:
        """The messages with their roles and contents, for trainers whose tables of messages hold no more.

        Args:
            prompt_only: only those before the last response.

        Raises:
            SRDEError: the record uses tools, or one of these messages holds more, such as a thought.
        """
        messages = self.prompt if prompt_only else self.messages
        more = [key for turn in messages for key in turn if key not in PLAIN]
        if self.tools is not None or "tool_calls" in more or "tool_call_id" in more:
            raise SRDEError(f"{self.where}: it uses tools, which rows for TRL do not hold. Leave such records out.")
        if more:
            raise SRDEError(
                f"{self.where}: '{more[0]}' in a message, which rows for TRL do not hold. Write it into the content, "
                "or leave such records out."
            )
        return [{key: turn[key] for key in ("role", "content")} for turn in messages]


def parse_record(values: Any, place: str, domains: Sequence[str], train_on: TrainOn = "all") -> Record:
    """The record that an object with `prompt` and `response`, or with `messages`, describes.

    `null` counts as absent. If there is only one domain, a record need not name it.

    Args:
        place: the record's origin, such as `file:line`, for errors and `Record.where`.
        train_on: with "last", only the last of the turns that would carry labels does so.

    Raises:
        SRDEError: a field is missing or not understood.
    """
    fields = _fields(values, place)
    if "domain" not in fields and len(domains) == 1:
        fields["domain"] = domains[0]
    domain = check_text(fields.get("domain"), "domain", place)
    if domain not in domains:
        raise SRDEError(
            f"{place}: unknown domain '{domain}', must be one of {', '.join(domains)}.{nearest(domain, domains)}"
        )
    messages, tools = _conversation(fields, place, ("prompt", "response"))
    _check_turns(messages, place)
    if train_on == "last":
        messages = only_last_trained(messages)
    choices = _choices(fields["choices"], place) if "choices" in fields else None
    if choices is not None:
        named = fields.get("answer")
        try:  # in this form, a text that is one of the choices is that choice
            answer: str | None = named if named in choices else choices[right_option(named, choices)]
        except ValueError as error:
            raise SRDEError(f"{place}: field 'answer' is {error}.") from None
    else:
        answer = check_text(fields["answer"], "answer", place) if "answer" in fields else None
    tests = check_text(fields["tests"], "tests", place) if "tests" in fields else None
    if choices is not None and tests is not None:
        raise SRDEError(f"{place}: has both 'choices' and 'tests': keep the one that the item is scored by.")
    source = check_text(fields["source"], "source", place) if fields.get("source", "") != "" else ""
    split = check_text(fields["split"], "split", place) if "split" in fields else "train"
    if split not in SPLITS:
        raise SRDEError(
            f"{place}: unknown split '{split}', must be one of {', '.join(SPLITS)}.{nearest(split, SPLITS)}"
        )
    return Record(domain, messages, answer, source, place, split, choices, tests, tools)


def parse_prompt(values: Any, place: str) -> tuple[list[Message], Tools | None]:
    """The conversation to be answered, and the functions that the answer may call.

    Args:
        values: an object with `prompt`, or with `messages`, whose last answer is left out.
        place: see `parse_record`.

    Raises:
        SRDEError: a field is not understood, or there is no question.
    """
    fields = _fields(values, place)
    messages, tools = _conversation(fields, place, ("prompt",))
    while messages and messages[-1]["role"] == "assistant":
        messages.pop()
    if not any(message["role"] != "system" for message in messages):
        raise SRDEError(f"{place}: 'messages' ask nothing: there is no message before the answer.")
    return messages, tools


def _fields(values: Any, place: str) -> dict[str, Any]:
    if not isinstance(values, Mapping):
        raise SRDEError(f"{place}: must be a JSON object, not {kind(values)}.")
    return {key: value for key, value in values.items() if value is not None}


def _conversation(fields: dict[str, Any], place: str, pair: tuple[str, ...]) -> tuple[list[Message], Tools | None]:
    """The messages and tools of a record.

    Args:
        pair: the fields to use if there are no messages: the user's text and the assistant's.
    """
    present = [key for key in pair if key in fields]
    if "messages" in fields and present:
        raise SRDEError(f"{place}: has both 'messages' and '{present[0]}': keep one form.")
    if "messages" in fields:
        messages = parse_messages(fields["messages"], place)
    elif present:
        messages = [
            {"role": role, "content": check_text(fields.get(key), key, place)}
            for key, role in zip(pair, ("user", "assistant"), strict=False)
        ]
        thought = {key: fields[key] for key in REASONING if key in fields}
        if thought and "response" in pair:
            messages = [messages[0], *parse_messages([messages[1] | thought], place)]
    else:
        raise SRDEError(f"{place}: needs {' and '.join(map(repr, pair))}, or 'messages'.")
    if "system" in fields:
        messages = with_system(messages, fields["system"], place)
    described = [key for key in ("tools", "functions") if key in fields]
    if len(described) > 1:
        raise SRDEError(f"{place}: has both 'tools' and 'functions': keep one of them.")
    return messages, parse_tools(fields[described[0]], place) if described else None


def _check_turns(messages: list[Message], place: str) -> None:
    roles = [message["role"] for message in messages]
    if not roles or roles[-1] != "assistant":
        raise SRDEError(f"{place}: the last of 'messages' must be from the assistant.")
    if roles[:2] == ["system", "assistant"] or roles[0] not in ("system", "user"):
        raise SRDEError(f"{place}: 'messages' must hold a user message before the first from the assistant.")
    if all(message.get("train") is False for message in messages if message["role"] == "assistant"):
        raise SRDEError(f"{place}: no turn is trained on (all have weight 0 or train false): leave the record out.")


def _choices(value: Any, where: str) -> list[str]:
    if not isinstance(value, list) or len(value) < 2:
        raise SRDEError(f"{where}: field 'choices' must be a list of at least two texts.")
    choices = [check_text(choice, "choices", where) for choice in value]
    if len(set(choices)) < len(choices):
        raise SRDEError(f"{where}: field 'choices' holds the same text twice: keep one of them.")
    return choices
