"""Each source's rows, in its own schema, through the code that loads the real ones."""

from __future__ import annotations

import dataclasses
import gzip
import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import reasoning_gym
from datasets import Dataset, DatasetDict, Features, Image, Value

from srde_ds.data.build.row_rules import normalise
from srde_ds.data.sources.examples import BrokenRow, Example
from srde_ds.data.sources.formatters import FORMATTERS
from srde_ds.data.sources.reading import open_source
from srde_ds.data.sources.registry import Source, load_sources
from srde_ds.inference.answers import exact_match
from srde_ds.utils.retry import SourceError
from tests.data_helpers import write_jsonl
from tests.source_rows import FIXTURES, features

HUB = [source for source in load_sources() if source.kind == "hub"]


def local(source: Source, **place: Any) -> Source:
    """The source with its rows on this machine instead of on the Hub."""
    return dataclasses.replace(source, hub=None, config=None, data_files=None, **place)


def read(source: Source) -> list[Example | BrokenRow]:
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
    assert sum(isinstance(e, Example) and not e.answered for e in examples) == fixture.none
    assert [isinstance(e, BrokenRow) for e in examples].count(True) == fixture.broken


@pytest.mark.parametrize("source", HUB, ids=lambda source: source.name)
def test_a_source_without_one_of_its_columns_is_refused(source: Source, tmp_path: Path) -> None:
    column = source.real_columns()[0]
    data = Dataset.from_list(FIXTURES[source.name].rows, features=features(source.name)).rename_column(column, "new")
    data.save_to_disk(str(tmp_path / "data"))
    with pytest.raises(SourceError, match=f"its columns do not fit: there is no '{column}', only .*new"):
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
        ("multiple_choice", {}, {"question": "Which?", "options": ["a", "b"], "label": "1"},
         "Which?\nA. a\nB. b", "B. b\nAnswer: B", "B"),
        ("multiple_choice", {}, {"question": "Which?", "options": ["a", "b"], "label": "0"},
         "Which?\nA. a\nB. b", "A. a\nAnswer: A", "A"),
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


@pytest.mark.parametrize(
    ("formatter", "row"),
    [
        ("prompt_response", {"prompt": "Hi?", "response": "Ho"}),
        ("messages", {"messages": [{"role": "user", "content": "Hi?"}, {"role": "assistant", "content": "Ho"}]}),
        ("multiple_choice", {"question": "Which?", "options": ["a", "b"], "label": "a"}),
        ("by_keys", {"prompt": "Hi?", "response": "Ho"}),
    ],
)
def test_general_formatters_leave_held_out_rows_out(formatter: str, row: dict[str, Any], tmp_path: Path) -> None:
    trained = [None, "", " ", "train", "Train", "train_sft", "latest", "contested", 3]
    held_out = ["test", "Test", "test_sft", "sft-test", "test[:10%]", "validation", "VAL", "dev2", "eval/hard"]
    rows = [row, *(row | {"part": split} for split in (*trained, *held_out))]
    path = write_jsonl(tmp_path / "rows.jsonl", rows)
    source = Source("own", "math", jsonl=str(path), formatter=formatter, columns={"split": "part"})
    first, *others = read(source)
    assert isinstance(first, Example) and others[: len(trained)] == [first] * len(trained)
    assert list(map(str, others[len(trained) :])) == [f"held out: its split is '{split}'" for split in held_out]


def test_a_renamed_column_is_not_read_under_its_own_name_as_well(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "rows.jsonl", [{"question": "Hi?", "answer": "Ho, ho.", "group": "g"}])
    columns = {"prompt": "question", "response": "answer", "group": "group"}
    (example,) = read(Source("own", "math", jsonl=str(path), formatter="prompt_response", columns=columns))
    assert isinstance(example, Example) and (example.answer, example.group) == (None, "g")


