"""The dataset folder: complete or absent, counted, reused only when it is the same."""

from __future__ import annotations

import gzip
import json
import os
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from srde_ds.data.build.dropped import warn_of_dropped
from srde_ds.data.build.from_files import RowsOfFiles, build_dataset, check_files
from srde_ds.data.inputs import ReadOptions
from srde_ds.data.manifest import (
    DomainCounts,
    Manifest,
    Split,
    check_domains,
    check_tokenizer,
    load_manifest,
    load_rows,
    uneven_responses,
)
from srde_ds.errors import SRDEError
from tests.data_helpers import CHATML, sums, tiny_tokenizer, write_jsonl

CASES = Path(__file__).parents[1] / "fixtures" / "data_cases"
DOMAINS = ["math", "logic"]


@pytest.fixture
def files(tmp_path: Path) -> dict[str, Path]:
    train = [item for pair in zip(sums("math", range(30)), sums("logic", range(30)), strict=True) for item in pair]
    held_out = sums("math", range(50, 55)) + sums("logic", range(50, 53))
    return {
        "jsonl_data": write_jsonl(tmp_path / "train.jsonl", train),
        "eval_file": write_jsonl(tmp_path / "held_out.jsonl", held_out),
        "output_dir": tmp_path / "rows",
    }


def build(files: Mapping[str, Any], **changes: Any) -> Manifest:
    given: dict[str, Any] = {"domains": DOMAINS, "max_length": 512, "too_long": "drop", "seed": 1, **files, **changes}
    how = {name: given.pop(name) for name in ("num_processes", "overwrite") if name in given}
    tokenizer, output_dir = given.pop("tokenizer", None) or tiny_tokenizer(), given.pop("output_dir")
    return build_dataset(RowsOfFiles(**given), output_dir, tokenizer, **how)


def fails(files: Mapping[str, Any], message: str, **changes: Any) -> None:
    with pytest.raises(SRDEError) as caught:
        build(files, **changes)
    assert message in str(caught.value) and "\n" not in str(caught.value)
    folder = Path(changes.get("output_dir", files["output_dir"]))
    assert not any(
        folder.with_name(folder.name + ending).exists() for ending in (".tmp", ".building", ".building.lock")
    )


def test_folder_manifest_and_rows_agree(files: dict[str, Any]) -> None:
    manifest = build(files)
    folder = files["output_dir"]
    assert sorted(path.name for path in folder.iterdir()) == ["manifest.json", "train", "validation"]
    assert load_manifest(folder) == manifest
    documents = {"train": {"math": 30, "logic": 30}, "validation": {"math": 5, "logic": 3}}
    for name, split in manifest.splits.items():
        rows = load_rows(folder, name, manifest).with_format("numpy")
        assert split.rows == len(rows) == sum(counts.rows for counts in split.domains.values())
        for index, domain in enumerate(DOMAINS):
            counts = split.domains[domain]
            mine = rows.filter(lambda domain, index=index: domain == index, input_columns="domain")
            starts = sum(int((row["position_ids"][: row["length"]] == 0).sum()) for row in mine)
            assert starts == counts.documents == documents[name][domain]
            assert counts.rows == len(mine) and counts.tokens == sum(int(row["length"]) for row in mine)
            assert counts.response_tokens == sum(int((row["labels"] >= 0).sum()) for row in mine) > 0
            text = "".join(tiny_tokenizer().batch_decode(row["input_ids"][: row["length"]])[0] for row in mine)
            assert domain in text and DOMAINS[1 - index] not in text
        tokens = sum(counts.tokens for counts in split.domains.values())
        assert split.fill_rate == pytest.approx(tokens / (512 * split.rows), abs=1e-4)
    assert manifest.splits["train"].fill_rate > 0.85
    assert manifest.tokenizer["chat_template"] == "tokenizer"


def test_the_same_input_gives_the_same_rows_and_another_seed_others(files: dict[str, Any]) -> None:
    folders = [files["output_dir"].with_name(name) for name in "abc"]
    first, second, other = (build(files, output_dir=f, seed=s) for f, s in zip(folders, (1, 1, 2), strict=True))
    assert first == second
    assert first.splits["train"].content_sha256 != other.splits["train"].content_sha256


