"""Brings messages in every common spelling to one form, without silently leaving anything out.

A message in that form has `role` and `content`, and may have `reasoning_content` (the thought before an answer),
`tool_calls` (`[{"type": "function", "id", "function": {"name", "arguments"}}]`), `tool_call_id`, `name`, and
`"train": False` for an assistant's turn without labels. Roles are system, user, assistant and tool.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, Literal

from srde_ds.errors import SRDEError, nearest

Message = dict[str, Any]
Tools = list[dict[str, Any]]
TrainOn = Literal["all", "last"]
"""Which of the assistant's turns carry labels, apart from those that are marked to carry none"""

ROLES = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "model": "assistant",
    "tool": "tool",
    "function": "tool",
    "observation": "tool",
    "function_call": "assistant",
}
"""the names that a role may have, and the role that each means"""
REASONING = ("reasoning_content", "reasoning", "thinking")
COUNTS = ("weight", "train", "training")
"""keys that say whether a turn carries labels"""
KEYS = ("role", "content", *REASONING, "tool_calls", "function_call", "tool_call_id", "name", *COUNTS)
TEXT_PARTS = ("text", "input_text", "output_text")
REASONING_PARTS = ("thinking", "reasoning")
THOUGHT_MARKS = {"<think>": "</think>", "[THINK]": "[/THINK]"}
"""What opens a thought inside a text, and what closes it"""


def parse_messages(value: Any, place: str) -> list[Message]:
    """The messages of a conversation in the one form. An empty system message is left out.

    Args:
        place: name of the record in errors, such as `file:line`.

    Raises:
        SRDEError: a message is not understood, or a system message is not the first.
    """
    if not isinstance(value, list) or not all(isinstance(message, dict) for message in value):
        raise SRDEError(f"{place}: field 'messages' must be a list of objects with 'role' and 'content'.")
    parsed = [_message(message, f"{place}: messages[{index}]") for index, message in enumerate(value)]
    messages = [message for message in parsed if message["role"] != "system" or message["content"].strip()]
    if any(message["role"] == "system" for message in messages[1:]):
        raise SRDEError(f"{place}: a system message must come first in 'messages'.")
    return messages


def with_system(messages: list[Message], system: Any, place: str) -> list[Message]:
    """`messages`, preceded by the record's separate system message."""
    if not isinstance(system, str):
        raise SRDEError(f"{place}: field 'system' must be text, not {kind(system)}.")
    if not system.strip():
        return messages
    if messages and messages[0]["role"] == "system":
        raise SRDEError(f"{place}: has both 'system' and a system message in 'messages': keep one of them.")
    return [{"role": "system", "content": check_text(system, "system", place)}, *messages]


def only_last_trained(messages: list[Message]) -> list[Message]:
    """The messages with labels only on the last of the turns that have any."""
    turns = [i for i, message in enumerate(messages) if message["role"] == "assistant" and message.get("train", True)]
    return [message | {"train": False} if index in turns[:-1] else message for index, message in enumerate(messages)]


def all_text(message: Message) -> str:
    """All text of a message: the thought, the content and the calls."""
    calls = [json.dumps(call["function"], ensure_ascii=False) for call in message.get("tool_calls", ())]
    return "\n".join(filter(None, [message.get("reasoning_content"), message["content"], *calls]))


def after_thought(text: str) -> str:
    """What follows the last thought that a text closes. The prompt may have opened it."""
    for close in THOUGHT_MARKS.values():
        text = text.rpartition(close)[2]
    return text


def parse_tools(value: Any, place: str) -> Tools | None:
    """The functions that the assistant may call, as a list of objects, from such a list or its JSON text.

    Raises:
        SRDEError: the value is something else, or a function has no name.
    """
    tools = _from_json(value) if isinstance(value, str) else value
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise SRDEError(f"{place}: field 'tools' must be a list of objects that describe functions.")
    # The older form lists the functions directly.
    tools = [tool if "function" in tool else {"type": "function", "function": tool} for tool in tools]
    for index, tool in enumerate(tools):
        function = tool["function"]
        if not isinstance(function, dict) or not isinstance(function.get("name"), str) or not function["name"]:
            raise SRDEError(f"{place}: tools[{index}] has no function with a 'name'.")
        _check_texts(tool, f"tools[{index}]", place)
    return tools or None