@pytest.mark.parametrize(
    ("formatter", "row"),
    [
        ("multiple_choice", {"question": "Which?", "options": ["a", None, "b"], "label": "b"}),
        ("aqua_rat", {"question": "Which?", "options": ["A)a", None, "C)b"], "rationale": "So.", "correct": "A"}),
        ("hellaswag", {"ctx": "He", "endings": ["runs.", None], "label": "0"}),
        ("reclor", {"context": "It rained.", "question": "Why?", "answers": ["a", None], "label": 0}),
        ("arc", {"question": "Why?", "choices": {"text": ["a", None], "label": ["A", "B"]}, "answerKey": "A"}),
        ("piqa", {"goal": "Eat.", "sol1": "Bite.", "sol2": None, "label": 0}),
        ("winogrande", {"sentence": "The _ ran.", "option1": None, "option2": "man", "answer": "2"}),
    ],
)
def test_an_option_that_is_null_is_missing(formatter: str, row: dict[str, Any]) -> None:
    with pytest.raises(BrokenRow, match="an option is missing|field 'choices' must hold texts"):
        FORMATTERS[formatter].format(row)


def test_there_are_no_more_options_than_letters() -> None:
    options = [f"intent {n}" for n in range(26)]
    row = {"question": "Which?", "options": options, "label": 25}
    assert FORMATTERS["multiple_choice"].format(row).answer == "Z"
    with pytest.raises(BrokenRow, match="there are 27 options, and letters for 26: give a question and its answer as"):
        FORMATTERS["multiple_choice"].format(row | {"options": [*options, "another"]})


def test_a_passage_that_is_no_text_is_refused() -> None:
    row = {"question": "2 + 2?", "options": ["3", "4"], "label": "4"}
    for key, value, kind in (("context", ["Sums.", "More."], "a list"), ("rationale", {"a": 1}, "an object")):
        with pytest.raises(BrokenRow, match=f"field '{key}' must be text, not {kind}"):
            FORMATTERS["multiple_choice"].format(row | {key: value})


def test_numbers_are_options_and_rows_with_a_passage_are_a_group() -> None:
    row = {"question": "2 + 2?", "options": [3, 4], "label": "4"}
    example = FORMATTERS["multiple_choice"].format(row)
    assert example.messages[0]["content"] == "2 + 2?\nA. 3\nB. 4" and (example.answer, example.group) == ("B", "2 + 2?")
    assert FORMATTERS["multiple_choice"].format(row | {"context": "Sums. "}).group == "Sums."
    assert FORMATTERS["multiple_choice"].format(row | {"rationale": 5}).messages[-1]["content"].startswith("5\n")
    assert FORMATTERS["multiple_choice"].format(row | {"context": "Sums.", "group": 7}).group == "7"


def test_a_column_that_nothing_reads_is_not_decoded(tmp_path: Path) -> None:
    rows = [{"prompt": "Hi?", "response": "Ho", "picture": {"bytes": b"no picture", "path": None}}]
    columns = Features({"prompt": Value("string"), "response": Value("string"), "picture": Image()})
    Dataset.from_list(rows, features=columns).save_to_disk(str(tmp_path / "data"))
    (example,) = read(Source("own", "math", folder=str(tmp_path / "data"), formatter="prompt_response"))
    assert isinstance(example, Example) and example.messages[0]["content"] == "Hi?"


def test_a_file_whose_name_looks_like_a_pattern_is_read(tmp_path: Path) -> None:
    row = {"prompt": "Hi?", "response": "Ho"}
    jsonl = write_jsonl(tmp_path / "a[1].jsonl", [row])
    Dataset.from_list([row]).to_parquet(parquet := tmp_path / "a[1].parquet")
    own = Source("own", "math", formatter="prompt_response")
    for source in (replace(own, jsonl=str(jsonl)), replace(own, parquet=str(parquet))):
        (example,) = read(source)
        assert isinstance(example, Example)


def gym(task: str, start: int, stop: int) -> list[tuple[str, str | None]]:
    opened = open_source(Source("own", "logic", reasoning_gym=task), revision=None, seed=3, rows=stop)
    examples = list(opened.reader.examples(start, stop))
    assert all(isinstance(example, Example) for example in examples)
    return [(example.messages[0]["content"], example.answer) for example in examples if isinstance(example, Example)]


@pytest.mark.parametrize("task", ["list_functions", "gsm_symbolic", "word_ladder"])
def test_tasks_that_know_their_size_make_any_number_of_items(task: str) -> None:
    found = gym(task, 998, 1003)
    assert len(set(found)) == 5 and gym(task, 998, 999) == found[:1]


