"""The verbs read the files that people have: one command each, and one clear report where something is wrong."""

from __future__ import annotations

import gzip
import json
import re
import shlex
import textwrap
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from srde_ds.cli.main import main
from srde_ds.data.manifest import load_manifest
from tests.cli_helpers import fails, flags, save_base
from tests.data_helpers import write_jsonl

CASES = Path(__file__).parents[1] / "fixtures" / "data_cases"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_base(tmp_path_factory.mktemp("base") / "base")


def command(base: Path, work_dir: Path, **options: Any) -> list[str]:
    given = {"model_name": base, "work_dir": work_dir, "max_length": 128, "domains": "math"}
    return ["build_dataset", *flags(given | options)]


@pytest.mark.parametrize("name", ["table.csv", "pretty_array.json", "plain.jsonl.gz", "utf16.jsonl", "sharegpt.jsonl"])
def test_a_file_is_built_in_one_command(base: Path, tmp_path: Path, name: str) -> None:
    assert main(command(base, tmp_path, jsonl_data=CASES / name)) == 0
    counts = load_manifest(tmp_path / "tokenized").splits["train"].domains
    assert counts["math"].documents == (1 if name in ("plain.jsonl.gz", "sharegpt.jsonl") else 2)


PAGE = Path(__file__).parents[2] / "docs" / "bring_your_own_data.md"
SECTIONS = [part for part in PAGE.read_text(encoding="utf-8").split("\n## ") if "build_dataset --jsonl_data" in part]


