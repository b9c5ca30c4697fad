"""Common forms of training data, each recognised by its keys and converted to one form: `messages`, or `prompt` and
`response`, along with the keys that every record may have.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

from srde_ds.data.choices import right_option
from srde_ds.data.conversation import REASONING, kind, text_fault
from srde_ds.data.sources.examples import BrokenRow, lettered_choice
from srde_ds.errors import SRDEError, nearest

Fields = dict[str, Any]

COMMON_KEYS = (
    "domain", "answer", "choices", "tests", "source", "split", "system", "tools", "functions",
    "id", "revision", "row", "parallel_tool_calls",
)  # fmt: skip
"""Keys that a record of any form may have"""
UNUSED = ("id", "revision", "row", "parallel_tool_calls")
"""Those of them that have no effect here"""


@dataclass(frozen=True)
class Form:
    """One of these forms."""

    name: str
    title: str
    """what its records are called in the log"""
    marks: tuple[tuple[str, ...], ...]
    """sets of keys; each of them identifies the form"""
    keys: tuple[str, ...]
    """all its own keys"""
    convert: Callable[[Fields, bool], Fields]
    """makes messages, or prompt and response; its second argument is False if no response is needed"""

    @cached_property
    def known(self) -> dict[str, None]:
        """All keys that records of this form may have, in order."""
        return dict.fromkeys((*self.keys, *COMMON_KEYS))

    @cached_property
    def copied(self) -> frozenset[str]:
        """The keys that are copied unchanged."""
        return frozenset(COMMON_KEYS).difference(self.keys, UNUSED)

    @cached_property
    def _marks(self) -> list[frozenset[str]]:
        return [frozenset(mark) for mark in self.marks]

    def fits(self, fields: Mapping[str, Any]) -> bool:
        """Whether a record's keys identify this form."""
        return any(mark.issubset(fields) for mark in self._marks)


class BadForm(ValueError):
    """A fault of a record; the message does not name its place."""


def convert(content: Fields, place: str, *, form: str | None = None, answered: bool = True) -> tuple[Form, Fields]:
    """Convert a record of any form to messages, or prompt and response; other keys stay. Also return the form.

    Args:
        content: the record. Keys with the value null count as absent.
        form: a name in FORMS; None: the form that the keys identify.
        answered: False for a prompt, whose answer may be missing.

    Raises:
        SRDEError: no form has these keys, or a value does not fit the form.
    """
    fields = {key: value for key, value in content.items() if value is not None}
    chosen = FORMS[form] if form is not None else next((one for one in FORMS.values() if one.fits(fields)), None)
    if chosen is None:
        raise SRDEError(
            f"{place}: needs 'prompt' and 'response', or 'messages', or the keys of another form: "
            f"{'; '.join(' and '.join(one.marks[0]) for one in FORMS.values())}. It has "
            f"{', '.join(map(repr, fields)) or 'no key'}: give --columns, such as prompt=question,response=reply."
        )
    if unknown := [key for key in fields if key not in chosen.known]:
        raise SRDEError(
            f"{place}: unknown key '{unknown[0]}' in a record of the form {chosen.name}, which has "
            f"{', '.join(chosen.known)}.{nearest(unknown[0], chosen.known)} Map it to a known key with --columns "
            f"KEY={unknown[0]}, or leave it out with --ignore_columns {','.join(unknown)}."
        )
    try:
        converted = chosen.convert(fields, answered)
    except (BadForm, BrokenRow) as error:
        raise SRDEError(f"{place}: {error}.") from None
    return chosen, converted | {key: fields[key] for key in fields if key in chosen.copied}


def _turns(prompt: Any, response: Any) -> list[Fields]:
    """The messages of a prompt and a response, each of which may be text or a list of messages.

    A response that is a whole conversation, as in some sets of preferences, begins with the prompt.
    """
    asked = prompt if isinstance(prompt, list) else [{"role": "user", "content": prompt}]
    if response is None:
        return asked
    if not isinstance(response, list):
        return [*asked, {"role": "assistant", "content": response}]
    if _said(response[: len(asked)]) == _said(asked):
        return response
    if response and _said(response[:1])[0][0] in _ASKING:
        raise BadForm(
            "the response begins with a turn of the user or system that is not the prompt's: give only what follows "
            "the prompt, or the whole conversation as messages"
        )
    return [*asked, *response]


_ASKING = ("user", "human", "system")


def _said(turns: list[Any]) -> list[tuple[Any, Any]]:
    """Role and content of messages."""
    named = [with_roles(turn) if isinstance(turn, dict) else {} for turn in turns]
    return [(turn.get("role"), turn.get("content")) for turn in named]


def _pair(asked: str, answer: str, fields: Fields, answered: bool) -> Fields:
    for key in (asked, answer) if answered else (asked,):
        _check_text(fields.get(key), key)
    prompt, response = fields[asked], fields.get(answer) if answered else None
    if isinstance(prompt, list) or isinstance(response, list):
        return {"messages": _turns(prompt, response)}
    return {"prompt": prompt} | ({"response": response} if response is not None else {})


def _check_text(value: Any, key: str) -> None:
    """Refuse what is neither text nor a list of messages, by the key that the file has."""
    if not isinstance(value, list) and (fault := text_fault(value)):
        raise BadForm(f"field '{key}' {fault}")


def _list(value: Any, key: str) -> list[Any]:
    """A list, also from its JSON text, which some tables hold."""
    if isinstance(value, str) and value.lstrip().startswith("["):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError) as error:
            raise BadForm(f"field '{key}' is not valid JSON ({error})") from None
    if not isinstance(value, list):
        raise BadForm(f"field '{key}' must be a list, not {kind(value)}")
    return value