def test_items_of_a_task_do_not_depend_on_how_many_are_made() -> None:
    items = reasoning_gym.create_dataset("leg_counting", size=1, seed=3)
    assert gym("leg_counting", 1500, 1502) == [
        (items[number]["question"].strip(), items[number]["answer"]) for number in (1500, 1501)
    ]


@pytest.mark.parametrize("task", ["graph_color", "propositional_logic", "rush_hour", "boxnet"])
def test_a_task_without_answers_is_refused(task: str) -> None:
    with pytest.raises(SourceError, match="its items have no answer, as they are scored by a function"):
        gym(task, 0, 1)


def test_files_that_are_held_out_by_their_names_are_not_read(tmp_path: Path) -> None:
    for split in ("train", "test"):
        row = {"prompt": f"{split}?", "response": "a"}
        write_jsonl(tmp_path / f"{split}-00000-of-00001.jsonl", [row])
        Dataset.from_list([row]).to_parquet(tmp_path / f"{split}-00000-of-00001.parquet")
    own = Source("own", "math", formatter="prompt_response")
    for source in (replace(own, jsonl=f"{tmp_path}/*.jsonl"), replace(own, parquet=f"{tmp_path}/*.parquet")):
        (example,) = read(source)
        assert isinstance(example, Example) and example.messages[0]["content"] == "train?"


def test_conversations_of_another_shape_are_broken(tmp_path: Path) -> None:
    turns = [
        [{"role": "assistant", "content": "a"}],
        [{"role": "user", "content": "a"}, {"role": "user", "content": "b"}],
        [{"role": "user", "content": " "}, {"role": "assistant", "content": "c"}],
    ]
    Dataset.from_list([{"messages": each} for each in turns]).save_to_disk(str(tmp_path / "data"))
    examples = read(Source("own", "math", folder=str(tmp_path / "data"), formatter="messages"))
    assert all(isinstance(example, BrokenRow) for example in examples) and len(examples) == 3


REAL = Path(__file__).parents[1] / "fixtures" / "real_items"


def real_items(name: str) -> list[dict[str, str]]:
    return [json.loads(line) for line in (REAL / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()]


@pytest.mark.parametrize("item", real_items("gsm8k"), ids=lambda item: item["prompt"][:20])
def test_the_formatter_fits_what_gsm8k_really_holds(item: dict[str, str]) -> None:
    example = FORMATTERS["gsm8k"].format({"question": item["prompt"], "answer": item["response"]})
    assert example is not None and example.answer == item["answer"]
    steps = item["response"].rpartition("####")[0].strip()
    assert [message["content"] for message in example.messages] == [
        item["prompt"].strip(),
        f"{steps}\nAnswer: {item['answer']}",
    ]


@pytest.mark.parametrize(
    "item", [*real_items("arc_easy"), *real_items("openbookqa")], ids=lambda item: item["prompt"][:20]
)
def test_the_formatter_fits_what_multiple_choice_really_holds(item: dict[str, str]) -> None:
    asked = item["prompt"].removesuffix("\nAnswer with the letter.")
    question, *options = re.split(r"\n(?=[A-E]\. )", asked)
    choices = {"label": [option[0] for option in options], "text": [option[3:] for option in options]}
    example = FORMATTERS["arc"].format({"question": question, "choices": choices, "answerKey": item["answer"]})
    assert example is not None and example.answer == item["answer"]
    assert example.messages[0]["content"] == asked and example.messages[1]["content"].endswith(
        f"Answer: {item['answer']}"
    )


CASES = Path(__file__).parents[1] / "fixtures" / "data_cases"


def test_a_message_keeps_its_keys() -> None:
    (weighed,) = read(Source("own", "math", jsonl=str(CASES / "source_weight.jsonl"), formatter="messages"))
    assert isinstance(weighed, Example)
    assert [message.get("train") for message in weighed.messages if message["role"] == "assistant"] == [False, None]
    (called,) = read(Source("own", "math", jsonl=str(CASES / "tool_1.jsonl"), formatter="messages"))
    assert isinstance(called, Example) and called.more["tools"][0]["function"]["name"] == "w"
    assert [bool(message.get("tool_calls")) for message in called.messages] == [False, True, False, False]
    (thought,) = read(Source("own", "math", jsonl=str(CASES / "reasoning_content.jsonl"), formatter="messages"))
    assert isinstance(thought, Example) and thought.messages[-1]["reasoning_content"] == "7*8=56"
    cleaned, changed = normalise(replace(thought, messages=[m | {"content": f"{m['content']} "}
                                                            for m in thought.messages]))  # fmt: skip
    assert changed and cleaned.messages == thought.messages and normalise(called)[0] == called


def test_an_unknown_key_of_a_message_is_not_dropped(tmp_path: Path) -> None:
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "score": 0}]
    path = write_jsonl(tmp_path / "a.jsonl", [{"messages": turns}])
    (broken,) = read(Source("own", "math", jsonl=str(path), formatter="messages"))
    assert isinstance(broken, BrokenRow) and str(broken).startswith("messages[1]: unknown key 'score'")