def test_two_processes_give_the_same_rows(files: dict[str, Any]) -> None:
    one = build(files)
    two = build(files, output_dir=files["output_dir"].with_name("other"), num_processes=2)
    assert one == two


def test_buffers_bound_memory_and_lose_nothing(files: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("srde_ds.data.rows.DOCUMENTS_A_BUFFER", 7)
    monkeypatch.setattr("srde_ds.data.build.from_files.DOCUMENTS_A_FILE", 11)
    small = build(files)
    monkeypatch.undo()
    whole = build(files, output_dir=files["output_dir"].with_name("whole"))
    for domain in DOMAINS:
        ours, theirs = (m.splits["train"].domains[domain] for m in (small, whole))
        assert (ours.documents, ours.tokens, ours.response_tokens) == (30, theirs.tokens, theirs.response_tokens)


def test_an_equal_folder_is_reused_untouched(files: dict[str, Any], caplog: pytest.LogCaptureFixture) -> None:
    manifest = build(files)
    stamps = {path: path.stat().st_mtime_ns for path in files["output_dir"].rglob("*")}
    with caplog.at_level("INFO"):
        assert build(files) == manifest
    assert "it is used as it is" in caplog.text
    assert {path: path.stat().st_mtime_ns for path in files["output_dir"].rglob("*")} == stamps


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"max_length": 256}, "It was built with max_length=512, not 256"),
        ({"too_long": "truncate"}, "It was built with too_long=drop, not truncate"),
        ({"seed": 2}, "It was built with seed=1, not 2"),
        ({"domains": ["logic", "math"]}, "domains=logic,math: the dataset was built with math,logic"),
        ({"tokenizer": tiny_tokenizer(None)}, "differs from '' in chat_template (tokenizer != fallback)"),
        ({"eval_file": None}, "It was built from other files or other content"),
    ],
)
def test_another_folder_is_never_overwritten(files: dict[str, Any], changes: dict[str, Any], message: str) -> None:
    manifest = build(files)
    fails(files, message, **changes)
    fails(files, "exists already: choose another output folder or delete it", **changes)
    assert load_manifest(files["output_dir"]) == manifest


def test_changed_content_is_noticed_and_foreign_folders_refused(files: dict[str, Any]) -> None:
    build(files)
    write_jsonl(files["jsonl_data"], sums("math", [90]) + sums("logic", [91]))
    fails(files, "It was built from other files or other content")
    fails(files, "holds no manifest.json: build_dataset has not made it", output_dir=files["jsonl_data"].parent)


def test_overwriting_replaces_only_what_a_build_has_made(files: dict[str, Any], tmp_path: Path) -> None:
    data = tmp_path / "data"
    for name in ("train", "test"):  # named like splits, yet nobody's build
        (data / name).mkdir(parents=True)
        write_jsonl(data / name / "math.jsonl", sums("math", range(9)))
    inputs = {"jsonl_data": f"{data}/**/*.jsonl", "eval_file": None, "domains": ["math"], "output_dir": data}
    fails(
        inputs,
        f"'{data}' was not made by build_dataset (holds no manifest.json), so it is not replaced. Choose ",
        overwrite=True,
    )
    (data / "manifest.json").write_text("{}")
    fails(inputs, f"'{data}' holds '{data}/test/math.jsonl', which the dataset is made from", overwrite=True)
    (data / "notes.txt").write_text("the user's")
    fails(files, f"'{data}' was not made by build_dataset (holds 'notes.txt')", output_dir=data, overwrite=True)
    fails(files, "train.jsonl' is not a folder", output_dir=files["jsonl_data"], overwrite=True)
    assert len(list(data.rglob("*.*"))) == 4 and files["jsonl_data"].is_file()
    build(files)
    (files["output_dir"] / "manifest.json").write_text("{")  # damaged, but ours
    assert build(files, overwrite=True, max_length=256) == load_manifest(files["output_dir"])


