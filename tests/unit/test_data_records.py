"""Records: both forms are read, and every fault is one line with file and line number."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from srde_ds.data.records import read_jsonl
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
        GOOD | {"answer": "2", "source": "hand", "difficulty": 3, "messages": None},
        "",
        {"messages": [system, *TURNS, *TURNS], "domain": "logic"},
    )
    first, second = read_jsonl(path, DOMAINS)
    assert first.messages == [{"role": "user", "content": "1 + 1?"}, {"role": "assistant", "content": "2"}]
    assert (first.domain, first.answer, first.source, first.where) == ("math", "2", "hand", f"{path}:1")
    assert second.messages == [system, *TURNS, *TURNS] and second.prompt == [system, *TURNS, TURNS[0]]
    assert (second.domain, second.answer, second.source, second.where) == ("logic", None, "", f"{path}:3")


def test_a_byte_order_mark_is_no_fault(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + json.dumps(GOOD).encode() + b"\r\n")
    assert [record.domain for record in read_jsonl(path, DOMAINS)] == ["math"]


@pytest.mark.parametrize("answer", ["red", "B", " b", 1])
def test_choices_are_named_by_text_letter_or_number(tmp_path: Path, answer: object) -> None:
    path = write(tmp_path / "data.jsonl", GOOD | {"choices": ["a", "red"], "answer": answer})
    (record,) = read_jsonl(path, DOMAINS)
    assert (record.choices, record.answer, record.tests) == (["a", "red"], "red", None)


def test_a_choice_that_is_a_letter_is_itself(tmp_path: Path) -> None:
    path = write(tmp_path / "data.jsonl", GOOD | {"choices": ["B", "A"], "answer": "A"}, GOOD | {"tests": "assert 1"})
    chosen, program = read_jsonl(path, DOMAINS)
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
        (GOOD | {"choices": ["a", "b"], "answer": "C"}, "field 'answer' is \"C\": with 'choices' it must be"),
        (GOOD | {"choices": ["a", "b"], "answer": 2}, "its number (0 to 1)"),
        (GOOD | {"choices": ["a", "b"]}, "field 'answer' is null"),
        (GOOD | {"choices": ["a", "b"], "answer": "a", "tests": "x"}, "has both 'choices' and 'tests'"),
        (GOOD | {"tests": 1}, "field 'tests' must be text"),
        (GOOD | {"source": {}}, "field 'source' must be text, not an object"),
        (GOOD | {"domain": "maths"}, "unknown domain 'maths', must be one of math, logic. Did you mean 'math'?"),
        (GOOD | {"messages": TURNS}, "has both 'messages' and 'prompt'"),
        (GOOD | {"prompt": "\ud800"}, "half a surrogate pair"),
        ({"messages": "a", "domain": "math"}, "must be a list of objects"),
        ({"messages": [], "domain": "math"}, "must be from the assistant"),
        ({"messages": TURNS[:1], "domain": "math"}, "must be from the assistant"),
        ({"messages": TURNS[1:], "domain": "math"}, "must hold a user message before"),
        ({"messages": [{"role": "system", "content": "a"}, TURNS[1]], "domain": "math"}, "a user message before"),
        ({"messages": [*TURNS, {"role": "system", "content": "a"}, TURNS[1]], "domain": "math"}, "must be the first"),
        ({"messages": [{"role": "users", "content": "a"}, TURNS[1]], "domain": "math"}, "Did you mean 'user'?"),
        ({"messages": [{"role": "user", "content": ""}, TURNS[1]], "domain": "math"}, "messages[0]: field 'content'"),
    ],
)
def test_faults_name_file_and_line(tmp_path: Path, line: object, message: str) -> None:
    path = write(tmp_path / "data.jsonl", GOOD, line)
    with pytest.raises(SRDEError) as caught:
        list(read_jsonl(path, DOMAINS))
    text = str(caught.value)
    assert text.startswith(f"{path}:2: ") and message in text and "\n" not in text


def test_bytes_that_are_not_utf8(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    path.write_bytes(json.dumps(GOOD).encode() + b"\n\xff\xfe\n")
    with pytest.raises(SRDEError, match=r"data.jsonl:2: not valid JSON in UTF-8"):
        list(read_jsonl(path, DOMAINS))


def test_missing_empty_and_unreadable_files(tmp_path: Path) -> None:
    with pytest.raises(SRDEError, match="no such file"):
        list(read_jsonl(tmp_path / "none.jsonl", DOMAINS))
    with pytest.raises(SRDEError, match="is empty"):
        list(read_jsonl(write(tmp_path / "empty.jsonl", "", "  "), DOMAINS))
    with pytest.raises(SRDEError, match="cannot be read: Is a directory"):
        list(read_jsonl(tmp_path, DOMAINS))
