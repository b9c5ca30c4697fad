"""Records: both forms are read, and every fault is one line with file and line number."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from srde_ds.data.inputs import read_records
from srde_ds.data.records import Record, parse_prompt, parse_record
from srde_ds.errors import SRDEError

DOMAINS = ("math", "logic")
GOOD = {"prompt": "1 + 1?", "response": "2", "domain": "math"}
TURNS = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]


def write(path: Path, *lines: object) -> Path:
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    return path


def test_both_forms_are_read(tmp_path: Path) -> None:
    system = {"role": "system", "content": "Be brief."}
    path = write(
        tmp_path / "data.jsonl",
        GOOD | {"answer": "2", "source": "hand", "id": 3, "messages": None},
        "",
        {"messages": [system, *TURNS, *TURNS], "domain": "logic"},
    )
    first, second = read_records(path, DOMAINS)
    assert first.messages == [{"role": "user", "content": "1 + 1?"}, {"role": "assistant", "content": "2"}]
    assert (first.domain, first.answer, first.source, first.where) == ("math", "2", "hand", f"{path}:1")
    assert second.messages == [system, *TURNS, *TURNS] and second.prompt == [system, *TURNS, TURNS[0]]
    assert (second.domain, second.answer, second.source, second.where) == ("logic", None, "", f"{path}:3")


@pytest.mark.parametrize("answer", ["red", "B", " b", 1])
def test_choices_are_named_by_text_letter_or_number(tmp_path: Path, answer: object) -> None:
    path = write(tmp_path / "data.jsonl", GOOD | {"choices": ["a", "red"], "answer": answer})
    (record,) = read_records(path, DOMAINS)
    assert (record.choices, record.answer, record.tests) == (["a", "red"], "red", None)


def test_a_choice_that_is_a_letter_is_itself(tmp_path: Path) -> None:
    path = write(tmp_path / "data.jsonl", GOOD | {"choices": ["B", "A"], "answer": "A"}, GOOD | {"tests": "assert 1"})
    chosen, program = read_records(path, DOMAINS)
    assert chosen.answer == "A" and (program.choices, program.tests) == (None, "assert 1")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"prompt": ', "not valid JSON"),
        ("[" * 100_000, "not valid JSON"),
        ("[1]", "must be a JSON object, not a list"),
        ({"prompt": "a", "domain": "math"}, "field 'response' is missing"),
        ({"response": "a", "domain": "math"}, "field 'prompt' is missing"),
        ({"domain": "math"}, "needs 'prompt' and 'response', or 'messages'"),
        ({"prompt": "a", "response": "b"}, "field 'domain' is missing"),
        (GOOD | {"response": " \n"}, "field 'response' is empty"),
        (GOOD | {"prompt": 3}, "field 'prompt' must be text, not a number"),
        (GOOD | {"answer": ["2"]}, "field 'answer' must be text, not a list"),
        (GOOD | {"choices": "a", "answer": "a"}, "field 'choices' must be a list of at least two texts"),
        (GOOD | {"choices": ["a"], "answer": "a"}, "field 'choices' must be a list of at least two texts"),
        (GOOD | {"choices": ["a", 1], "answer": "a"}, "field 'choices' must be text, not a number"),
        (GOOD | {"choices": ["a", "a"], "answer": "a"}, "field 'choices' holds the same text twice"),
        (GOOD | {"choices": ["a", "b"], "answer": "C"}, "field 'answer' is \"C\": it must be one of the choices"),
        (GOOD | {"choices": ["a", "b"], "answer": 2}, "its number (0 to 1)"),
        (GOOD | {"choices": ["a", "b"]}, "field 'answer' is null"),
        (GOOD | {"choices": ["a", "b"], "answer": "a", "tests": "x"}, "has both 'choices' and 'tests'"),
        (GOOD | {"tests": 1}, "field 'tests' must be text"),
        (GOOD | {"source": {}}, "field 'source' must be text, not an object"),
        (GOOD | {"domain": "maths"}, "unknown domain 'maths', must be one of math, logic. Did you mean 'math'?"),
        (GOOD | {"messages": TURNS}, "unknown key 'prompt' in a record of the form messages"),
        (GOOD | {"prompt": "\ud800"}, "half a surrogate pair"),
        ({"messages": "a", "domain": "math"}, "must be a list, not text"),
        ({"messages": [], "domain": "math"}, "must be from the assistant"),
        ({"messages": TURNS[:1], "domain": "math"}, "must be from the assistant"),
        ({"messages": TURNS[1:], "domain": "math"}, "must hold a user message before"),
        ({"messages": [{"role": "system", "content": "a"}, TURNS[1]], "domain": "math"}, "a user message before"),
        ({"messages": [*TURNS, {"role": "system", "content": "a"}, TURNS[1]], "domain": "math"}, "must come first"),
        ({"messages": [{"role": "users", "content": "a"}, TURNS[1]], "domain": "math"}, "Did you mean 'user'?"),
        ({"messages": [{"role": "user", "content": ""}, TURNS[1]], "domain": "math"}, "messages[0]: field 'content'"),
    ],
)
def test_faults_name_file_and_line(tmp_path: Path, line: object, message: str) -> None:
    path = write(tmp_path / "data.jsonl", GOOD, line)
    with pytest.raises(SRDEError) as caught:
        list(read_records(path, DOMAINS))
    text = str(caught.value)
    assert text.startswith(f"{path}:2: ") and message in text and "\n" not in text


# -- messages in every common spelling --------------------------------------------------------------------------------

CALL = {"type": "function", "function": {"name": "w", "arguments": {"city": "Rome"}}}
ASKED = {"role": "user", "content": "a"}


def parsed(*messages: object, **more: object) -> Record:
    return parse_record({"messages": list(messages), **more}, "x.jsonl:3", ["math"])


def test_the_only_domain_need_not_be_named() -> None:
    assert parsed(*TURNS).domain == "math"
    with pytest.raises(SRDEError, match="x.jsonl:3: field 'domain' is missing"):
        parse_record({"messages": TURNS}, "x.jsonl:3", DOMAINS)


@pytest.mark.parametrize(
    ("role", "is_"),
    [("human", "user"), ("gpt", "assistant"), ("model", "assistant"), ("developer", "system"), ("observation", "tool")],
)
def test_roles_have_other_names(role: str, is_: str) -> None:
    messages = {
        "user": [{"role": role, "content": "a"}, TURNS[1]],
        "assistant": [ASKED, {"role": role, "content": "b"}],
        "system": [{"role": role, "content": "s"}, *TURNS],
        "tool": [ASKED, {"role": role, "content": "22"}, TURNS[1]],
    }[is_]
    assert [m["role"] for m in parsed(*messages).messages] == [
        m.get("role") if m["role"] != role else is_ for m in messages
    ]


@pytest.mark.parametrize("key", ["reasoning_content", "reasoning", "thinking"])
def test_a_thought_has_three_names(key: str) -> None:
    said = {"role": "assistant", "content": "b", "reasoning_content": "t"}
    assert parsed(ASKED, {"role": "assistant", "content": "b", key: "t"}).messages[1] == said
    part = {"type": "thinking", "thinking": "t"}
    assert parsed(ASKED, {"role": "assistant", "content": [part, {"type": "text", "text": "b"}]}).messages[1] == said
    assert parse_record({"prompt": "a", "response": "b", key: "t"}, "", ["math"]).messages[1] == said
    assert "reasoning_content" not in parsed(ASKED, {"role": "assistant", "content": "b", key: None}).messages[1]


@pytest.mark.parametrize(
    "message",
    [
        {"content": None, "tool_calls": [CALL]},
        {"content": "", "tool_calls": [{"function": {"name": "w", "arguments": '{"city": "Rome"}'}}]},
        {"tool_calls": [{"name": "w", "arguments": {"city": "Rome"}}]},
        {"function_call": {"name": "w", "arguments": '{"city": "Rome"}'}},
        {"role": "function_call", "content": '{"name": "w", "arguments": {"city": "Rome"}}'},
    ],
)
def test_tool_calls_in_every_spelling(message: dict[str, object]) -> None:
    record = parsed(ASKED, {"role": "assistant"} | message, tools=[{"name": "w"}])
    assert record.messages[1] == {"role": "assistant", "content": "", "tool_calls": [CALL]}
    assert record.tools == [{"type": "function", "function": {"name": "w"}}]
    as_text = parsed(*TURNS, functions='[{"name": "w"}]')
    assert as_text.tools == record.tools


def test_system_messages_beside_the_others_and_empty_ones() -> None:
    system = {"role": "system", "content": "s"}
    assert parsed(*TURNS, system="s").messages == [system, *TURNS]
    assert parsed({"role": "system", "content": ""}, *TURNS, system=" ").messages == TURNS
    assert parsed({"role": "system", "content": None}, *TURNS, system="s").messages == [system, *TURNS]
    assert parse_record({"prompt": "a", "response": "b", "system": "s"}, "", ["math"]).messages == [system, *TURNS]


def test_what_was_parsed_is_parsed_to_itself() -> None:
    result = {"role": "tool", "content": "22", "tool_call_id": "1", "name": "w"}
    said = {"role": "assistant", "content": "b", "reasoning": "t", "tool_calls": [CALL | {"id": "1"}], "weight": 0}
    record = parsed(ASKED, said, result, TURNS[1], tools=[{"name": "w"}])
    assert record.messages[1]["train"] is False
    assert parsed(*record.messages, tools=record.tools) == record


def test_content_parts_are_joined() -> None:
    parts = [{"type": "text", "text": "H"}, {"type": "input_text", "text": "i"}, "!"]
    assert parsed({"role": "user", "content": parts}, TURNS[1]).messages[0]["content"] == "Hi!"


@pytest.mark.parametrize(
    ("messages", "more", "message"),
    [
        ([ASKED | {"emotion": "joy"}, TURNS[1]], {}, "messages[0]: unknown key 'emotion', known are role, content,"),
        ([ASKED, TURNS[1] | {"wieght": 1}], {}, "Did you mean 'weight'?"),
        ([ASKED, TURNS[1] | {"weight": 0.5}], {}, "messages[1]: weight=0.5: must be 0 or false"),
        ([ASKED, TURNS[1] | {"weight": 1, "train": False}], {}, "weight, train contradict each other"),
        ([ASKED, TURNS[1] | {"train": False}], {}, "no turn is trained on"),
        ([ASKED | {"train": True}, TURNS[1]], {}, "a message of role user is not trained on"),
        ([ASKED | {"tool_calls": [CALL]}, TURNS[1]], {}, "'tool_calls' in a message of role user"),
        ([ASKED | {"reasoning": "t"}, TURNS[1]], {}, "'reasoning' in a message of role user"),
        ([ASKED, TURNS[1] | {"reasoning": "t", "thinking": "u"}], {}, "several thoughts (reasoning, thinking"),
        ([ASKED, TURNS[1] | {"reasoning": {}}], {}, "field 'reasoning' must be text, not an object"),
        ([ASKED, {"role": "assistant", "content": {"a": 1}}], {}, "must be text or a list of parts, not an object"),
        (
            [{"role": "user", "content": [{"type": "image_url"}]}, TURNS[1]],
            {},
            "content[0]: a part of type 'image_url'",
        ),
        ([{"role": "user", "content": [7]}, TURNS[1]], {}, "content[0]: a number is not supported, only text"),
        ([ASKED, {"role": "assistant", "tool_calls": [1]}], {}, "tool_calls[0]: must be an object"),
        (
            [ASKED, {"role": "assistant", "tool_calls": [{"function": {"name": "w", "arguments": "x"}}]}],
            {},
            "JSON object",
        ),
        (
            [ASKED, {"role": "assistant", "tool_calls": [{"name": "w", "parameters": {}}]}],
            {},
            "unknown key 'parameters'",
        ),
        (
            [ASKED, TURNS[1] | {"tool_calls": [CALL], "function_call": CALL}],
            {},
            "both 'tool_calls' and 'function_call'",
        ),
        ([ASKED, {"role": "function_call", "content": "w()"}], {}, "must be an object with a function's 'name'"),
        ([ASKED, {"role": "assistant", "content": None}], {}, "messages[1]: field 'content' is missing"),
        (TURNS, {"tools": [1]}, "field 'tools' must be a list of objects"),
        (TURNS, {"tools": [{"function": {}}]}, "tools[0] has no function with a 'name'"),
        (TURNS, {"tools": [{"name": "w"}], "functions": [{"name": "w"}]}, "has both 'tools' and 'functions'"),
        (TURNS, {"system": ["s"]}, "field 'system' must be text, not a list"),
        ([{"role": "system", "content": "s"}, *TURNS], {"system": "t"}, "both 'system' and a system message"),
        ([ASKED, {"role": "assistant", "tool_calls": [{"name": "w", "arguments": {"x": "\ud83d"}}]}], {}, "surrogate"),
        ([ASKED, TURNS[1] | {"thinking": "\ud83d"}], {}, "'thinking' holds half a surrogate pair"),
    ],
)
def test_what_is_not_understood_is_refused_by_name(
    messages: list[object], more: dict[str, object], message: str
) -> None:
    with pytest.raises(SRDEError) as caught:
        parsed(*messages, **more)
    assert str(caught.value).startswith("x.jsonl:3: ") and message in str(caught.value)


def test_prompts_end_before_the_last_answer() -> None:
    assert parse_prompt({"prompt": "a", "domain": "x"}, "") == ([ASKED], None)
    assert parse_prompt({"messages": TURNS, "system": "s"}, "")[0] == [{"role": "system", "content": "s"}, ASKED]
    for values, message in (
        ({"messages": TURNS[1:]}, "ask nothing"),
        ({"prompt": "x \ud83d y"}, "half a surrogate pair"),
        ({"prompt": 1}, "must be text"),
        ({}, "needs 'prompt', or 'messages'"),
        ([], "must be a JSON object, not a list"),
        ({"prompt": "a", "messages": TURNS}, "has both"),
    ):
        with pytest.raises(SRDEError, match=f"^p.jsonl:1: .*{message}"):
            parse_prompt(values, "p.jsonl:1")
