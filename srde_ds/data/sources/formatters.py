"""One function for each source, which turns a row into a conversation and an answer that can be checked.

Responses with a checkable answer end with the line `Answer: ...`, which evaluation looks for. Of a row without an
answer (test rows whose labels are hidden) a formatter makes the question alone. It raises `BrokenRow` if the row does
not have the form that its source promises.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from srde_ds.data.choices import right_option
from srde_ds.data.conversation import REASONING, has_surrogates
from srde_ds.data.files import names_held_out_split
from srde_ds.data.forms import convert, with_roles
from srde_ds.data.records import parse_record
from srde_ds.data.sources.examples import (
    BrokenRow,
    Example,
    HeldOutRow,
    ask,
    lettered_choice,
    of_a_source,
    solved,
    trimmed,
)
from srde_ds.errors import SRDEError

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Formatter:
    """A function and the columns that it reads."""

    format: Callable[[Row], Example]
    columns: tuple[str, ...]
    optional: tuple[str, ...] = ()


FORMATTERS: dict[str, Formatter] = {}


def formatter(*columns: str, optional: tuple[str, ...] = ()) -> Callable[[Callable[[Row], Example]], Formatter]:
    """Register a function under its name. `optional` columns may be missing."""

    def register(function: Callable[[Row], Example]) -> Formatter:
        FORMATTERS[function.__name__] = Formatter(function, columns, optional)
        return FORMATTERS[function.__name__]

    return register


def text(row: Row, column: str) -> str:
    """The text in a column that must hold text."""
    value = row.get(column)
    if not isinstance(value, str) or not value.strip():
        raise BrokenRow(f"no text in '{column}'")
    return value.strip()


def _passage(row: Row, column: str) -> str:
    """As `text`, with the first line's indentation."""
    text(row, column)
    return trimmed(str(row[column]))


def _maybe(row: Row, column: str) -> str:
    value = row.get(column)
    return str(value).strip() if value is not None else ""


def _right(row: Row, column: str, options: Sequence[Any], labels: Sequence[str] | None = None) -> int:
    """The number of the right option, see `right_option`."""
    try:
        return right_option(row.get(column), [str(option) for option in options], labels)
    except ValueError as error:
        raise BrokenRow(f"'{column}' is {error}") from None


# -- math ------------------------------------------------------------------------------------------------------------


@formatter("question", "answer")
def gsm8k(row: Row) -> Example:
    """Steps with calculator notes such as <<48/2=24>>, then #### and the number."""
    steps, mark, number = text(row, "answer").rpartition("####")
    if not mark or not number.strip():
        raise BrokenRow("no final number")
    question = text(row, "question")
    steps = re.sub(r"<<[^<>]*>>", "", steps).strip()
    return solved(question, steps, number.strip().replace(",", ""), group=question)


@formatter("query", "response", "original_question", optional=("type",))
def metamath(row: Row) -> Example:
    """Variants of questions of GSM8K and MATH. All variants of a question stay in one split."""
    reasoning, mark, answer = text(row, "response").rpartition("The answer is:")
    if not mark or not answer.strip():
        raise BrokenRow("no final answer")
    reasoning = re.sub(r"\n?####[^\n]*\s*$", "", reasoning.rstrip()).strip()
    return solved(text(row, "query"), reasoning, answer.strip(), group=text(row, "original_question"))


# -- logic -----------------------------------------------------------------------------------------------------------


@formatter("context", "query", "options", "correct_option")
def logiqa(row: Row) -> Example:
    """LogiQA: a context, a question and its options."""
    return lettered_choice(text(row, "query"), row["options"], int(row["correct_option"]), context=text(row, "context"))


@formatter("context", "question", "answers", "label")
def reclor(row: Row) -> Example:
    """ReClor: a context, a question and its answers."""
    return lettered_choice(text(row, "question"), row["answers"], int(row["label"]), context=text(row, "context"))


@formatter("ctx", "endings", "label", optional=("activity_label", "source_id"))
def hellaswag(row: Row) -> Example:
    """How an activity continues; test rows have no label."""

    def plain(passage: str) -> str:
        # Remove the headings of how-to articles.
        return " ".join(re.sub(r"\[(?:header|title|step|substeps)\]", " ", passage).split())

    activity, label = _maybe(row, "activity_label"), _maybe(row, "label")
    context = plain(text(row, "ctx"))
    return lettered_choice(
        "Which continuation makes the most sense?",
        [ending and plain(ending) for ending in row["endings"]],
        int(label) if label else None,
        context=f"{activity}: {context}" if activity else context,
        group=_maybe(row, "source_id") or context,
    )


# -- code ------------------------------------------------------------------------------------------------------------


@formatter("instruction", "output", optional=("input",))
def code_alpaca(row: Row) -> Example:
    """CodeAlpaca: an instruction, with or without an input."""
    prompt, given = _passage(row, "instruction"), trimmed(str(row.get("input") or ""))
    return Example(ask(f"{prompt}\n\n{given}" if given else prompt, _passage(row, "output")))


# -- science ---------------------------------------------------------------------------------------------------------


@formatter("question", "distractor1", "distractor2", "distractor3", "correct_answer", optional=("support",))
def sciq(row: Row) -> Example:
    """The source keeps the right option in its own column, so the order of options is drawn from the question."""
    question, right = text(row, "question"), text(row, "correct_answer")
    options = [right, *(text(row, f"distractor{number}") for number in (1, 2, 3))]
    if len(set(options)) < len(options):
        raise BrokenRow("two options are the same")
    random.Random(question).shuffle(options)
    return lettered_choice(question, options, options.index(right), reasoning=_maybe(row, "support"))