@pytest.mark.parametrize("section", SECTIONS, ids=lambda section: section.splitlines()[0])
def test_the_commands_of_the_page_work(
    base: Path, tmp_path: Path, section: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (name, *_) = re.findall("`(.+?)`", section)
    name = name.replace("*", "part")
    blocks = [textwrap.dedent(block) for block in re.findall(r"(?:^    .*\n?)+", section, re.MULTILINE)]
    command = next(block for block in blocks if block.startswith("srde-ds"))
    Path(name).parent.mkdir(exist_ok=True)
    if name.endswith(".parquet"):
        pq.write_table(pa.Table.from_pylist([json.loads(blocks[0])]), name)
    elif name.endswith(".gz"):
        Path(name).write_bytes(gzip.compress(blocks[0].encode()))
    else:
        Path(name).write_text(blocks[0], encoding="cp1252" if "cp1252" in command else "utf-8")
    arguments = shlex.split(command.replace("\\\n", "").replace("BASE", str(base)))[1:]
    assert main([*arguments, "--max_length", "128"]) == 0
    documents = sum(c.documents for c in load_manifest("data/tokenized").splits["train"].domains.values())
    assert documents == (2 if name == "faq.csv" else 1)


def test_other_names_another_encoding_and_a_domain_are_given_by_flags(base: Path, tmp_path: Path) -> None:
    path = tmp_path / "train.csv"
    path.write_bytes("q;no,frage,antwort\n1,Wie groß?,größer\n".encode("cp1252"))
    how = {"columns": "prompt=frage,response=antwort", "ignore_columns": "q;no", "domain": "law", "domains": None}
    assert main(command(base, tmp_path, jsonl_data=path, encoding="cp1252", **how)) == 0
    manifest = load_manifest(tmp_path / "tokenized")
    assert manifest.domains == ["law"] and manifest.splits["train"].domains["law"].documents == 1


def test_dropped_and_bad_records_are_told_on_the_console(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    long = {"jsonl_data": CASES / "half_too_long.jsonl", "domains": "math,code"}
    assert main(command(base, tmp_path / "long", **long)) == 0
    printed, errors = capsys.readouterr()
    tokens = load_manifest(tmp_path / "long" / "tokenized").splits["train"].domains["math"].response_tokens
    assert [line.split() for line in printed.splitlines() if line.startswith("train  ")] == [
        ["train", domain, "8", "4", "0", str(tokens), "50.0%"] for domain in ("math", "code")
    ]
    for domain in ("math", "code"):
        assert f"srde-ds: train, {domain}: 4 of 8 documents are longer than max_length=128: 4 left out." in errors
    assert "half_too_long.jsonl: 16 records, prompts and responses" in errors
    bad = {"jsonl_data": CASES / "bad_line.jsonl", "domains": "math"}
    fails_with = "bad_line.jsonl:2: field 'response' is empty"
    assert main(command(base, tmp_path / "bad", **bad)) == 2
    assert fails_with in capsys.readouterr().err and not (tmp_path / "bad" / "tokenized").exists()
    assert main(command(base, tmp_path / "bad", **bad, on_bad_record="skip")) == 0
    assert f"1 bad record is left out:\n  {CASES / fails_with}" in capsys.readouterr().err
    assert load_manifest(tmp_path / "bad" / "tokenized").bad_records == 1


def test_bad_records_are_told_a_line_each(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    good, forged = {"prompt": "a", "response": "b"}, "x'\nsrde-ds: forged"
    path = write_jsonl(tmp_path / "train.jsonl", [good, {"prompt": "a", "response": ""}, good | {"domain": forged}])
    report = [
        f"{path}:2: field 'response' is empty.",
        rf"{path}:3: unknown domain 'x'\nsrde-ds: forged', must be one of",
    ]
    assert main(command(base, tmp_path, jsonl_data=path)) == 2
    head, *lines = capsys.readouterr().err.splitlines()[-3:]
    assert head == "srde-ds: error: 2 bad records. Correct them, or give --on_bad_record skip to leave them out:"
    assert all(line.startswith(f"  {fault}") for line, fault in zip(lines, report, strict=True))
    assert main(command(base, tmp_path, jsonl_data=path, on_bad_record="skip")) == 0
    assert "2 bad records are left out:\n  " + report[0] + "\n  " + report[1] in capsys.readouterr().err


def test_a_dry_run_looks_at_the_files(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = {"model_name": base, "output_dir": tmp_path / "run", "max_length": 128, "dry_run": "true"}
    given |= {"warmup_steps": 0, "batch_size": 1, "max_steps": 2}
    bad = flags(given | {"jsonl_data": CASES / "bad_line.jsonl", "domains": "math,code"})
    assert main(["train", *bad]) == 2
    assert "bad_line.jsonl:2: field 'response' is empty." in capsys.readouterr().err
    empty = flags(given | {"jsonl_data": CASES / "table.csv", "domains": "math,code"})
    assert main(["train", *empty]) == 2
    assert "has no record of domain 'code'" in capsys.readouterr().err
    assert main(["train", *flags(given | {"jsonl_data": CASES / "table.csv", "domains": "math"})]) == 0
    assert not (tmp_path / "run").exists()


def test_lost_characters_of_a_source_are_counted_where_a_domain_is_short(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [json.loads(line) for line in (CASES / "source_lost_characters.jsonl").read_text().splitlines()]
    rows += [rows[0] | {"answer": "\udc00"}, rows[0] | {"group": "\udc00"}]
    path = write_jsonl(tmp_path / "lost.jsonl", rows)
    sources = {"math": [{"name": "lost", "jsonl": str(path), "formatter": "messages"}]}
    (tmp_path / "sources.yaml").write_text(yaml.safe_dump(sources))
    short = {"sources_file": tmp_path / "sources.yaml", "examples_per_domain": 5}
    assert main(command(base, tmp_path / "data", **short)) == 2
    told = "math has 1 (left out of lost: broken 3 (lost characters) of 4 rows)"
    assert told in capsys.readouterr().err


def test_how_files_are_read_goes_with_files_only(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    build = ["build_dataset", "--model_name", "x", "--examples_per_domain", "5"]
    fails(capsys, [*build, "--encoding", "gbk"], "encoding=gbk: this option needs --jsonl_data")
    fails(capsys, [*build, "--columns", "prompt"], "columns=prompt: 'prompt' is not KEY=NAME")
    fails(capsys, [*build, "--on_bad_record", "drop"], "on_bad_record='drop': choose one of fail, skip")
    fails(capsys, [*build, "--format", "alpacca"], "format='alpacca': choose one of messages, sharegpt, alpaca")
    fails(capsys, ["train", "--domain", "law", "--domains", "math"], "domain=law: must be one of domains=math")
    for verb, option in (("evaluate", "eval_file"), ("inference", "prompts_file")):
        weights = {"evaluate": "checkpoint", "inference": "srde_weights"}[verb]
        given = [verb, f"--{weights}", str(tmp_path), f"--{option}", str(CASES / "table.csv"), "--format", "alpacca"]
        fails(capsys, given, "format='alpacca': choose one of messages")
