"""A dataset from sources: balanced, clean, split for good, resumed where it was killed."""

from __future__ import annotations

import inspect
import json
import signal
import subprocess
import sys
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import psutil
import pytest
from datasets import load_dataset
from huggingface_hub import DatasetCard

from srde_ds.cli.main import main
from srde_ds.data.build.artifacts import code_fingerprint
from srde_ds.data.build.from_files import RowsOfFiles, build_dataset
from srde_ds.data.build.from_sources import build_from_sources
from srde_ds.data.build.options import BuildOptions, BuildSummary
from srde_ds.data.build.report import write_report
from srde_ds.data.build.selection import shares
from srde_ds.data.build.source_records import split_of
from srde_ds.data.manifest import load_manifest, load_rows
from srde_ds.data.sources import registry
from srde_ds.data.sources.registry import Source
from srde_ds.errors import SRDEError
from tests import killable_build
from tests.cli_helpers import fails, flags
from tests.data_helpers import tiny_tokenizer, write_jsonl

ROOT = Path(__file__).parents[2]
WORDS = [f"{a}{b}{c}" for a in "bdgkp" for b in "aeiou" for c in "lmnrs"]


def question(domain: str, number: int) -> str:
    """Text that is like no other number's."""
    generator = np.random.default_rng([len(domain), number])
    return f"{domain} {number}: " + " ".join(generator.choice(WORDS, 12)) + "?"


def items(domain: str, numbers: range, answer: str = "{}") -> list[dict[str, Any]]:
    return [{"prompt": question(domain, n), "response": answer.format(n), "answer": str(n)} for n in numbers]


def source(path: Path, domain: str, rows: list[dict[str, Any]], **values: Any) -> Source:
    given = {"formatter": "prompt_response", "license": "cc0", "redistributable": "yes"} | values
    name = path.stem
    return Source(name, domain, jsonl=str(write_jsonl(path, rows)), **given)


@pytest.fixture
def options(tmp_path: Path) -> BuildOptions:
    sources = [
        source(tmp_path / "sums.jsonl", "math", items("math", range(60))),
        source(tmp_path / "more.jsonl", "math", items("math", range(100, 140))),
        source(tmp_path / "puzzles.jsonl", "logic", items("logic", range(90))),
        Source("fill", "logic", tasks="logic", weight=0.0, near_duplicates=False),
    ]
    return BuildOptions(sources, 80, 256, "drop", 1, 0.1, 0.1)


def build(options: BuildOptions, work_dir: Path, **values: Any) -> BuildSummary:
    return build_from_sources(options, work_dir=work_dir, **({"tokenizer": tiny_tokenizer()} | values))


def lines(work_dir: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (work_dir / "data.jsonl").read_text().splitlines()]


def prompt(line: dict[str, Any]) -> str:
    return str(line["messages"][0]["content"])


def counts(result: BuildSummary, name: str) -> dict[str, int]:
    return next(source["counts"] for source in result.sources if source["name"] == name)


def records_made(result: BuildSummary) -> float:
    return result.passes["records"]["artifacts_made"]