@pytest.mark.parametrize(
    ("name", "prompts"),
    [
        ("plain.jsonl.gz", ["日本語 7*8?"]),
        ("pretty_array.json", ["7*8?", "7*9?"]),
        ("array_one_line.json", ["7*8?", "7*9?"]),
        ("table.csv", ["日本語 7*8?", "日本語 7*9?"]),
        ("utf16.jsonl", ["日本語 7*8?", "日本語 7*9?"]),
        ("sharegpt.jsonl", ["7*8?"]),
        ("turn_weight_0.jsonl", ["2+2?"]),
    ],
)
def test_a_source_is_read_like_any_file_and_by_its_keys(name: str, prompts: list[str]) -> None:
    examples = read(Source("own", "math", jsonl=str(CASES / name), formatter="by_keys"))
    assert all(isinstance(example, Example) for example in examples), examples
    assert [next(m["content"] for m in e.messages if m["role"] == "user") for e in examples] == prompts  # type: ignore


def test_records_of_another_domain_or_held_out_ones_are_no_rows(tmp_path: Path) -> None:
    rows = [{"prompt": "a", "response": "b"} | more for more in ({}, {"split": "test"}, {"domain": "law"}, {"x": 1})]
    path = write_jsonl(tmp_path / "rows.jsonl", rows)
    kept, *broken = read(Source("own", "math", jsonl=str(path), formatter="by_keys"))
    assert isinstance(kept, Example)
    assert [str(row).partition(" in a record")[0] for row in broken] == [
        "held out: its split is 'test'",
        "its domain is 'law', not 'math'",
        "unknown key 'x'",
    ]


def test_a_source_may_have_another_encoding_and_columns_that_no_form_has(tmp_path: Path) -> None:
    rows = 'prompt,response,note\n"Un café?","près de la fenêtre",à côté\n'
    (tmp_path / "faq.csv").write_text(rows, encoding="cp1252")
    source = Source("own", "math", jsonl=str(tmp_path / "faq.csv"), formatter="by_keys")
    with pytest.raises(SourceError, match="not UTF-8.* the source's encoding "):
        read(source)
    with pytest.raises(SourceError, match="not ASCII: give the source's encoding, such as cp1252$"):
        read(replace(source, encoding="ascii"))
    (broken,) = read(replace(source, encoding="cp1252"))
    assert str(broken).endswith("or leave it out with the source's ignore_columns note")
    (example,) = read(replace(source, encoding="cp1252", ignore_columns=["note"]))
    assert isinstance(example, Example) and example.messages[0]["content"] == "Un café?"
    line = json.dumps({"prompt": "é", "response": "b"}, ensure_ascii=False) + "\n"
    (tmp_path / "lines.jsonl").write_text(line, encoding="cp1252")
    source = replace(source, jsonl=str(tmp_path / "lines.jsonl"))
    (broken,) = read(source)
    assert str(broken) == "not UTF-8: give the source's encoding, such as cp1252"
    (example,) = read(replace(source, encoding="cp1252"))
    assert isinstance(example, Example) and example.messages[0]["content"] == "é"


def test_several_files_are_one_source_and_bad_lines_are_told(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "a.jsonl", [{"prompt": "1", "response": "b"}])
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(b'{"prompt": "2", "response": "b"}\n{"prompt"\n'))
    source = Source("own", "math", jsonl=str(tmp_path / "*"), formatter="prompt_response")
    first, second, broken = read(source)
    assert isinstance(first, Example) and isinstance(second, Example)
    assert isinstance(broken, BrokenRow) and str(broken).startswith("not valid JSON")
