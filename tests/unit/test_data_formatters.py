"""Each source's rows, in its own schema, through the code that loads the real ones."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset, DatasetDict

from srde_ds.data.sources.formatters import FORMATTERS, BrokenRow, Example
from srde_ds.data.sources.reading import open_source
from srde_ds.data.sources.registry import Source, load_sources
from srde_ds.inference.answers import exact_match
from srde_ds.utils.retry import SourceError
from tests.source_rows import FIXTURES, features

HUB = [source for source in load_sources() if source.kind == "hub"]


def local(source: Source, **place: Any) -> Source:
    """The source with its rows on this machine instead of on the Hub."""
    return dataclasses.replace(source, hub=None, config=None, data_files=None, **place)


def read(source: Source) -> list[Example | None | BrokenRow]:
    opened = open_source(source, revision=None, seed=0, rows=0)
    return list(opened.reader.examples(0, opened.reader.count))


def test_every_source_of_the_registry_has_rows_to_try() -> None:
    assert {source.name for source in HUB} == set(FIXTURES)


@pytest.mark.parametrize("source", HUB, ids=lambda source: source.name)
@pytest.mark.parametrize("kind", ["folder", "folder of splits", "parquet"])
def test_a_row_keeps_question_context_options_rationale_and_answer(source: Source, kind: str, tmp_path: Path) -> None:
    fixture = FIXTURES[source.name]
    data = Dataset.from_list(fixture.rows, features=features(source.name))
    place = tmp_path / "data"
    if kind == "parquet":
        data.to_parquet(f"{place}.parquet")
        examples = read(local(source, parquet=f"{place}.parquet"))
    else:
        (data if kind == "folder" else DatasetDict({"test": data.select([0]), "train": data})).save_to_disk(str(place))
        examples = read(local(source, folder=str(place)))
    first = examples[0]
    assert isinstance(first, Example)
    assert [message["role"] for message in first.messages] == ["user", "assistant"]
    assert first.messages[0]["content"] == fixture.prompt
    assert first.messages[1]["content"] == fixture.response
    assert (first.answer, first.group) == (fixture.answer, fixture.group)
    if first.answer is not None:
        assert exact_match(first.messages[1]["content"], first.answer)
    assert [e is None for e in examples].count(True) == fixture.none
    assert [isinstance(e, BrokenRow) for e in examples].count(True) == fixture.broken


@pytest.mark.parametrize("source", HUB, ids=lambda source: source.name)
def test_a_source_without_one_of_its_columns_is_refused(source: Source, tmp_path: Path) -> None:
    column = FORMATTERS[str(source.formatter)].columns[0]
    data = Dataset.from_list(FIXTURES[source.name].rows, features=features(source.name)).rename_column(column, "new")
    data.save_to_disk(str(tmp_path / "data"))
    with pytest.raises(SourceError, match=f"its columns do not fit: no '{column}', it has .*new"):
        read(local(source, folder=str(tmp_path / "data")))


@pytest.mark.parametrize(
    ("formatter", "columns", "row", "prompt", "response", "answer"),
    [
        ("prompt_response", {"prompt": "q", "response": "a"}, {"q": "Hi?", "a": "Ho"}, "Hi?", "Ho", None),
        ("messages", {"messages": "turns"},
         {"turns": [{"from": "human", "value": "Hi?"}, {"from": "gpt", "value": "Ho"}]}, "Hi?", "Ho", None),
        ("multiple_choice", {"label": "gold", "context": "text"},
         {"question": "Which?", "options": ["a", "b"], "gold": 1, "text": "T."}, "T.\n\nWhich?\nA. a\nB. b",
         "B. b\nAnswer: B", "B"),
        ("multiple_choice", {}, {"question": "Which?", "options": ["a", "b"], "label": "b", "rationale": "So."},
         "Which?\nA. a\nB. b", "So.\nAnswer: B", "B"),
    ],
)  # fmt: skip
def test_general_formatters_take_other_columns(
    formatter: str, columns: dict[str, str], row: dict, prompt: str, response: str, answer: str | None, tmp_path: Path
) -> None:
    Dataset.from_list([row]).save_to_disk(str(tmp_path / "data"))
    source = Source("own", "math", folder=str(tmp_path / "data"), formatter=formatter, columns=columns)
    (example,) = read(source)
    assert isinstance(example, Example)
    assert [message["content"] for message in example.messages] == [prompt, response]
    assert example.answer == answer


def test_conversations_of_another_shape_are_broken(tmp_path: Path) -> None:
    turns = [
        [{"role": "assistant", "content": "a"}],
        [{"role": "user", "content": "a"}, {"role": "user", "content": "b"}],
        [{"role": "user", "content": "a"}, {"role": "tool", "content": "b"}, {"role": "assistant", "content": "c"}],
        [{"role": "user", "content": " "}, {"role": "assistant", "content": "c"}],
    ]
    Dataset.from_list([{"messages": each} for each in turns]).save_to_disk(str(tmp_path / "data"))
    examples = read(Source("own", "math", folder=str(tmp_path / "data"), formatter="messages"))
    assert all(isinstance(example, BrokenRow) for example in examples) and len(examples) == 4