def _message(message: Mapping[str, Any], place: str) -> Message:
    given = {key: value for key, value in message.items() if value is not None and value != []}
    unknown = next((key for key in given if key not in KEYS), None)
    if unknown is not None:
        raise SRDEError(
            f"{place}: unknown key '{unknown}', known are {', '.join(KEYS)}.{nearest(str(unknown), KEYS)} "
            "Remove it, or move it out of the message."
        )
    name = check_text(given.get("role"), "role", place)
    role = ROLES.get(name)
    if role is None:
        raise SRDEError(f"{place}: unknown role '{name}', must be one of {', '.join(ROLES)}.{nearest(name, ROLES)}")
    content, thought = _content(given.get("content", ""), place)
    calls = _calls(given, content, place) if role == "assistant" else None
    parsed: Message = {"role": role, "content": "" if name == "function_call" else content}
    thought = _reasoning(given, thought, place)
    if role != "assistant":
        _refuse_for_others(given, thought, role, place)
    if thought:
        parsed["reasoning_content"] = thought
    if calls:
        parsed["tool_calls"] = calls
    for key in ("tool_call_id", "name"):
        if key in given:
            parsed[key] = check_text(given[key], key, place)
    if not _counts(given, place) and role == "assistant":
        parsed["train"] = False
    empty_is_fine = role in ("system", "tool") or calls or thought
    if not parsed["content"].strip() and not empty_is_fine:
        raise SRDEError(f"{place}: field 'content' is {'empty' if 'content' in given else 'missing'}.")
    return parsed


def _content(value: Any, place: str) -> tuple[str, str]:
    """The text and the thought in a message's content, each empty if there is none."""
    if isinstance(value, str):
        return check_text(value, "content", place, may_be_empty=True), ""
    if not isinstance(value, list):
        raise SRDEError(f"{place}: field 'content' must be text or a list of parts, not {kind(value)}.")
    texts, thoughts = [], []
    for index, part in enumerate(value):
        where = f"{place}: content[{index}]"
        if isinstance(part, str):
            texts.append(check_text(part, "content", where, may_be_empty=True))
            continue
        type_ = part.get("type") if isinstance(part, dict) else None
        if type_ in TEXT_PARTS:
            texts.append(check_text(part.get("text"), "text", where, may_be_empty=True))
        elif type_ in REASONING_PARTS and not texts:
            text = part.get(type_, part.get("text"))
            thoughts.append(_content(text, where)[0] if isinstance(text, list) else check_text(text, type_, where))
        elif type_ in REASONING_PARTS:
            raise SRDEError(f"{where}: a thought ('{type_}') must come before the text of the answer.")
        else:
            what = f"a part of type '{type_}'" if isinstance(type_, str) else kind(part)
            raise SRDEError(
                f"{where}: {what} is not supported, only text (type 'text'): remove the part, or the record."
            )
    return "".join(texts), "".join(thoughts)


def _reasoning(given: Mapping[str, Any], thought: str, place: str) -> str:
    keys = [key for key in REASONING if given.get(key, "") != ""]
    texts = [check_text(given[key], key, place) for key in keys] + ([thought] if thought else [])
    if len(set(texts)) > 1:
        raise SRDEError(f"{place}: there are several thoughts ({', '.join(keys)} or in 'content'): keep one of them.")
    return texts[0] if texts else ""


def _counts(given: Mapping[str, Any], place: str) -> bool:
    """Whether a turn is trained on."""
    said = set()
    for key in COUNTS:
        if key in given:
            if given[key] not in (0, 1):  # True and False are 1 and 0
                raise SRDEError(
                    f"{place}: {key}={json.dumps(given[key], default=str)}: must be 0 or false (no labels on this "
                    "turn), or 1 or true."
                )
            said.add(bool(given[key]))
    if len(said) > 1:
        raise SRDEError(f"{place}: {', '.join(key for key in COUNTS if key in given)} contradict each other.")
    return said != {False}