def test_records_and_rows_hold_the_same_balanced_documents(options: BuildOptions, tmp_path: Path) -> None:
    result = build(options, tmp_path / "data")
    found = lines(tmp_path / "data")
    assert Counter(line["domain"] for line in found) == {"math": 80, "logic": 80}
    # Equal shares of what there is: 60 and 40 for 80.
    assert Counter(line["source"] for line in found) == {"sums": 40, "more": 40, "puzzles": 80}
    assert len({prompt(line) for line in found}) == 160
    manifest = load_manifest(tmp_path / "data" / "tokenized")
    tokenizer = tiny_tokenizer()
    for split, entry in manifest.splits.items():
        members = [line for line in found if line["split"] == split]
        rows = load_rows(tmp_path / "data" / "tokenized", split, manifest).with_format("numpy")
        documents = []
        for row in rows:
            starts = [*np.flatnonzero(row["position_ids"][: row["length"]] == 0), row["length"]]
            for start, end in zip(starts, starts[1:], strict=False):
                text = tokenizer.decode(row["input_ids"][start:end])
                answer = tokenizer.decode([token for token in row["labels"][start:end] if token >= 0])
                documents.append((manifest.domains[row["domain"]], text, answer))
        assert len(documents) == len(members) == sum(c.documents for c in entry.domains.values())
        for line in members:
            assert any(
                domain == line["domain"] and prompt(line) in text and answer == f"{line['answer']}<|im_end|>"
                for domain, text, answer in documents
            )
    assert set(manifest.splits) == {"train", "validation", "test"}
    assert manifest.build == result.fingerprint
    assert [s["name"] for s in manifest.sources] == ["sums", "more", "puzzles"]
    assert manifest.sources[0]["license"] == "cc0" and len(str(manifest.sources[0]["revision"])) == 64
    for line in found[:3]:
        assert items(line["domain"], range(int(line["answer"]), int(line["answer"]) + 1))[0]["prompt"] == prompt(line)
        assert line["row"] == int(line["answer"]) % 100


def test_data_jsonl_builds_the_same_documents_again(options: BuildOptions, tmp_path: Path) -> None:
    build(options, tmp_path / "data")
    manifest = load_manifest(tmp_path / "data" / "tokenized")
    again = build_dataset(
        RowsOfFiles(tmp_path / "data" / "data.jsonl", None, ["math", "logic"], max_length=256, too_long="drop", seed=1),
        tmp_path / "again",
        tiny_tokenizer(),
    )
    for split, entry in manifest.splits.items():
        for domain, count in entry.domains.items():
            other = again.splits[split].domains[domain]
            assert (count.documents, count.tokens, count.response_tokens) == (
                other.documents, other.tokens, other.response_tokens,
            )  # fmt: skip


def test_a_shortfall_is_refilled_by_generated_sources(options: BuildOptions, tmp_path: Path) -> None:
    result = build(replace(options, sources=options.sources[2:], examples_per_domain=300), tmp_path / "data")
    assert result.domains["logic"]["by_source"] == {"puzzles": 90, "fill": 210}
    assert counts(result, "fill")["read"] % 1000 == 0


