"""Sources and folders that a build cannot use are named before anything is made of them."""

from __future__ import annotations

import json
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from srde_ds.data.build.from_sources import build_from_sources
from srde_ds.data.build.options import BuildOptions, BuildSummary
from srde_ds.data.sources.registry import Source
from srde_ds.data.sources.supply import Supply
from srde_ds.errors import SRDEError
from tests.data_helpers import sums, write_jsonl


@pytest.fixture
def options(tmp_path: Path) -> BuildOptions:
    path = write_jsonl(tmp_path / "sums.jsonl", sums("math", range(20)))
    source = Source("sums", "math", jsonl=str(path), formatter="prompt_response", near_duplicates=False)
    return BuildOptions([source], 10, 256, "drop", 1)


def build(options: BuildOptions, work_dir: Path, **changes: Any) -> BuildSummary:
    return build_from_sources(replace(options, **changes), work_dir=work_dir, tokenizer=None)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"columns": {"prompt": "q"}}, "its columns do not fit: there is no 'q', only prompt, response, domain"),
        ({"jsonl": "."}, "the folder holds no file of records"),
        (
            {"jsonl": None, "formatter": None, "reasoning_gym": "leg_counting", "options": {"min_animals": 0}},
            "min_animals must be positive",
        ),
    ],
)
def test_a_source_of_another_form_cannot_be_had(
    options: BuildOptions, tmp_path: Path, values: dict[str, Any], message: str
) -> None:
    wrong = [replace(options.sources[0], **values)]
    with pytest.raises(SRDEError, match="source 'sums' .* cannot be read: ") as caught:
        build(options, tmp_path / "data", sources=wrong)
    assert message in str(caught.value)


def test_columns_may_be_missing_from_some_rows(options: BuildOptions, tmp_path: Path) -> None:
    rows = ["not JSON", "[]", *({"prompt": f"{n}?"} for n in range(5)), *sums("math", range(20))]
    path = tmp_path / "sums.jsonl"
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    assert build(options, tmp_path / "data").sources[0]["counts"]["broken"] == 7


