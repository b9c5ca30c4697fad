"""A build from sources keeps its held-out questions out of training, and each split filled."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest

from srde_ds.data.build import source_records
from srde_ds.data.build.from_files import RowsOfFiles, build_dataset
from srde_ds.data.build.from_sources import build_from_sources
from srde_ds.data.build.options import BuildOptions
from srde_ds.data.sources.registry import Source
from srde_ds.errors import SRDEError
from tests.data_helpers import tiny_tokenizer, write_jsonl

COUNT = 150


def turns(*texts: str, system: str | None = None) -> list[dict[str, str]]:
    before = [] if system is None else [{"role": "system", "content": system}]
    return before + [{"role": ("user", "assistant")[n % 2], "content": text} for n, text in enumerate(texts)]


def question(number: int) -> str:
    return f"What is {number} plus {number * number}?"


def built(folder: Path, *sources: list[dict[str, Any]], wanted: int = 2 * COUNT, **values: Any) -> list[dict[str, Any]]:
    """The records of a dataset from these sources of conversations, with a tenth in each held-out split."""
    given = [
        Source(f"s{n}", "math", jsonl=str(write_jsonl(folder / f"s{n}.jsonl", rows)), formatter="messages",
               near_duplicates=False)
        for n, rows in enumerate(sources)
    ]  # fmt: skip
    options = BuildOptions(given, wanted, 256, "drop", 1, 0.1, 0.1, on_shortfall="keep", **values)
    build_from_sources(options, work_dir=folder / "data", tokenizer=None)
    return [json.loads(line) for line in (folder / "data" / "data.jsonl").read_text().splitlines()]


def prompts(lines: list[dict[str, Any]], *, held_out: bool) -> set[str]:
    """What is asked: at the last answer in a held-out record, at each one in a training record."""
    found: set[str] = set()
    for line in (line for line in lines if (line["split"] != "train") == held_out):
        said = [message["content"] for message in line["messages"] if message["role"] != "system"]
        found.update(" ".join(said[:end]) for end in ([len(said) - 1] if held_out else range(1, len(said), 2)))
    return found


@pytest.mark.parametrize("grouped", [False, True])
def test_no_turn_of_a_conversation_answers_a_held_out_question(grouped: bool, tmp_path: Path) -> None:
    single: list[dict[str, Any]] = [{"messages": turns(question(n), str(n))} for n in range(COUNT)]
    double: list[dict[str, Any]] = [
        {"messages": turns(question(n), str(n), f"And {n} more?", "Yes.")} for n in range(COUNT)
    ]
    for n, row in enumerate([*single, *double] if grouped else []):
        row |= {"group": f"g{n}"}
    lines = built(tmp_path, single, double)
    assert len(prompts(lines, held_out=True)) > 20
    assert not prompts(lines, held_out=True) & prompts(lines, held_out=False)
    if not grouped:  # the conversations about a question have its split, so that none is lost
        assert len(lines) == 2 * COUNT
    rows = RowsOfFiles(tmp_path / "data" / "data.jsonl", None, ["math"], max_length=256, too_long="drop", seed=1)
    assert build_dataset(rows, tmp_path / "again", tiny_tokenizer()).splits["train"].rows


def test_many_answers_do_not_hide_a_question_of_an_evaluation_set(tmp_path: Path) -> None:
    leaked = "How many apples does Ann have left if she gives three of her ten apples to Bob today?"
    solutions = [{"messages": turns(leaked, f"Way {n}: it is seven.")} for n in range(12)]
    others = [{"messages": turns(question(n), str(n))} for n in range(100)]
    evaluation = write_jsonl(tmp_path / "bench.jsonl", [{"prompt": leaked}])
    lines = built(tmp_path, solutions, others, wanted=112, decontaminate_against=(str(evaluation),))
    assert {line["source"] for line in lines} == {"s1"} and len(lines) == 100


def test_system_messages_that_hold_what_is_asked_about_tell_questions_apart(tmp_path: Path) -> None:
    rows = [{"messages": turns("Sum it up.", f"It is about {n}.", system=f"Text {n}.")} for n in range(COUNT)]
    lines = built(tmp_path, rows, wanted=COUNT)
    splits = [line["split"] for line in lines]
    assert len(lines) == COUNT and all(splits.count(split) > 5 for split in ("validation", "test"))
    assert splits.count("train") > 100


def test_a_question_under_a_few_system_messages_is_one_question(tmp_path: Path) -> None:
    plain = [{"messages": turns(question(n), str(n))} for n in range(COUNT)]
    polite = [{"messages": turns(question(n), f"It is {n}.", system="Be polite.")} for n in range(COUNT)]
    lines = built(tmp_path, plain, polite)
    assert len(prompts(lines, held_out=True)) > 20
    assert not prompts(lines, held_out=True) & prompts(lines, held_out=False)


def test_held_out_rows_of_an_evaluation_source_are_what_is_searched_for(tmp_path: Path) -> None:
    bench = write_jsonl(tmp_path / "bench.jsonl", [{"messages": turns(question(7), "56"), "split": "test"}])
    again = Source("bench", "math", jsonl=str(bench), formatter="messages")
    rows = write_jsonl(tmp_path / "rows.jsonl", [{"messages": turns(question(n), str(n))} for n in range(40)])
    own = Source("own", "math", jsonl=str(rows), formatter="messages", near_duplicates=False)
    with patch.object(source_records, "load_sources", lambda: [again]):
        options = BuildOptions(
            [own], 40, 256, "drop", 1, 0.0, 0.0, on_shortfall="keep", decontaminate_against=("bench",)
        )
        build_from_sources(options, work_dir=tmp_path / "data", tokenizer=None)
    lines = (tmp_path / "data" / "data.jsonl").read_text().splitlines()
    assert len(lines) == 39 and not any(question(7) in line for line in lines)


def test_texts_in_system_messages_are_no_duplicates(tmp_path: Path) -> None:
    rows = [{"messages": turns("Is it positive?", "Yes.", system=f"Text {n}.")} for n in range(COUNT)]
    assert len(built(tmp_path, rows, wanted=COUNT)) == COUNT


@pytest.mark.parametrize("characters", [5, 12])
def test_characters_of_the_assistant_do_not_tell_questions_apart(characters: int, tmp_path: Path) -> None:
    rows = [
        {"messages": turns(question(n), f"{n}, says {who}.", system=f"You are number {who}.")}
        for n in range(60)
        for who in range(characters)
    ]
    lines = built(tmp_path, rows, wanted=len(rows))
    assert len(prompts(lines, held_out=True)) > 5 and len(lines) == len(rows)
    assert not prompts(lines, held_out=True) & prompts(lines, held_out=False)


def test_conversations_that_begin_alike_are_told_apart_by_the_rest(tmp_path: Path) -> None:
    task = "Use the tools that you are given, think first, and say in the end what you have found out about it."
    rows = [{"messages": turns(task, "OK.", question(n), str(n))} for n in range(COUNT)]
    evaluation = write_jsonl(tmp_path / "bench.jsonl", [{"prompt": f"{task} What is the capital of France, please?"}])
    lines = built(tmp_path, rows, wanted=COUNT)
    assert len(lines) == COUNT and len({line["split"] for line in lines}) == 3
    (tmp_path / "other").mkdir()
    boilerplate = [{"messages": turns("Hello.", "Hi.", f"{task} {question(n)}", str(n))} for n in range(COUNT)]
    assert len(built(tmp_path / "other", boilerplate, wanted=COUNT, decontaminate_against=(str(evaluation),))) == COUNT


def test_a_domain_of_which_all_is_held_out_is_refused(tmp_path: Path) -> None:
    for name in ("What?", "Why?", "Who?", "How?", "Where?", "When?", "Which?", "Whose?", "Whom?", "Whence?"):
        folder = tmp_path / name
        folder.mkdir()
        try:
            lines = built(folder, [{"messages": turns(name, f"{n}")} for n in range(30)], wanted=30)
        except SRDEError as error:
            assert str(error).startswith(
                "validation_fraction=0.1, test_fraction=0.1: all 30 documents of domain 'math'"
            )
            assert not (folder / "data" / "data.jsonl").exists()
            break
        assert {line["split"] for line in lines} == {"train"}
    else:
        pytest.fail("no question is held out")


def test_an_empty_split_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    built(tmp_path, [{"messages": turns(question(1), f"{n}")} for n in range(30)], wanted=30)
    assert [message.partition(", because")[0] for message in caplog.messages] == [
        f"domain math: none of its 30 documents is in the split {split} ({split}_fraction=0.1)"
        for split in ("validation", "test")
    ]
