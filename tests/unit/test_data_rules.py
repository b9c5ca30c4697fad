"""Rules for rows: what they change, leave out and count; duplicates; evaluation items."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest

from srde_ds.data.build.decontaminate import (
    MOST_QUESTIONS,
    NGRAM,
    contaminated,
    evaluation_ngrams,
    find_ngrams,
    read_evaluation_file,
)
from srde_ds.data.build.duplicates import exact_duplicates, gather_signatures, near_duplicates
from srde_ds.data.build.row_rules import hashed, make_records, ngram_hashes, normalise, signatures, words
from srde_ds.data.build.tables import read_table
from srde_ds.data.sources.examples import BrokenRow, Example, unanswered
from srde_ds.data.sources.formatters import FORMATTERS
from srde_ds.errors import SRDEError

LABELS = {"domain": "math", "source": "own", "revision": "1"}


@dataclass(frozen=True)
class Rows:
    """A reader of given examples."""

    items: tuple[Example | BrokenRow, ...]

    @property
    def count(self) -> int:
        return len(self.items)

    def examples(self, start: int, stop: int) -> Iterator[Example | BrokenRow]:
        return iter(self.items[start:stop])


def asked(prompt: str, response: str, answer: str | None = None, group: str | None = None) -> Example:
    return Example([{"role": "user", "content": prompt}, {"role": "assistant", "content": response}], answer, group)


def records(path: Path, *items: Example | BrokenRow, near: bool = True) -> tuple[dict, list[dict]]:
    rows = Rows(items)
    figures = make_records(path, reader=rows, start=0, stop=len(items), labels=LABELS, near_duplicates=near)
    return figures, [json.loads(line) for line in read_table(path)["line"].to_pylist()]


def test_text_is_composed_and_freed_of_control_characters() -> None:
    example, changed = normalise(asked(" Cafe\u0301?\r\nYes\x00 ", "ok", " 5\u0301 "))
    assert [m["content"] for m in example.messages] == ["Caf\u00e9?\nYes", "ok"] and changed
    assert example.answer == "5\u0301"
    assert not normalise(asked("Caf\u00e9?", "ok"))[1]
    choice, _ = normalise(replace(asked("Which?", "b", "Cafe\u0301 "), more={"choices": ["Cafe\u0301 ", "tea"]}))
    assert choice.answer == choice.more["choices"][0] == "Caf\u00e9"


def test_the_first_line_of_code_keeps_its_indentation() -> None:
    code = "    y = x\n    return y"
    example, changed = normalise(asked("\n  \n\tx\n", f" \r\n\r\n{code} \n\n"))
    assert [m["content"] for m in example.messages] == ["\tx", code] and changed
    for formatter, row in (
        ("code_alpaca", {"instruction": "Go on:", "input": code, "output": code}),
        ("prompt_response", {"prompt": f"Go on:\n\n{code}", "response": f"\n{code}\n"}),
    ):
        made = FORMATTERS[formatter].format(row)
        assert made is not None and [m["content"] for m in made.messages] == [f"Go on:\n\n{code}", code]


def test_each_rule_counts_what_it_leaves_out(tmp_path: Path) -> None:
    figures, kept = records(
        tmp_path / "part",
        asked("One?", "1", "1"),
        unanswered("Nothing?"),
        BrokenRow("no text in 'answer'"),
        asked("\x00", "1"),
        asked("Two?", "<nooutput>"),
        asked("Three\ufffd?", "3"),
        asked("Four?", "\udc80"),
        asked(" Five?", "5"),
        replace(asked("Six?", "6", "a "), more={"choices": ["a ", "a"]}),
    )
    assert figures["counts"] == {"read": 9, "no answer": 1, "broken": 4, "empty": 2, "normalised": 1}
    assert figures["kept"] == 2
    assert figures["reasons"] == {
        "no text in 'answer'": 1,
        "lost characters": 2,
        "choices that are empty or the same": 1,
    }
    assert kept == [
        {"messages": asked("One?", "1").messages, "answer": "1", **LABELS, "row": 0},
        {"messages": asked("Five?", "5").messages, **LABELS, "row": 7},
    ]


def test_hashes_ignore_case_and_spacing_and_groups_join_variants(tmp_path: Path) -> None:
    records(
        tmp_path / "part",
        asked("What is 2?", "two"),
        asked("what  IS 2?", "two"),
        asked("What is 2?", "2"),
        asked("Name two.", "2", group="What is 2?"),
    )
    table = read_table(tmp_path / "part")
    content, asked_, group = (table[name].to_pylist() for name in ("content", "asked", "group"))
    assert content[0] == content[1] != content[2]
    assert asked_[0] == asked_[1] == asked_[2] != asked_[3]
    assert group == [0, 0, 0, asked_[0][0]]  # without its own, a record is in the group of its question


def test_every_answer_has_its_question_and_the_system_message_a_hash_of_its_own(tmp_path: Path) -> None:
    short = asked("One?", "1")
    long = Example([*short.messages, *asked("Two?", "2").messages])
    systems = [Example([{"role": "system", "content": text}, *short.messages]) for text in ("First.", "Second.")]
    records(tmp_path / "part", short, long, *systems)
    table = read_table(tmp_path / "part")
    first, both, *with_system = table["asked"].to_pylist()
    assert len(both) == 2 and both[:1] == first == with_system[0] == with_system[1] and both[1] != both[0]
    system = table["system"].to_pylist()
    assert system[0] == system[1] and len({*system[1:]}) == 3


def test_an_evaluation_file_in_another_encoding_is_refused_with_a_remedy(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("question\nÀ côté de la fenêtre ?\n", encoding="cp1252")
    with pytest.raises(SRDEError, match=r"not UTF-8[^:]*: save it as UTF-8\.$"):
        list(read_evaluation_file(tmp_path / "a.csv"))


def test_runs_of_words_are_hashed_in_order() -> None:
    values = np.array([hashed(word) for word in words("A b, c! d a B C")], np.uint64)
    runs = ngram_hashes(values, 3)
    assert len(runs) == 5 and runs[0] == runs[4] and len(set(runs.tolist())) == 4
    assert ngram_hashes(values[::-1], 3)[0] != runs[4]
    assert len(ngram_hashes(values[:2], 3)) == 0


def text(generator: random.Random, length: int) -> list[str]:
    return [f"w{generator.randrange(2000)}" for _ in range(length)]


def edited(found: list[str], count: int, generator: random.Random) -> list[str]:
    result = list(found)
    for place in generator.sample(range(len(found)), count):
        result[place] = "new"
    return result


def jaccard(left: list[str], right: list[str]) -> float:
    first, second = ({tuple(t[i : i + 5]) for i in range(len(t) - 4)} for t in (left, right))
    return len(first & second) / len(first | second)


def test_near_duplicates_are_found_and_others_left() -> None:
    generator = random.Random(0)
    originals = [text(generator, 80) for _ in range(300)]
    close = [edited(each, 1, generator) for each in originals]
    far = [edited(each, 20, generator) for each in originals]
    texts = [" ".join(each) for each in (*originals, *close, *far)]
    found = near_duplicates(signatures(texts), np.ones(900, bool), 0.8)
    assert min(map(jaccard, originals, close)) > 0.8 > max(map(jaccard, originals, far))
    assert not found[:300].any() and found[300:600].mean() > 0.97 and not found[600:].any()
    estimate = [(a == b).mean() for a, b in zip(signatures(texts[:300]), signatures(texts[300:600]), strict=True)]
    assert np.mean(estimate) == pytest.approx(np.mean(list(map(jaccard, originals, close))), abs=0.01)
    assert not near_duplicates(signatures(texts), np.ones(900, bool), 1.0).any()


@pytest.mark.parametrize("threshold", [0.8, 0.7, 0.5, 0.3])
def test_pairs_above_any_threshold_are_found(threshold: float) -> None:
    generator = np.random.default_rng(0)
    values = generator.integers(0, 2**32, (400, 128), np.uint32)
    other = generator.integers(0, 2**32, (400, 128), np.uint32)
    alike = np.where(generator.random(values.shape) < threshold + 0.1, values, other)
    found = near_duplicates(np.concatenate([values, alike]), np.ones(800, bool), threshold)
    assert not found[:400].any() and found[400:].mean() > 0.95


def test_only_candidates_are_compared_and_short_texts_too() -> None:
    texts = ["two words", "two words", "other words", "+", "-", "+"]
    everything = near_duplicates(signatures(texts), np.ones(6, bool), 0.8)
    assert everything.tolist() == [False, True, False, False, False, True]
    some = np.array([True, False, True, True, True, True])
    assert near_duplicates(signatures(texts), some, 0.8).tolist() == [False] * 5 + [True]
    assert near_duplicates(signatures([]), np.ones(0, bool), 0.8).tolist() == []


def test_a_crowded_bucket_costs_bounded_work() -> None:
    # One band in common and nothing else: every document is in one bucket, no two are alike.
    values = np.random.default_rng(0).integers(0, 2**32, (5_000, 128), np.uint32)
    values[:, :8] = 7
    assert not near_duplicates(values, np.ones(len(values), bool), 0.8).any()


def test_exact_duplicates_keep_the_first() -> None:
    assert exact_duplicates(np.array([5, 3, 5, 5, 3, 1], np.uint64)).tolist() == [False, False, True, True, True, False]


def test_signatures_of_all_parts_are_gathered(tmp_path: Path) -> None:
    first, second, third = (tmp_path / name for name in "abc")
    records(first, asked("One?", "1"), asked("Two?", "2"))
    records(second, asked("Three?", "3"), near=False)
    records(third, asked("Four?", "4"))
    merged = gather_signatures([first, second, third], [2, 1, 1], tmp_path / "all.npy")
    assert merged.shape == (4, 128) and not merged[2].any()
    assert (merged[[0, 1, 3]] == signatures(["One? 1", "Two? 2", "Four? 4"])).all()


LONG = "how many apples does ann have left if she gives three of her ten apples to bob"


Matches = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]


def matches(tmp_path: Path, evaluation: list[str], *items: Example) -> Matches:
    records(tmp_path / "part", *items)
    np.save(tmp_path / "ngrams.npy", evaluation_ngrams(evaluation))
    find_ngrams(tmp_path / "found", records=tmp_path / "part", ngrams=tmp_path / "ngrams.npy")
    table = read_table(tmp_path / "found")
    questions = [hashed(item.messages[0]["content"]) for item in items]
    index, ngram, whole = (table[name].to_numpy() for name in ("index", "ngram", "whole"))
    return index, ngram, whole, np.array(questions, np.uint64)


def test_documents_that_hold_parts_of_evaluation_items_are_flagged(tmp_path: Path) -> None:
    found = matches(
        tmp_path,
        [LONG, "Short one?"],
        asked(f"Hello. {LONG.title()}!", "7"),
        asked("What?", f"Well, {LONG}"),
        asked(LONG.replace("bob", "jo"), "7"),
        asked("how many apples does ann have left", "7"),
        asked("SHORT one", "1"),
        asked("A short one?", "1"),
    )
    flagged, forms = contaminated(*found, np.ones(6, bool))
    assert flagged.tolist() == [True, True, True, False, True, False] and forms == 0
    earlier = np.array([False, True, True, True, True, True])
    assert contaminated(*found, earlier)[0].tolist() == [False, True, True, False, True, False]


def test_a_form_of_words_is_no_leak(tmp_path: Path) -> None:
    form = "answer the question below with one number only and do not explain how you got it"
    items = [asked(f"{form} {number}", "1") for number in range(MOST_QUESTIONS + 1)]
    found = matches(tmp_path, [f"{form} 99"], *items)
    flagged, forms = contaminated(*found, np.ones(len(items), bool))
    assert not flagged.any() and forms == 4
    few = np.arange(len(items)) < MOST_QUESTIONS
    assert contaminated(*found, few)[0].tolist() == few.tolist()


@pytest.mark.parametrize("question", [LONG, "Short one?"])
def test_a_question_with_many_answers_is_a_leak(question: str, tmp_path: Path) -> None:
    items = [asked(question, f"answer {number}") for number in range(MOST_QUESTIONS + 2)]
    found = matches(tmp_path, [question], asked("What?", "else"), *items)
    flagged, forms = contaminated(*found, np.ones(len(items) + 1, bool))
    assert flagged.tolist() == [False, *([True] * len(items))] and forms == 0


def test_a_question_is_a_leak_in_any_turn_also_where_its_words_are_common(tmp_path: Path) -> None:
    around = [asked(f"{number}. {LONG}", "7") for number in range(MOST_QUESTIONS + 1)]
    later = Example([*asked("Hello", "Hi").messages, *asked(LONG, "7").messages, *asked("Why?", "So").messages])
    found = matches(tmp_path, [LONG], later, asked(LONG, "seven"), *around)
    assert len(words(LONG)) > NGRAM
    flagged, forms = contaminated(*found, np.ones(len(around) + 2, bool))
    assert flagged.tolist() == [True, True, *([False] * len(around))] and forms == len(words(LONG)) - NGRAM + 1


def test_characters_of_scripts_without_spaces_are_words(tmp_path: Path) -> None:
    question = "小明有十二个苹果,他给了小红五个,请问小明现在还剩下多少个苹果?"
    assert words("Ab 苹果x, ไทย 사과") == ["ab", "苹", "果", "x", "ไ", "ท", "ย", "사과"]
    found = matches(tmp_path, [question], asked(f"请回答下面的题目:{question}", "7"), asked("今天天气怎么样?", "好"))
    assert contaminated(*found, np.ones(2, bool))[0].tolist() == [True, False]
    one, other = signatures([question, question.replace("苹果", "橘子")])
    assert 0.3 < float((one == other).mean()) < 1


def test_evaluation_files_of_several_forms_are_read(tmp_path: Path) -> None:
    path = tmp_path / "held_out.jsonl"
    lines = [{"prompt": "a"}, {"messages": asked("b", "no").messages}, {"question": "c", "answer": "no"}]
    path.write_text("\n".join(map(json.dumps, lines)) + "\n\n")
    assert list(read_evaluation_file(path)) == ["a", "b", "c"]
    items = [
        {"instruction": "Classify the sentiment.", "input": "What a film!", "output": "good", "id": 7, "rating": 5},
        {"question": "Who?", "choices": ["Ann", "Bob"], "answer": 0, "context": "Ann ran."},
        {"question": "Where?", "answer": "there", "context": "It is there."},
        {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]},
    ]
    path.write_text("".join(json.dumps(item) + "\n" for item in items))
    assert list(read_evaluation_file(path)) == [
        "Classify the sentiment.\n\nWhat a film!",
        *("Ann ran.\n\nWho?\nA. Ann\nB. Bob", "Who?"),
        *("It is there.\nWhere?", "Where?"),
        "a",
    ]
    path.write_text('{"prompt": "a"}\n{"text": "b"}\n')
    with pytest.raises(SRDEError, match=r"held_out.jsonl:2 holds no question"):
        list(read_evaluation_file(path))
    with pytest.raises(SRDEError, match="no such file"):
        list(read_evaluation_file(tmp_path / "none"))