def test_a_shortfall_tells_what_was_left_out(
    options: BuildOptions, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    faulty = [{"prompt": "why?", "response": None} for _ in range(5)]
    path = write_jsonl(tmp_path / "faulty.jsonl", [*sums("logic", range(20)), *faulty])
    other = replace(options.sources[0], name="faulty", domain="logic", jsonl=str(path))
    left_out = r"logic has 20 \(left out of faulty: broken 5 \(no text in 'response'\) of 25 rows\)"
    with pytest.raises(SRDEError, match=rf"math has 20, {left_out}. Lower it"):
        build(options, tmp_path / "data", sources=[*options.sources, other], examples_per_domain=50)
    assert caplog.messages == ["source faulty: broken 5 (no text in 'response') of 25 rows"]


def test_few_examples_of_several_generated_sources(options: BuildOptions, tmp_path: Path) -> None:
    sources = [Source(name, "logic", tasks="science", near_duplicates=False) for name in ("one", "two")]
    assert build(options, tmp_path, sources=sources, examples_per_domain=1).domains["logic"]["documents"] == 1


def test_evaluation_sets_without_questions_are_refused(options: BuildOptions, tmp_path: Path) -> None:
    empty = write_jsonl(tmp_path / "empty.jsonl", [])
    refused = {"math_tasks": "a generated source has no test set", str(empty): "is empty", "sum": "Did you mean 'sums'"}
    for name, message in refused.items():
        with pytest.raises(SRDEError, match=f"decontaminate_against={name}: .*{message}"):
            build(options, tmp_path / "data", decontaminate_against=(name,))


def test_questions_without_an_answer_are_searched_for_and_broken_rows_are_told(
    options: BuildOptions, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    goals = ["Open the lid.", "Close the lid.", " "]
    rows = [{"goal": goal, "sol1": "Pull.", "sol2": "Push.", "label": -1} for goal in goals]
    hidden = Source("hidden", "math", jsonl=str(write_jsonl(tmp_path / "hidden.jsonl", rows)), formatter="piqa")
    leaked = "Which way is better to reach this goal?\nOpen the lid.\nA. Pull.\nB. Push."
    path = write_jsonl(tmp_path / "own.jsonl", [*sums("math", range(20)), {"prompt": leaked, "response": "A"}])
    own = replace(options.sources[0], jsonl=str(path))
    result = build(options, tmp_path / "data", sources=[own, hidden], decontaminate_against=("hidden",))
    assert result.sources[0]["counts"]["in an evaluation set"] == 1
    assert result.sources[1]["counts"] == {"read": 3, "no answer": 2, "broken": 1}
    assert caplog.messages[0] == (
        "decontaminate_against=hidden: 1 of its 3 rows are broken (no text in 'goal'), and their questions are not "
        "searched for"
    )


def test_a_package_that_fillers_need_is_told_at_once_and_missed_only_for_a_gap(
    options: BuildOptions, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def version(package: str) -> str:
        raise metadata.PackageNotFoundError(package)

    monkeypatch.setattr("srde_ds.data.sources.reading.metadata.version", version)
    logic = replace(options.sources[0], name="more", domain="logic")
    logic = replace(logic, jsonl=str(write_jsonl(tmp_path / "more.jsonl", sums("logic", range(20, 40)))))
    fillers = [Source(domain, domain, tasks=domain, weight=0) for domain in ("math", "logic")]
    sources = [*options.sources, logic, *fillers]
    enough = build(options, tmp_path / "data", sources=sources)
    assert [figures["documents"] for figures in enough.domains.values()] == [10, 10] and not enough.skipped
    missing = "package 'reasoning-gym' is missing: pip install reasoning-gym, or 'srde-ds[quickstart]' for all tasks"
    told = [message for message in caplog.messages if "package" in message]
    assert told == [f"would be needed if domain math or logic falls short: {missing}"]
    short = replace(options, sources=sources, examples_per_domain=30)
    with pytest.raises(SRDEError, match=r"source 'math' .* package 'reasoning-gym' is missing: pip install reaso"):
        build(short, tmp_path / "more")
    result = build(short, tmp_path / "more", on_missing_source="skip", on_shortfall="keep")
    assert result.domains["math"]["documents"] == 20 and result.skipped.keys() == {"math", "logic"}
    # Without another source of the domain, the gap is there from the start.
    gone = [replace(options.sources[0], jsonl=str(tmp_path / "gone.jsonl")), fillers[0]]
    with pytest.raises(SRDEError, match=r"domain 'math' has no source left \(sums: no such file .*; math: package 're"):
        build(options, tmp_path / "gone", sources=gone, on_missing_source="skip")


def test_fillers_alone_make_a_domain_whose_sources_are_gone(options: BuildOptions, tmp_path: Path) -> None:
    gone = replace(options.sources[0], jsonl=str(tmp_path / "gone.jsonl"))
    fillers = [
        Source(f"{topic} tasks", "math", tasks=topic, weight=0, near_duplicates=False) for topic in ("math", "code")
    ]
    result = build(options, tmp_path / "data", sources=[gone, *fillers], on_missing_source="skip")
    assert result.domains["math"]["documents"] == 10 and result.skipped.keys() == {"sums"}


def test_commits_are_looked_up_once(options: BuildOptions, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    used = []

    def opened(source: Source, *, revision: str | None, **_: Any) -> Any:
        used.append((source.location, revision))
        return SimpleNamespace(source=source, revision=source.revision or revision or "newest")

    monkeypatch.setattr("srde_ds.data.sources.supply.open_source", opened)
    loose = Source("loose", "math", hub="a/loose", formatter="gsm8k")
    pinned = replace(loose, name="pinned", hub="a/pinned", revision="pin")
    for sources in ([loose, pinned], [loose, pinned], [replace(loose, hub="b/other"), pinned]):
        Supply(replace(options, sources=sources), tmp_path)
    looked_up = [("a/loose", None), ("a/loose", "newest"), ("b/other", None)]
    assert used == [call for first in looked_up for call in (first, ("a/pinned", "pin"))]
    (tmp_path / "sources.lock.json").write_text("{")
    with pytest.raises(SRDEError, match=r"sources.lock.json' is damaged: delete it"):
        Supply(options, tmp_path)


def test_what_no_build_made_is_not_replaced(options: BuildOptions, tmp_path: Path) -> None:
    for name in ("README.md", "data.jsonl"):
        (tmp_path / name).write_text("mine")
        with pytest.raises(SRDEError, match=f"its {name} was not made by a build. Choose another --work_dir"):
            build(options, tmp_path)
        assert {path.name: path.read_text() for path in tmp_path.iterdir() if path.name != "sums.jsonl"} == {
            name: "mine"
        }
        (tmp_path / name).unlink()
    with pytest.raises(SRDEError, match=r"work_dir=.*sums.jsonl: cannot be made: File exists"):
        build(options, tmp_path / "sums.jsonl")