def _refuse_for_others(given: Mapping[str, Any], thought: str, role: str, place: str) -> None:
    wrong = [key for key in ("tool_calls", "function_call") if key in given] + (["reasoning"] if thought else [])
    if wrong:
        raise SRDEError(f"{place}: '{wrong[0]}' in a message of role {role}: only the assistant's may have it.")
    if any(given.get(key) for key in COUNTS):
        raise SRDEError(f"{place}: a message of role {role} is not trained on: only the assistant's turns are.")


def _calls(given: Mapping[str, Any], content: str, place: str) -> list[dict[str, Any]]:
    if "tool_calls" in given and "function_call" in given:
        raise SRDEError(f"{place}: has both 'tool_calls' and 'function_call': keep one of them.")
    if given["role"] == "function_call":
        calls: Any = _from_json(content)
        calls = calls if isinstance(calls, list) else [calls]
    elif "function_call" in given:
        calls = [given["function_call"]]
    else:
        calls = given.get("tool_calls", [])
    if not isinstance(calls, list):
        raise SRDEError(f"{place}: field 'tool_calls' must be a list, not {kind(calls)}.")
    return [_call(call, f"{place}: tool_calls[{index}]") for index, call in enumerate(calls)]


def _call(call: Any, place: str) -> dict[str, Any]:
    function = call.get("function", call) if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str) or not function["name"]:
        raise SRDEError(f"{place}: must be an object with a function's 'name' and 'arguments'.")
    for part, known in ((call, ("id", "type", "index", "function")), (function, ("name", "arguments"))):
        unknown = next(
            (key for key in part if key not in (*known, "name", "arguments") and part[key] is not None), None
        )
        if unknown is not None:
            raise SRDEError(f"{place}: unknown key '{unknown}', known are id, type, function, name and arguments.")
    given = function.get("arguments")
    arguments = {} if given is None or given == "" else _from_json(given) if isinstance(given, str) else given
    if not isinstance(arguments, dict):
        raise SRDEError(f"{place}: 'arguments' must be a JSON object, or one written as text.")
    _check_texts({function["name"]: arguments}, "arguments", place)
    parsed: dict[str, Any] = {"type": "function", "function": {"name": function["name"], "arguments": arguments}}
    if call.get("id") is not None:
        parsed["id"] = check_text(call["id"], "id", place)
    return parsed


def _from_json(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def _check_texts(value: Any, field: str, place: str) -> None:
    """Refuse half a surrogate pair anywhere in a value."""
    check_text(json.dumps(value, ensure_ascii=False, default=str), field, place)


def check_text(value: Any, field: str, place: str, *, may_be_empty: bool = False) -> str:
    """Return `value` if it is a usable text.

    Raises:
        SRDEError: it is missing, not text, empty, or contains half a surrogate pair.
    """
    if fault := text_fault(value, may_be_empty=may_be_empty):
        raise SRDEError(f"{place}: field '{field}' {fault}.")
    return str(value)


def text_fault(value: Any, *, may_be_empty: bool = False) -> str | None:
    """What makes a value unusable as a text, such as `is empty`; None: nothing."""
    if value is None:
        return "is missing"
    if not isinstance(value, str):
        return f"must be text, not {kind(value)}"
    if not may_be_empty and not value.strip():
        return "is empty"
    return "holds half a surrogate pair: write the whole character" if has_surrogates(value) else None


def has_surrogates(text: str) -> bool:
    """Whether a text contains half a surrogate pair, the remainder of a lost character."""
    return not text.isascii() and any("\ud800" <= character <= "\udfff" for character in text)


def kind(value: Any) -> str:
    """The type of a JSON value, in words."""
    names = {dict: "an object", list: "a list", str: "text", bool: "a truth value", bytes: "bytes", type(None): "null"}
    return names.get(type(value), "a number")