def test_two_builds_into_one_folder_do_not_harm_each_other(
    files: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    refused = []

    def meanwhile(*arguments: Any) -> int:
        with pytest.raises(SRDEError, match=r"rows': another build is using this folder. Wait for it, or choose") as no:
            build(files)
        refused.append(no)
        return check_files(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr("srde_ds.data.build.from_files.check_files", meanwhile)
        first = build(files, num_processes=1)
    assert refused and load_manifest(files["output_dir"]) == first == build(files)
    assert sorted(os.listdir(files["output_dir"].parent)) == ["held_out.jsonl", "rows", "train.jsonl"]


def test_a_killed_build_leaves_nothing_that_stops_the_next(files: dict[str, Any]) -> None:
    building = files["output_dir"].with_name("rows.tmp")
    (building / "train").mkdir(parents=True)
    (building / "train" / "half").write_text("x")
    files["output_dir"].mkdir()
    assert build(files).splits["train"].rows > 0
    assert not building.exists() and not list(files["output_dir"].rglob("half"))


def test_bad_input_is_named_before_anything_is_written(files: dict[str, Any]) -> None:
    fails(files, "no such file", jsonl_data=Path("none.jsonl"))
    fails(files, "no such file", eval_file=Path("none.jsonl"))
    with pytest.raises(SRDEError, match=r"train.jsonl/rows' cannot be made: Not a directory. Choose another folder"):
        build(files, output_dir=files["jsonl_data"] / "rows")
    fails(files, "has no record of domain 'code'", domains=[*DOMAINS, "code"])
    with files["jsonl_data"].open("a") as file:
        file.write('{"prompt": "a", "response": "b", "domain": "mat"}\n')
    fails(files, "train.jsonl:61: unknown domain 'mat'")


def test_held_out_prompts_in_training_are_refused(files: dict[str, Any]) -> None:
    leaked = {"role": "user", "content": "math: 51 + 1?"}
    turns = [leaked, *({"role": r, "content": "x"} for r in ("assistant", "user"))]
    with files["jsonl_data"].open("a") as file:
        file.write(json.dumps({"messages": [*turns, {"role": "assistant", "content": "y"}], "domain": "math"}) + "\n")
        file.write(json.dumps(sums("logic", [52])[0]) + "\n")
    fails(files, "2 held-out questions are also in training; for example, ")
    fails(files, "held_out.jsonl:2 asks what ")
    fails(files, "train.jsonl:61 asks. Remove them from one of the files")


def test_questions_before_the_last_one_that_are_in_training_are_told(
    files: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    turns = [{"role": "user", "content": "math: 3 + 1?"}, {"role": "assistant", "content": "4"}]
    more = [{"role": "user", "content": "And then?"}, {"role": "assistant", "content": "x"}]
    with files["eval_file"].open("a") as file:
        file.write(json.dumps({"messages": [*turns, *more], "domain": "math"}) + "\n")
    build(files)
    assert "1 questions before the last one of held-out conversations are also in training" in caplog.text


def test_the_same_question_about_another_system_message_is_no_leak(
    files: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    def asked(document: str) -> str:
        return json.dumps({"prompt": "Summarise.", "response": "x", "system": document, "domain": "math"}) + "\n"

    with files["jsonl_data"].open("a") as file:
        file.write(asked("A first document."))
    held_out = files["eval_file"].read_text()
    files["eval_file"].write_text(held_out + asked("Another document."))
    build(files)
    assert re.search(r"1 of \d+ held-out questions equal a training question but for case, spaces or the", caplog.text)
    files["eval_file"].write_text(held_out + asked("A first document."))
    fails(files, "1 held-out questions are also in training", output_dir=files["output_dir"] / "other")


def test_long_documents_are_counted_by_domain(files: dict[str, Any]) -> None:
    long = [{"prompt": f"logic {i}", "response": "x1y2z3" * 100, "domain": "logic"} for i in range(3)]
    with files["jsonl_data"].open("a") as file:
        file.write("".join(json.dumps(item) + "\n" for item in long))
    for policy, dropped in (("drop", 3), ("truncate", 0)):
        counts = build(files, too_long=policy, output_dir=files["output_dir"].with_name(policy)).splits["train"].domains
        assert (counts["logic"].documents, counts["logic"].too_long, counts["logic"].dropped) == (33, 3, dropped)
        assert (counts["math"].documents, counts["math"].too_long, counts["math"].dropped) == (30, 0, 0)
    fails(files, "train.jsonl:61: ", too_long="error")
    fails(files, "all 30 documents of domain 'math' are longer than max_length=8", max_length=8)


def test_manifest_checks(files: dict[str, Any]) -> None:
    manifest = build(files, eval_file=None)
    folder = files["output_dir"]
    check_tokenizer(manifest, tiny_tokenizer())
    check_domains(manifest, DOMAINS)
    with pytest.raises(SRDEError, match="differs from '' in chat_template_sha256"):
        check_tokenizer(manifest, tiny_tokenizer(CHATML + " "))
    larger = tiny_tokenizer()
    larger.add_tokens(["extra"])
    with pytest.raises(SRDEError, match=r"differs from '' in vocab_size \(278 != 279\)"):
        check_tokenizer(manifest, larger)
    with pytest.raises(SRDEError, match="has no train rows: build it with more records"):
        load_rows(folder, "train", replace(manifest, splits={}))
    with pytest.raises(SRDEError, match="has no validation rows: build it with --eval_file"):
        load_rows(folder, "validation", manifest)
    manifest.splits["train"].rows += 1
    with pytest.raises(SRDEError, match="rows, but its manifest says"):
        load_rows(folder, "train", manifest)
    next((folder / "train").glob("*.arrow")).unlink()
    with pytest.raises(SRDEError, match="cannot be read"):
        load_rows(folder, "train", manifest)
    path = folder / "manifest.json"
    content = json.loads(path.read_text())
    for broken, message in (
        ("{", "is damaged"),
        ("[]", "format_version None"),
        (json.dumps(content | {"format_version": 9}), "format_version 9, but this release reads 1"),
        (json.dumps(content | {"splits": {"train": {"rows": 1}}}), "is damaged"),
        (json.dumps(content | {"domains": ["math"]}), "is damaged"),
        (json.dumps(content | {"tokenizer": []}), "is damaged"),
    ):
        path.write_text(broken)
        with pytest.raises(SRDEError, match=message):
            load_manifest(folder)
    with pytest.raises(SRDEError, match="no such folder"):
        load_manifest(folder / "none")


def test_calls_do_not_change_a_tokenizers_identity(files: dict[str, Any], tmp_path: Path) -> None:
    manifest = build(files)
    tokenizer = tiny_tokenizer()
    tokenizer.pad_token = tokenizer.eos_token
    tokenizer(["a", "what is"], padding=True, truncation=True, max_length=4)
    tokenizer.save_pretrained(tmp_path / "saved")
    check_tokenizer(manifest, tokenizer)
    check_tokenizer(manifest, type(tokenizer).from_pretrained(tmp_path / "saved"))


def test_another_bos_token_makes_other_rows_unless_the_manifest_is_older(files: dict[str, Any]) -> None:
    manifest, tokenizer = build(files), tiny_tokenizer()
    tokenizer.bos_token = "math"
    with pytest.raises(SRDEError, match=r"differs from '' in bos_token \(<s> != math\)"):
        check_tokenizer(manifest, tokenizer)
    del manifest.tokenizer["bos_token"]
    check_tokenizer(manifest, tokenizer)


def test_the_last_turn_alone_or_one_document_a_row(files: dict[str, Any], tmp_path: Path) -> None:
    several = [
        {"messages": [{"role": role, "content": f"{role} {n}"} for n in range(2) for role in ("user", "assistant")]}
        for _ in range(3)
    ]
    data = write_jsonl(tmp_path / "several.jsonl", [item | {"domain": "math"} for item in several])
    options: dict[str, Any] = {"jsonl_data": data, "eval_file": None, "domains": ["math"]}
    every = build(files, **options)
    last = build(files, **options, train_on="last", output_dir=tmp_path / "last")
    alone = build(files, **options, packing=False, output_dir=tmp_path / "alone")
    counts = [manifest.splits["train"].domains["math"] for manifest in (every, last, alone)]
    assert counts[0].tokens == counts[1].tokens == counts[2].tokens
    assert 2 * counts[1].response_tokens == counts[0].response_tokens == counts[2].response_tokens
    assert [count.rows for count in counts] == [1, 1, 3]
    fails(files, "built with train_on=all, not last", **options, train_on="last")
    fails(files, "built with packing=True, not False", **options, packing=False)


def test_very_uneven_domains_are_told_with_their_shares() -> None:
    def split(**tokens: int) -> Split:
        return Split("", "", 0, 0.0, "", {domain: DomainCounts(response_tokens=n) for domain, n in tokens.items()})

    assert uneven_responses(split(math=900, logic=100, code=0)) is None
    told = uneven_responses(split(logic=20, math=900, code=80, science=0))
    assert told is not None and "math 90.0%, code 8.0%, logic 2.0%. " in told and "--domain_weights" in told


def test_records_of_many_files_make_one_dataset(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "a.jsonl", sums("math", range(30)))
    test = [record | {"split": "test"} for record in sums("logic", range(40, 45))]
    with gzip.open(tmp_path / "b.jsonl.gz", "wt") as file:
        file.writelines(json.dumps(record) + "\n" for record in [*sums("logic", range(30)), *test])
    files = {"jsonl_data": Path(f"{tmp_path}/*.jsonl*"), "eval_file": None, "output_dir": tmp_path / "rows"}
    manifest = build(files)
    counts = {name: {d: c.documents for d, c in split.domains.items()} for name, split in manifest.splits.items()}
    assert counts == {"train": {"math": 30, "logic": 30}, "test": {"math": 0, "logic": 5}}
    assert build(files) == manifest
    write_jsonl(tmp_path / "a.jsonl", sums("math", range(31)))
    fails(files, "It was built from other files or other content")


def test_files_renamed_so_that_their_names_say_the_split_are_other_files(tmp_path: Path) -> None:
    for name, numbers in (("part1", range(30)), ("part2", range(30, 40))):
        write_jsonl(tmp_path / f"{name}.jsonl", sums("math", numbers))
    files = {"jsonl_data": Path(f"{tmp_path}/*.jsonl"), "eval_file": None, "output_dir": tmp_path / "rows"}
    options: dict[str, Any] = files | {"domains": ["math"]}
    assert list(build(options).splits) == ["train"]
    (tmp_path / "part1.jsonl").rename(tmp_path / "train.jsonl")
    (tmp_path / "part2.jsonl").rename(tmp_path / "validation.jsonl")
    fails(options, "It was built when the names of the files told other splits")
    path = tmp_path / "rows/manifest.json"  # of a release that did not note them
    path.write_text(json.dumps({k: v for k, v in json.loads(path.read_text()).items() if k != "named_splits"}))
    assert list(build(options).splits) == ["train"]


def test_how_files_are_read_is_part_of_what_a_folder_is(files: dict[str, Any], tmp_path: Path) -> None:
    renamed = [{"q": r["prompt"], "response": r["response"]} for r in sums("math", range(20))]
    write_jsonl(files["jsonl_data"], renamed)
    reading = ReadOptions(columns={"prompt": "q"}, domain="math")
    given = {"eval_file": None, "domains": ["math"], "reading": reading}
    manifest = build(files, **given)
    assert manifest.reading == {"columns": {"prompt": "q"}, "domain": "math"}
    assert load_manifest(files["output_dir"]) == build(files, **given) == manifest
    fails(files, "It was built with reading=", **given | {"reading": ReadOptions(columns={"prompt": "q"})})


def test_bad_records_are_all_told_or_left_out_and_counted(
    files: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    template = "{% if messages[0]['content'] == 'no' %}{{ raise_exception('not this') }}{% endif %}" + CHATML
    bad = ['{"prompt": 1', json.dumps({"prompt": "no", "response": "b", "domain": "math"})]
    bad.append(json.dumps({"prompt": "a", "response": "b<|im_end|>", "domain": "math"}))
    with files["jsonl_data"].open("a") as file:
        file.writelines(f"{line}\n" for line in bad)
    with pytest.raises(SRDEError, match="2 bad records(?s:.*):61: not valid JSON(?s:.*):63: a response holds"):
        build(files, tokenizer=tiny_tokenizer(template))
    skipped = build(files, tokenizer=tiny_tokenizer(template), reading=ReadOptions(on_bad_record="skip"))
    assert skipped.bad_records == 3 and load_manifest(files["output_dir"]) == skipped
    assert skipped.splits["train"].domains["math"].documents == 30
    assert ":62: the tokenizer's chat template refuses these messages: not this" in caplog.text


def test_a_domain_whose_records_are_all_bad_is_refused(files: dict[str, Any]) -> None:
    template = CHATML.replace("{{ m['content'] }}", "{{ m['content'].split('</think>')[-1] }}")
    thought = [record | {"response": f"<think>x</think>{record['response']}"} for record in sums("code", range(30))]
    with files["jsonl_data"].open("a") as file:
        file.writelines(json.dumps(record) + "\n" for record in thought)
    given: dict[str, Any] = {"domains": [*DOMAINS, "code"], "tokenizer": tiny_tokenizer(template)}
    given["reading"] = ReadOptions(on_bad_record="skip")
    fails(files, "all records of domain 'code' are bad, as the report says: correct them, or leave it out of", **given)
    manifest = build(files, **given, optional_domains=("code",))
    assert (manifest.bad_records, manifest.splits["train"].domains["code"].documents) == (30, 0)


def test_an_eval_file_of_all_splits_holds_out_what_evaluation_takes(
    files: dict[str, Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "hub"
    folder.mkdir()
    write_jsonl(folder / "train-0.jsonl", sums("math", range(100, 150)))
    write_jsonl(folder / "test-0.jsonl", sums("math", range(200, 210)))
    with caplog.at_level("INFO"):
        manifest = build(files, eval_file=folder)
    assert manifest.splits["validation"].domains["math"].documents == 10
    assert f"{folder}: 10 held-out items; left out as training items: 50" in caplog.text


def test_a_template_that_refuses_a_kind_of_conversation_is_noticed_at_once(files: dict[str, Any]) -> None:
    template = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}" + CHATML
    turns = [
        {"role": "system", "content": "S"},
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b"},
    ]
    with files["jsonl_data"].open("a") as file:
        file.write(json.dumps({"messages": turns, "domain": "math"}) + "\n")
    inputs = RowsOfFiles(files["jsonl_data"], None, DOMAINS, max_length=64, too_long="drop", seed=0)
    with pytest.raises(SRDEError, match="train.jsonl:61: .*no system"):
        check_files(inputs, tiny_tokenizer(template))
    assert check_files(inputs, tiny_tokenizer()) == 0


def test_questions_that_are_held_out_but_for_case_and_spaces_are_told(
    files: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    with files["eval_file"].open("a") as file:
        file.write(json.dumps({"prompt": "MATH:  3 + 1? ", "response": "4", "domain": "math"}) + "\n")
    build(files)
    told = (
        "1 of 9 held-out questions equal a training question but for case, spaces or the system message, the first is"
    )
    assert told in caplog.text and "held_out.jsonl:9." in caplog.text
    assert "domains with fewer than 100 training records: math has 30, logic has 30." in caplog.text


def test_domains_that_are_not_trained_need_no_records_and_no_warning(
    files: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    build(files, domains=[*DOMAINS, "code", "law"], optional_domains=("code", "law"))
    assert "training records: math has 30, logic has 30. An" in caplog.text


def test_dropped_documents_are_told_by_domain_with_the_remedy(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    files = {"jsonl_data": CASES / "half_too_long.jsonl", "eval_file": None, "output_dir": tmp_path / "rows"}
    manifest = build(files, domains=["math", "code"], max_length=128)
    warn_of_dropped(manifest)
    for domain in ("math", "code"):
        counts = manifest.splits["train"].domains[domain]
        assert (counts.documents, counts.dropped) == (8, 4) and counts.longest > 128
        told = f"train, {domain}: 4 of 8 documents are longer than max_length=128: 4 left out. To keep them whole, "
        assert (
            told + f"raise --max_length (the longest has {counts.longest:,} tokens), or give --too_long" in caplog.text
        )
    caplog.clear()
    warn_of_dropped(
        build(files | {"output_dir": tmp_path / "b"}, domains=["math", "code"], max_length=128, too_long="truncate")
    )
    assert "4 of 8 documents are longer than max_length=128: 4 cut at their end." in caplog.text