def test_a_shortfall_is_an_error_or_trimmed_or_kept(
    options: BuildOptions, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    short = replace(options, sources=options.sources[:3], examples_per_domain=95)
    with pytest.raises(
        SRDEError, match="examples_per_domain=95: there are not enough clean examples: logic has 90. Lower it"
    ):
        build(short, tmp_path / "data")
    assert not (tmp_path / "data" / "data.jsonl").exists()
    trimmed = build(replace(short, on_shortfall="trim"), tmp_path / "data")
    assert {d: f["documents"] for d, f in trimmed.domains.items()} == {"math": 90, "logic": 90}
    assert trimmed.domains["math"]["by_source"]["more"] < 40  # 95 are 55 and 40: both give some up
    kept = build(replace(short, on_shortfall="keep"), tmp_path / "other")
    assert {d: (f["documents"], f["missing"]) for d, f in kept.domains.items()} == {"math": (95, 0), "logic": (90, 5)}
    assert caplog.text.count("logic has 90") == 2


def test_a_generated_source_that_has_no_more_ends_the_growth(options: BuildOptions, tmp_path: Path) -> None:
    bounded = Source("few", "logic", reasoning_gym="aiw", weight=1.0, near_duplicates=False, rows=1500)
    with pytest.raises(SRDEError, match="not enough clean examples: logic has 1,3"):
        build(replace(options, sources=[bounded], examples_per_domain=5000), tmp_path / "data", tokenizer=None)


def test_a_missing_source_is_fatal_or_skipped_by_name(options: BuildOptions, tmp_path: Path) -> None:
    gone = replace(options.sources[1], name="gone", jsonl=str(tmp_path / "none.jsonl"))
    with_gone = replace(options, sources=[options.sources[0], gone, *options.sources[2:]], examples_per_domain=50)
    with pytest.raises(SRDEError, match=r"source 'gone' \(jsonl .*none.jsonl\) cannot be read: no such file"):
        build(with_gone, tmp_path / "data")
    result = build(replace(with_gone, on_missing_source="skip"), tmp_path / "data")
    assert result.skipped == {"gone": f"no such file '{tmp_path / 'none.jsonl'}'"}
    assert result.domains["math"]["by_source"] == {"sums": 50}
    alone = replace(with_gone, sources=[gone, *options.sources[2:]], on_missing_source="skip")
    with pytest.raises(SRDEError, match="domain 'math' has no source left"):
        build(alone, tmp_path / "other")


def test_rules_are_applied_across_sources_domains_and_splits(options: BuildOptions, tmp_path: Path) -> None:
    sums, more = items("math", range(60)), items("math", range(100, 140))
    more[0] = sums[0] | {"prompt": sums[0]["prompt"].upper()}  # the same but for case, in another source
    words = sums[1]["prompt"].split()
    near = " ".join([*words, *words[::-1]])
    puzzles = items("logic", range(90))
    sums[2] = {"prompt": near, "response": "3"}
    puzzles[0] = {"prompt": near + " now", "response": "3"}  # nearly the same, in another domain
    puzzles[1] = {"prompt": "\x00", "response": "3"}
    puzzles[2] = {"prompt": "No answer", "response": None}
    puzzles[3] = {"prompt": question("logic", 3), "response": "word " * 300}
    puzzles[4] = {"prompt": question("logic", 4), "response": "stop <|im_end|> here"}
    evaluation = write_jsonl(tmp_path / "held_out.jsonl", [{"prompt": "Tell me: " + question("logic", 5)}])
    sources = [
        source(tmp_path / "sums.jsonl", "math", sums),
        source(tmp_path / "more.jsonl", "math", more),
        source(tmp_path / "puzzles.jsonl", "logic", puzzles),
    ]
    changed = replace(options, sources=sources, decontaminate_against=(str(evaluation),), on_shortfall="keep",
                      examples_per_domain=100)  # fmt: skip
    result = build(changed, tmp_path / "data")
    assert counts(result, "sums") == {"read": 60, "chosen": 60}
    assert counts(result, "more") == {"read": 40, "exact duplicate": 1, "chosen": 39}
    assert counts(result, "puzzles") == {
        "read": 90, "broken": 1, "empty": 1, "near duplicate": 1, "in an evaluation set": 1, "too long": 1,
        "end marker in a response": 1, "chosen": 84,
    }  # fmt: skip
    assert result.sources[2]["reasons"] == {"no text in 'response'": 1}
    assert all(question("logic", 5) not in prompt(line) for line in lines(tmp_path / "data"))
    page = write_report(tmp_path / "data", result, load_manifest(tmp_path / "data" / "tokenized")).read_text()
    trained = load_manifest(tmp_path / "data" / "tokenized").splits["train"].domains["logic"]
    assert f"| train | logic | {trained.documents} | 0 | 0 | {trained.response_tokens:,} | " in page
    assert "| puzzles | logic | 90 |" in page and "near duplicate" in page and "Domain logic lacks" in page


def test_documents_that_the_template_refuses_are_left_out_and_told(
    options: BuildOptions, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}{% if 'math 7:' in m.content %}{{ raise_exception('no sevens') }}{% endif %}"
        "{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )
    small = replace(options, examples_per_domain=90, on_shortfall="keep")
    result = build(small, tmp_path / "data", tokenizer=tokenizer)
    assert counts(result, "sums")["refused by the chat template"] == 1
    assert "source sums: 1 documents are refused by the chat template: source sums, row 7" in caplog.text
    assert [reason for reason in result.sources[0]["reasons"] if "no sevens" in reason]
    page = write_report(tmp_path / "data", result, load_manifest(tmp_path / "data" / "tokenized")).read_text()
    assert "refused by the chat template" in page and "no sevens" in page
    assert not any(question("math", 7) == prompt(line) for line in lines(tmp_path / "data"))


def test_a_growing_source_keeps_its_splits(options: BuildOptions, tmp_path: Path) -> None:
    one = replace(options, sources=options.sources[2:3], examples_per_domain=50)
    build(one, tmp_path / "small")
    grown = source(tmp_path / "puzzles.jsonl", "logic", items("logic", range(1000)))
    build(replace(one, sources=[grown], examples_per_domain=1000), tmp_path / "large")
    before = {prompt(line): line["split"] for line in lines(tmp_path / "small")}
    after = {prompt(line): line["split"] for line in lines(tmp_path / "large")}
    assert before.items() <= after.items()
    share = Counter(after.values())
    assert share["validation"] == pytest.approx(100, abs=35) and share["test"] == pytest.approx(100, abs=35)


def test_variants_of_a_question_share_a_split_and_none_stands_in_two(options: BuildOptions, tmp_path: Path) -> None:
    rows = [item | {"group": f"g{n % 30}", "response": f"{v}"} for v in range(3)
            for n, item in enumerate(items("logic", range(v * 100, v * 100 + 60)))]  # fmt: skip
    again = [item | {"response": "other"} for item in items("logic", range(60))]
    sources = [
        source(tmp_path / "variants.jsonl", "logic", rows, columns={"group": "group"}, near_duplicates=False),
        source(tmp_path / "again.jsonl", "logic", again, near_duplicates=False),
    ]
    result = build(replace(options, sources=sources, examples_per_domain=230, on_shortfall="keep"), tmp_path / "data")
    found = lines(tmp_path / "data")
    split_of_group: dict[str, set[str]] = {}
    groups = {row["prompt"]: row["group"] for row in rows}
    for line in (line for line in found if line["source"] == "variants"):
        split_of_group.setdefault(groups[prompt(line)], set()).add(line["split"])
    assert len(split_of_group) > 20 and all(len(splits) == 1 for splits in split_of_group.values())
    trained = {prompt(line) for line in found if line["split"] == "train"}
    held_out = {prompt(line) for line in found if line["split"] != "train"}
    assert held_out and not trained & held_out
    assert sum(source["counts"].get("held-out question", 0) for source in result.sources) > 0


def test_splits_are_hashes_in_their_proportions(options: BuildOptions) -> None:
    group = np.random.default_rng(0).integers(0, 2**63, 100_000).astype(np.uint64)
    found = np.bincount(split_of(group, options)) / len(group)
    assert found == pytest.approx([0.8, 0.1, 0.1], abs=0.005)
    fewer = split_of(group, replace(options, test_fraction=0.05))
    assert ((fewer == 2) <= (split_of(group, options) == 2)).all()


@pytest.mark.parametrize(
    ("wanted", "available", "weights", "expected"),
    [
        (10, [100, 100], [1, 1], [5, 5]),
        (10, [2, 100], [1, 1], [2, 8]),
        (10, [100, 100], [3, 1], [8, 2]),
        (10, [2, 3, 100], [1, 1, 0], [2, 3, 5]),
        (10, [2, 3], [1, 1], [2, 3]),
        (10, [100, 100, 100], [1, 1, 0], [5, 5, 0]),
        (7, [100, 100, 100], [1, 1, 1], [3, 2, 2]),
        (0, [5], [1], [0]),
        (5, [0, 9], [1, 0], [0, 5]),
    ],
)
def test_shares(wanted: int, available: list[int], weights: list[float], expected: list[int]) -> None:
    assert sorted(shares(wanted, available, weights)) == sorted(expected)
    assert sum(shares(wanted, available, weights)) == min(wanted, sum(available))


@pytest.mark.parametrize(
    ("changes", "made"),
    [
        ({}, set()),
        ({"max_length": 300}, {"rows"}),
        ({"seed": 2}, {"tokens", "rows"}),
        ({"near_duplicate_threshold": 0.9}, set()),
        ({"validation_fraction": 0.2}, {"rows"}),
    ],
)
def test_a_changed_option_makes_only_what_depends_on_it(
    changes: dict[str, Any], made: set[str], options: BuildOptions, tmp_path: Path
) -> None:
    build(options, tmp_path / "data")
    result = build(replace(options, **changes), tmp_path / "data", overwrite=True)
    assert {name for name, figures in result.passes.items() if figures["artifacts_made"]} == made


def test_records_are_made_again_by_other_code_of_the_columns(
    options: BuildOptions, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, again = build(options, tmp_path), build(options, tmp_path)
    assert records_made(first) > records_made(again) == 0
    source_of = inspect.getsource

    def changed(module: ModuleType) -> str:
        return source_of(module) + "# changed" * (module is registry)

    monkeypatch.setattr("srde_ds.data.build.artifacts.inspect.getsource", changed)
    code_fingerprint.cache_clear()
    try:
        assert records_made(build(options, tmp_path, overwrite=True)) == records_made(first)
    finally:
        code_fingerprint.cache_clear()


def test_another_dataset_is_replaced_only_on_request(options: BuildOptions, tmp_path: Path) -> None:
    first = build(options, tmp_path / "data")
    assert build(options, tmp_path / "data").fingerprint == first.fingerprint
    artifacts = sorted(tmp_path.glob("data/artifacts/**/*"))
    changed: list[tuple[str, dict[str, Any]]] = [
        ("max_length=256, not 300", {"max_length": 300}),
        (r"decontaminate_against=\[\], not \['x'\]", {"decontaminate_against": ("x",)}),
        (r"domains=\['math', 'logic'\], not \['math'\]", {"sources": options.sources[:2]}),
    ]
    for said, changes in changed:
        with pytest.raises(SRDEError, match=f"holds another dataset, built with {said}. Give --overwrite"):
            build(replace(options, **changes), tmp_path / "data")
    assert sorted(tmp_path.glob("data/artifacts/**/*")) == artifacts  # told before the work
    manifest = load_manifest(tmp_path / "data" / "tokenized")
    assert manifest.max_length == 256 and {source["kind"] for source in manifest.sources} >= {"jsonl"}
    build(replace(options, max_length=300), tmp_path / "data", overwrite=True)
    assert load_manifest(tmp_path / "data" / "tokenized").max_length == 300
    notes = tmp_path / "data" / "tokenized" / "notes.txt"
    notes.write_text("the user's")
    for tokenizer in (tiny_tokenizer(), None):  # without a tokenizer, the folder would go
        with pytest.raises(SRDEError, match=r"tokenized' was not made by build_dataset \(holds 'notes.txt'\)"):
            build(options, tmp_path / "data", tokenizer=tokenizer, overwrite=True)
    notes.rename(notes.with_name(".DS_Store"))
    build(options, tmp_path / "data", overwrite=True)
    assert load_manifest(tmp_path / "data" / "tokenized").max_length == 256
    # Records without rows do not leave the rows of other records beside them.
    with pytest.raises(SRDEError, match="holds another dataset"):
        build(options, tmp_path / "data", tokenizer=None)
    build(options, tmp_path / "data", tokenizer=None, overwrite=True)
    assert not (tmp_path / "data" / "tokenized").exists()


def test_records_of_another_build_or_edited_ones_are_replaced_only_on_request(
    options: BuildOptions, tmp_path: Path
) -> None:
    build(options, tmp_path / "data", tokenizer=None)
    records = tmp_path / "data/data.jsonl"
    made = records.read_bytes()
    build(options, tmp_path / "data", tokenizer=None)
    first, second, *more = options.sources
    others = replace(options, sources=[first, replace(second, weight=0.5), *more])
    with pytest.raises(SRDEError, match="its data.jsonl holds other records than this build makes"):
        build(others, tmp_path / "data", tokenizer=None)
    assert records.read_bytes() == made and not records.with_name("data.jsonl.tmp").exists()
    records.write_bytes(made.replace(b"?", b"!", 1))
    with pytest.raises(SRDEError, match="or edited by hand. Give --overwrite to replace it"):
        build(options, tmp_path / "data", tokenizer=None)
    build(options, tmp_path / "data", tokenizer=None, overwrite=True)
    assert records.read_bytes() == made


def test_too_long_is_a_policy(options: BuildOptions, tmp_path: Path) -> None:
    rows = [*items("logic", range(40)), *items("logic", range(40, 60), answer="word " * 300 + "{}")]
    one = replace(options, sources=[source(tmp_path / "p.jsonl", "logic", rows)], examples_per_domain=60)
    with pytest.raises(SRDEError, match=r"source p, row \d+: \d+ tokens exceed max_length=256"):
        build(replace(one, too_long="error"), tmp_path / "data")
    result = build(replace(one, too_long="truncate"), tmp_path / "data")
    split = load_manifest(tmp_path / "data" / "tokenized").splits["train"]
    assert counts(result, "p")["chosen"] == 60 and split.domains["logic"].too_long > 5
    assert split.domains["logic"].dropped == 0


def test_a_killed_build_goes_on_where_it_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    command = [sys.executable, "-m", "tests.killable_build", str(tmp_path / "killed"), "2"]
    job = subprocess.Popen(command, cwd=ROOT)
    parts = tmp_path / "killed" / "artifacts" / "records"
    try:
        deadline = time.monotonic() + 120
        while len(list(parts.glob("*.json"))) < 3:
            assert job.poll() is None and time.monotonic() < deadline
            time.sleep(0.005)
        workers = psutil.Process(job.pid).children(recursive=True)
    finally:
        job.send_signal(signal.SIGKILL)
        job.wait()
    assert not (tmp_path / "killed" / "build.json").exists()
    # The processes of a killed build end by themselves.
    assert workers and not psutil.wait_procs(workers, timeout=30)[1]
    stamps = {path: path.stat().st_mtime_ns for path in parts.glob("*.arrow") if path.with_suffix(".json").exists()}
    assert len(stamps) >= 3

    monkeypatch.setattr("srde_ds.data.sources.supply.GENERATED_AT_ONCE", killable_build.ROWS_A_PART)
    monkeypatch.setattr("srde_ds.data.build.source_records.GENERATED_AT_ONCE", killable_build.ROWS_A_PART)
    resumed, whole = (build(killable_build.OPTIONS, tmp_path / name) for name in ("killed", "whole"))
    assert {path: path.stat().st_mtime_ns for path in stamps} == stamps
    assert records_made(resumed) == records_made(whole) - len(stamps) > 0
    assert resumed.fingerprint == whole.fingerprint
    first, second = (load_manifest(tmp_path / name / "tokenized").splits for name in ("killed", "whole"))
    assert first.keys() == second.keys()
    assert all(first[split].content_sha256 == second[split].content_sha256 for split in first)
    assert (tmp_path / "killed" / "data.jsonl").read_bytes() == (tmp_path / "whole" / "data.jsonl").read_bytes()


@pytest.fixture
def base(tmp_path: Path) -> str:
    tiny_tokenizer().save_pretrained(tmp_path / "base")
    return str(tmp_path / "base")


def test_the_command_builds_reports_and_tokenises_again(
    base: str, options: BuildOptions, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    entries = {
        "math": [{"name": "sums", "jsonl": options.sources[0].jsonl, "formatter": "prompt_response"}],
        "logic": [{"name": "puzzles", "jsonl": options.sources[2].jsonl, "formatter": "prompt_response"}],
    }
    (tmp_path / "own.yaml").write_text(json.dumps(entries))
    work = tmp_path / "data"
    command = {"sources_file": str(tmp_path / "own.yaml"), "examples_per_domain": "50", "work_dir": str(work)}
    command |= {"num_processes": "1", "max_length": "256"}
    assert main(["build_dataset", *flags(command), "--skip_tokenize"]) == 0
    assert not (work / "tokenized").exists() and len(lines(work)) == 100
    assert main(["build_dataset", *flags(command | {"model_name": base})]) == 0
    printed = capsys.readouterr().out
    assert "math: 50 documents" in printed and f"Report: {work / 'report' / 'report.md'}" in printed
    assert f"Report: {work / 'report' / 'report.html'}" in printed
    for name in ("lengths.png", "domains.png", "removals.png"):
        assert (work / "report" / name).read_bytes()[:4] == b"\x89PNG"
        assert f"]({name})" in (work / "report" / "report.md").read_text()
    card = DatasetCard.load(work / "README.md")  # as the Hub reads it
    assert (card.data.license, card.data.tags) == ("other", ["srde", "math", "logic"])
    shared = load_dataset(str(work))
    assert shared.num_rows == {"all_splits": 100}  # as `train`, those held out would be trained on
    assert Counter(shared["all_splits"]["split"])["train"] < 100
    assert "| sums | math | jsonl" in card.text
    again = {"work_dir": str(work), "model_name": base, "max_length": "300", "sources_file": str(tmp_path / "own.yaml")}
    fails(capsys, ["build_dataset", *flags(again), "--skip_download"], "It was built with max_length=256, not 300")
    assert main(["build_dataset", *flags(again), "--skip_download", "--overwrite"]) == 0
    manifest = load_manifest(work / "tokenized")
    assert (manifest.max_length, manifest.domains) == (300, ["math", "logic"])


def test_options_that_do_not_go_together(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    def refused(options: dict[str, str], *parts: str) -> None:
        fails(capsys, ["build_dataset", *flags({"model_name": "m", "work_dir": str(tmp_path)} | options)], *parts)

    refused({"jsonl_data": "x", "examples_per_domain": "5"}, "jsonl_data=x is tokenised as it is", "--sources_file")
    refused({"jsonl_data": "x", "skip_download": "true"}, "jsonl_data=x is tokenised as it is")
    refused({"examples_per_domain": "5", "eval_file": "x"}, "eval_file=x", "--decontaminate_against")
    refused(
        {"jsonl_data": "x", "skip_tokenize": "true"},
        "skip_tokenize=true without --examples_per_domain leaves nothing to do",
    )
    refused({"jsonl_data": "x", "push_to_hub": "a/b"}, "push_to_hub=a/b: this option needs --examples_per_domain")
    for key, value in (("decontaminate_against", "x"), ("on_shortfall", "trim"), ("test_fraction", "0.2")):
        refused({"jsonl_data": "x", key: value}, f"{key}={value}: this option needs --examples_per_domain")
    refused({"jsonl_data": "x", "sources_file": "y"}, "sources_file=y: excludes jsonl_data=x")
    refused({"examples_per_domain": "0"}, "examples_per_domain=0: must be at least 1")
    refused({"examples_per_domain": "5", "test_fraction": "-.1"}, "test_fraction=-0.1")
    refused({"examples_per_domain": "5", "test_fraction": ".6", "validation_fraction": ".4"}, "sum must be less than 1")
    refused({"examples_per_domain": "5", "near_duplicate_threshold": "0"}, "near_duplicate_threshold=0.0")
    refused({"examples_per_domain": "5", "validation_fraction": "nan"}, "validation_fraction=nan")
    assert list(tmp_path.iterdir()) == []