@formatter("question", "choices", "answerKey")
def arc(row: Row) -> Example:
    """Options are lettered A to E or numbered 1 to 4; test rows may have an empty answer."""
    options, labels = row["choices"]["text"], [str(label) for label in row["choices"]["label"]]
    right = _right(row, "answerKey", options, labels) if _maybe(row, "answerKey") else None
    return lettered_choice(text(row, "question"), options, right)


@formatter("problem_text", "answer_number", optional=("unit", "solution"))
def scibench(row: Row) -> Example:
    """A textbook problem; few rows have a solution."""
    unit = _maybe(row, "unit")
    question = text(row, "problem_text") + (f"\nGive the answer in {unit}." if unit else "")
    return solved(question, _maybe(row, "solution"), text(row, "answer_number"))


# -- planning --------------------------------------------------------------------------------------------------------


@formatter("question", "options", "rationale", "correct")
def aqua_rat(row: Row) -> Example:
    """Options come as `A)21`."""
    options = [option and re.sub(r"^\s*[A-E]\s*\)\s*", "", str(option)) for option in row["options"]]
    return lettered_choice(
        text(row, "question"), options, _right(row, "correct", options, "ABCDE"), reasoning=text(row, "rationale")
    )


@formatter("example", "proof", "label")
def boardgame_qa(row: Row) -> Example:
    """Facts, rules and preferences; a statement is proved, disproved or neither."""
    label = text(row, "label")
    if label not in ("proved", "disproved", "unknown"):
        raise BrokenRow(f"unknown label '{label}'")
    question = f"{text(row, 'example')}\nAnswer with proved, disproved or unknown."
    return solved(question, text(row, "proof"), label)


# -- abstract --------------------------------------------------------------------------------------------------------


@formatter("goal", "sol1", "sol2", "label")
def piqa(row: Row) -> Example:
    """Test rows are labelled -1."""
    question, label = f"Which way is better to reach this goal?\n{text(row, 'goal')}", int(row["label"])
    right = None if label < 0 else label
    return lettered_choice(question, [row["sol1"], row["sol2"]], right, group=text(row, "goal"))


@formatter("sentence", "option1", "option2", "answer")
def winogrande(row: Row) -> Example:
    """A sentence with a blank; test rows have no answer."""
    sentence = text(row, "sentence")
    if "_" not in sentence:
        raise BrokenRow("no blank in the sentence")
    options = [row["option1"], row["option2"]]
    right = _right(row, "answer", options, ("1", "2")) if _maybe(row, "answer") else None
    return lettered_choice(f"Which option fits the blank?\n{sentence}", options, right)


# -- for your own sources: `columns` in the sources file maps their columns to these -----------------------------------


@formatter("prompt", "response", optional=("system", "answer", "group", "split", *REASONING))
def prompt_response(row: Row) -> Example:
    """A question and its answer, with the thought before it if there is one."""
    turns = ask(_passage(row, "prompt"), _passage(row, "response"))
    turns[1] |= {key: row[key] for key in REASONING if row.get(key)}
    return _conversation({"messages": turns, "system": row.get("system")}, row)


@formatter("messages", optional=("system", "tools", "functions", "answer", "group", "split"))
def messages(row: Row) -> Example:
    """A conversation of {role, content} or {from, value}, with all that `data.conversation` knows."""
    turns = [with_roles({key: value for key, value in turn.items() if value is not None}) for turn in row["messages"]]
    return _conversation({"messages": turns} | {key: row.get(key) for key in ("system", "tools", "functions")}, row)


@formatter(optional=("group", "split"))
def by_keys(row: Row) -> Example:
    """A record of any form that files may have, identified by its keys."""
    return _conversation(_converted({key: value for key, value in row.items() if key not in ("group", "split")}), row)


@formatter("question", "options", "label", optional=("context", "rationale", "group", "split"))
def multiple_choice(row: Row) -> Example:
    """The form of that name. `label`: the right option's text, letter, or index from 0."""
    fields = {key: row.get(key) for key in ("question", "options", "label")}
    given = {key: row.get(key) for key in ("context", "rationale")}
    fields |= {
        key: str(value).strip() if isinstance(value, str | int | float) else value for key, value in given.items()
    }
    if isinstance(options := fields["options"], list):
        fields["options"] = [str(option) if isinstance(option, int | float) else option for option in options]
    group = row.get("group") or fields["context"] or fields["question"]
    return _conversation(_converted(fields, "multiple_choice"), {**row, "group": group})


_ROW = "row"
_ANY = "any"


def _converted(fields: dict[str, Any], form: str | None = None) -> dict[str, Any]:
    try:
        return convert(fields, _ROW, form=form)[1]
    except SRDEError as error:
        raise BrokenRow(_without_place(error)) from None


def _without_place(error: SRDEError) -> str:
    return of_a_source(error).removeprefix(f"{_ROW}: ")


def _conversation(fields: dict[str, Any], row: Row) -> Example:
    fields = {"answer": _maybe(row, "answer") or None} | fields | {"domain": _ANY}
    try:
        record = parse_record(fields, _ROW, [_ANY])
    except SRDEError as error:
        if has_surrogates(json.dumps(fields, ensure_ascii=False, default=str)):
            raise BrokenRow("lost characters") from None
        raise BrokenRow(_without_place(error)) from None
    more = {key: value for key in ("tools", "choices", "tests") if (value := getattr(record, key)) is not None}
    example = Example(record.messages, record.answer, _maybe(row, "group") or None, more)
    if names_held_out_split(split := _maybe(row, "split")):
        raise HeldOutRow(split, example)
    return example