# -- the forms -------------------------------------------------------------------------------------------------------


def _messages(fields: Fields, _: bool) -> Fields:
    return {"messages": _list(fields.get("messages"), "messages")}


def _sharegpt(fields: Fields, _: bool) -> Fields:
    """Turns with `from` and `value`; some files have `role` and `content` instead."""
    turns = _list(fields.get("conversations"), "conversations")
    if not all(isinstance(turn, dict) for turn in turns):
        raise BadForm("field 'conversations' must be a list of objects with 'from' and 'value'")
    return {"messages": [with_roles(turn) for turn in turns]}


def with_roles(turn: Mapping[str, Any]) -> Fields:
    """A message with `role` and `content` in place of ShareGPT's `from` and `value`."""
    names = {"from": "role", "value": "content"}
    for key, name in names.items():
        if turn.get(key) is not None and turn.get(name) not in (None, turn[key]):
            raise BadForm(f"a turn has both '{key}' and '{name}', which differ: leave one of them out")
    return {names.get(key, key): value for key, value in turn.items() if value is not None or key not in names}


def _alpaca(fields: Fields, answered: bool) -> Fields:
    instruction, given = fields.get("instruction"), fields.get("input", "")
    if isinstance(instruction, str) and instruction.strip() and isinstance(given, str) and given.strip():
        instruction = f"{instruction}\n\n{given}"
    elif not isinstance(given, str):
        raise BadForm(f"field 'input' must be text, not {kind(given)}")
    pair = _pair("instruction", "output", fields | {"instruction": instruction}, answered)
    history = fields.get("history", [])
    if not history:
        return pair
    if not isinstance(history, list) or not all(isinstance(turn, list) and len(turn) == 2 for turn in history):
        raise BadForm("field 'history' must be a list of pairs of an instruction and its answer")
    for text in (text for turn in history for text in turn):
        _check_text(text, "history")
    before = [message for asked, answer in history for message in _turns(asked, answer)]
    return {"messages": [*before, *_turns(pair["prompt"], pair.get("response"))]}


def _prompt_response(fields: Fields, answered: bool) -> Fields:
    pair = _pair("prompt", "response", fields, answered)
    thoughts = {key: fields[key] for key in REASONING if key in fields}
    if thoughts and "prompt" not in pair:
        raise BadForm(f"field '{min(thoughts)}' needs a response that is text: put it into the message")
    return pair | (thoughts if answered else {})


def _multiple_choice(fields: Fields, answered: bool) -> Fields:
    for key, others in (("choices", ("choices", "options")), ("answer", ("answer", "answerKey", "label"))):
        if (found := sum(name in fields for name in others)) > 1:
            raise BadForm(f"has several of {', '.join(others)}: keep one")
        if not found and (answered or key == "choices"):
            raise BadForm(f"field '{key}' is missing")
    question = fields.get("question")
    if not isinstance(question, str) or not question.strip():
        raise BadForm("field 'question' must be text, and not empty")
    given = fields.get("choices", fields.get("options"))
    labels: list[str] | None
    if isinstance(given, dict) and isinstance(given.get("text"), list) and isinstance(given.get("label"), list):
        labels, options = [str(label) for label in given["label"]], given["text"]
    elif isinstance(given, dict):
        labels, options = list(given), list(given.values())
    else:
        labels, options = None, _list(given, "choices")
    if not all(isinstance(option, str) for option in options):
        raise BadForm("field 'choices' must hold texts")
    answer = next((fields[name] for name in ("answer", "answerKey", "label") if name in fields), None)
    try:
        right = right_option(answer, options, labels) if answered else 0
    except ValueError as error:
        raise BadForm(f"field 'answer' is {error}") from None
    context, rationale = (fields.get(key, "") for key in ("context", "rationale"))
    for key, text in (("context", context), ("rationale", rationale)):
        if fault := text_fault(text, may_be_empty=True):
            raise BadForm(f"field '{key}' {fault}")
    example = lettered_choice(question.strip(), options, right, context=context, reasoning=rationale)
    if not answered:
        return {"prompt": example.messages[0]["content"]}
    return {"messages": example.messages, "answer": example.answer}


FORMS = {
    form.name: form
    for form in (
        Form("messages", "chat messages", (("messages",),), ("messages",), _messages),
        Form("sharegpt", "ShareGPT conversations", (("conversations",),), ("conversations",), _sharegpt),
        Form(
            "alpaca",
            "Alpaca instructions",
            (("instruction", "output"), ("instruction",)),
            ("instruction", "input", "output", "history"),
            _alpaca,
        ),
        Form(
            "prompt_completion",
            "prompts and completions",
            (("prompt", "completion"), ("completion",)),
            ("prompt", "completion"),
            partial(_pair, "prompt", "completion"),
        ),
        Form(
            "prompt_response",
            "prompts and responses",
            (("prompt", "response"), ("prompt",), ("response",)),
            ("prompt", "response", *REASONING),
            _prompt_response,
        ),
        Form(
            "multiple_choice",
            "multiple choice",
            (("question", "choices"), ("question", "options")),
            ("question", "choices", "options", "answer", "answerKey", "label", "context", "rationale"),
            _multiple_choice,
        ),
        Form(
            "question_answer",
            "questions and answers",
            (("question",),),
            ("question", "answer"),
            partial(_pair, "question", "answer"),
        ),
    )
}
"""By name, in the order in which they are tried"""
