"""Files of every kind and form are read rightly, or refused by name, place and remedy."""

from __future__ import annotations

import bz2
import csv
import gzip
import json
import lzma
import os
import shutil
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from srde_ds.data.files import find_files, read_items
from srde_ds.data.inputs import ReadOptions, read_records
from srde_ds.data.records import Record
from srde_ds.data.sources.examples import Example
from srde_ds.data.sources.reading import open_source
from srde_ds.data.sources.registry import Source
from srde_ds.errors import SRDEError
from srde_ds.inference.prompts import read_prompts

CASES = Path(__file__).parents[1] / "fixtures" / "data_cases"
GOOD = {"prompt": "7*8?", "response": "56", "domain": "math"}
TURNS = [{"role": "user", "content": "7*8?"}, {"role": "assistant", "content": "56"}]
JAPANESE = [("日本語 7*8?", "五十六"), ("日本語 7*9?", "六十三")]


def read(path: str | Path, *domains: str, **options: Any) -> list[Record]:
    return list(read_records(path, domains or ("math",), ReadOptions(**options)))


def pairs(records: list[Record]) -> list[tuple[str, str]]:
    """What is asked and answered last."""
    return [(record.messages[-2]["content"], record.messages[-1]["content"]) for record in records]


def write(path: Path, *records: Any) -> Path:
    path.write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in records), encoding="utf-8")
    return path


def refused(path: str | Path, *fragments: str, domains: tuple[str, ...] = ("math",), **options: Any) -> str:
    with pytest.raises(SRDEError) as caught:
        read(path, *domains, **options)
    for fragment in fragments:
        assert fragment in str(caught.value)
    return str(caught.value)


# -- kinds of files --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("bom_crlf.jsonl", JAPANESE),
        ("utf16.jsonl", JAPANESE),
        ("table.csv", JAPANESE),
        ("plain.jsonl.gz", JAPANESE[:1]),
        ("pretty_array.json", [("7*8?", "56"), ("7*9?", "63")]),
        ("array_one_line.json", [("7*8?", "56"), ("7*9?", "63")]),
        ("sharegpt.jsonl", [("7*8?", "56")]),
    ],
)
def test_common_files_are_read(name: str, expected: list[tuple[str, str]]) -> None:
    assert pairs(read(CASES / name)) == expected


@pytest.mark.parametrize("compression", ["", ".gz", ".zst", ".GZ"])
@pytest.mark.parametrize("kind", [".jsonl", ".json", ".csv", ".tsv", ".parquet", ".JSONL", ".Csv"])
def test_each_kind_is_read_plain_and_compressed(tmp_path: Path, kind: str, compression: str) -> None:
    plain = tmp_path / f"plain{kind}"
    records = [{"prompt": q, "response": f'{a},\n"x"', "domain": "math"} for q, a in JAPANESE]
    if kind == ".parquet":
        pq.write_table(pa.Table.from_pylist(records), plain)
    elif kind == ".json":
        plain.write_text(json.dumps(records, indent=1), encoding="utf-8")
    elif kind.lower() in (".csv", ".tsv"):
        with plain.open("w", newline="", encoding="utf-8") as file:
            table = csv.DictWriter(file, list(records[0]), delimiter="\t" if kind == ".tsv" else ",")
            table.writeheader()
            table.writerows(records)
    else:
        write(plain, *records)
    path = plain.with_name(f"data{kind}{compression}")
    how = {"": None, ".gz": "gzip", ".zst": "zstd"}[compression.lower()]
    with pa.output_stream(str(path), compression=how) as file:
        file.write(plain.read_bytes())
    found = read(path)
    assert pairs(found) == [(q, f'{a},\n"x"') for q, a in JAPANESE]
    assert all(record.where.startswith(str(path)) for record in found)


@pytest.mark.parametrize("encoding", ["utf-16", "utf-32", "utf-8-sig"])
@pytest.mark.parametrize("kind", [".jsonl", ".json", ".csv"])
def test_a_byte_order_mark_tells_the_encoding(tmp_path: Path, kind: str, encoding: str) -> None:
    text = "prompt,response\n日本語 7*8?,五十六\n"
    if kind != ".csv":
        record = {"prompt": "日本語 7*8?", "response": "五十六"}
        text = json.dumps([record] if kind == ".json" else record, ensure_ascii=False)
    (tmp_path / f"data{kind}").write_text(text, encoding=encoding)
    assert pairs(read(tmp_path / f"data{kind}")) == JAPANESE[:1]


@pytest.mark.parametrize("encoding", ["utf-16-le", "UTF_16BE", "utf-32-le", "UTF8"])
@pytest.mark.parametrize("kind", [".jsonl", ".json", ".csv", ".txt"])
def test_an_encoding_of_several_bytes_needs_no_mark(tmp_path: Path, kind: str, encoding: str) -> None:
    lines = [f"日本語 \u0a0a\u0d0a {question}" for question in ("7*8?", "7*9?")]  # with bytes of a line feed
    records = [{"prompt": line, "response": "1"} for line in lines]
    text = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
    if kind == ".csv":
        text = "prompt,response\n" + "".join(f"{line},1\n" for line in lines)
    elif kind == ".json":
        text = json.dumps(records, ensure_ascii=False, indent=1)
    (tmp_path / f"data{kind}").write_bytes(text.encode(encoding))
    assert [asked for asked, _ in pairs(read(tmp_path / f"data{kind}", encoding=encoding))] == lines
    (tmp_path / "prompts.txt").write_bytes("\n".join(lines).encode(encoding))
    prompts = read_prompts(tmp_path / "prompts.txt", ReadOptions(encoding=encoding))
    assert [prompt.messages[0]["content"] for prompt in prompts] == lines


def test_another_encoding_is_guessed_and_read_where_it_is_given(tmp_path: Path) -> None:
    message = "gbk.jsonl:1: not UTF-8, looks like GBK: give --encoding gbk and look at the rows."
    assert refused(CASES / "gbk.jsonl").endswith(f"{message} --on_bad_record skip leaves it out.")
    assert read(CASES / "gbk.jsonl", encoding="gbk")[0].messages[0]["content"].startswith("中文")
    refused(CASES / "gbk.jsonl", "encoding=gbq: no such encoding", encoding="gbq")
    for kind, text in ((".csv", "prompt,response\nÀ côté de la fenêtre ?,près\n"), (".json", '["é à è ê ç"]')):
        (tmp_path / f"french{kind}").write_bytes(text.encode("cp1252"))
        refused(tmp_path / f"french{kind}", f"french{kind}' not UTF-8", "--encoding cp1252")
    western = "Où se trouve le café près de l’hôtel ? Schöne Grüße aus Österreich, mañana."
    polish = "Zażółć gęślą jaźń, proszę odpowiedzieć krótko: ile to jest?"
    russian = "Сколько будет два плюс три? Ответ: пять."
    for text, guess in ((western, "cp1252"), (polish, "cp1250"), (russian, "cp1251")):
        line = b'{"prompt": "a", "response": "' + text.encode(guess) + b'"}\n'
        (tmp_path / "lines.jsonl").write_bytes(line * 20)
        refused(
            tmp_path / "lines.jsonl", f"lines.jsonl:1: not UTF-8, looks like {guess.upper()}: give --encoding {guess}"
        )
    line = '{"prompt": "a", "response": "ü"}\n'.encode("cp1252")  # too little to tell
    (tmp_path / "lines.jsonl").write_bytes(line * 20)
    refused(tmp_path / "lines.jsonl", "lines.jsonl:1: not UTF-8: give its encoding, such as --encoding cp1252.")
    chinese = '{"prompt": "中文问题，二加三等于几？", "response": "五"}\n'.encode("gbk")
    for cut in range(3):  # the first 64 KiB end inside of a character, or between two
        (tmp_path / "lines.jsonl").write_bytes(b" " * cut + chinese * 3000)
        refused(tmp_path / "lines.jsonl", ":1: not UTF-8, looks like GBK: give --encoding gbk")
    (tmp_path / "array.json").write_bytes(b'["' + b"a b c " * 20_000 + western.encode("cp1252") * 20 + b'"]')
    refused(tmp_path / "array.json", "array.json' not UTF-8, looks like CP1252")
    # A late line of another encoding: the file's beginning says nothing of it.
    many = write(tmp_path / "mixed.jsonl", *[GOOD] * 2000).read_bytes()
    (tmp_path / "mixed.jsonl").write_bytes(many + ('{"prompt": "' + western + '"}\n').encode("cp1252"))
    refused(tmp_path / "mixed.jsonl", "mixed.jsonl:2001: not UTF-8, looks like CP1252")
    (tmp_path / "noise.jsonl").write_bytes(b'{"prompt": "\xff\xfe\x9d"}\n')
    refused(tmp_path / "noise.jsonl", "noise.jsonl:1: not UTF-8")


def test_a_folder_and_a_pattern_are_all_their_files(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write(tmp_path / "b.jsonl", GOOD)
    write(tmp_path / "A.JSON", [GOOD | {"response": "first"}][0])
    write(tmp_path / ".hidden.jsonl", "{")
    (tmp_path / "README.md").write_text("# read me")
    (tmp_path / "more").mkdir()
    with caplog.at_level("INFO"):
        assert [answer for _, answer in pairs(read(tmp_path))] == ["first", "56"]
    unread = f"not read: README.md, more/. For its folders, give a pattern such as '{tmp_path}/**/*.jsonl'."
    assert caplog.text.count(unread) == 1
    assert len(read(f"{tmp_path}/*.jsonl")) == 1
    assert find_files(f"{tmp_path}/**/*.jsonl", "x") == [tmp_path / "b.jsonl"]
    refused(tmp_path / "more", "more: the folder holds no file of records (.jsonl, ")
    refused(f"{tmp_path}/*.csv", "*.csv: no such file. Give an existing file, a folder or a quoted pattern.")


def test_arrow_files_and_saved_datasets_are_read(tmp_path: Path) -> None:
    data = datasets.Dataset.from_list([GOOD, GOOD | {"response": "fifty-six"}])
    data.save_to_disk(tmp_path / "saved")
    (tmp_path / "saved" / "cache-0.arrow").write_bytes(b"")
    with pa.OSFile(str(tmp_path / "file.arrow"), "wb") as sink, pa.ipc.new_file(sink, data.data.table.schema) as file:
        file.write_table(data.data.table)
    for path in (tmp_path / "saved", tmp_path / "file.arrow"):
        assert [answer for _, answer in pairs(read(path))] == ["56", "fifty-six"]
    datasets.DatasetDict({"train": data}).save_to_disk(tmp_path / "splits")
    refused(tmp_path / "splits", "holds a folder for each split, made by save_to_disk. Give one of them, such as '")


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (bz2.compress(b"{}"), "data.jsonl' is compressed with bzip2, which is not read: unpack it, or use gzip."),
        (lzma.compress(b"{}"), "data.jsonl' is compressed with xz, which is not read"),
        (gzip.compress(b"{}"), "data.jsonl' is compressed with gzip: name it so that it ends in .gz."),
        (b"PK\x03\x04 ", "is a zip archive or a workbook"),
        (b"PAR1 ", "is a Parquet file: name it so that it ends in .parquet."),
    ],
    ids=["bzip2", "xz", "gzip", "zip", "parquet"],
)
def test_files_that_are_not_text_are_refused_as_what_they_are(tmp_path: Path, content: bytes, said: str) -> None:
    (tmp_path / "data.jsonl").write_bytes(content)
    refused(tmp_path / "data.jsonl", said)


@pytest.mark.parametrize(
    ("names", "splits"),
    [
        (("test-00000-of-00001", "train-00000-of-00001", "dev"), {"dev": "validation", "test": "test"}),
        (("train/a", "val/a", "b"), {"val": "validation"}),
        (("train/algebra/a", "test/algebra/a", "test/sums/train-b"), {"test/algebra": "test"}),
        (("latest", "train1", "train2"), {}),
        (("test1", "b"), {}),
        (("train-test", "train"), {}),
    ],
)
def test_names_of_files_tell_splits_as_on_the_hub(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, names: tuple[str, ...], splits: dict[str, str]
) -> None:
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        write(tmp_path / f"{name}.jsonl", GOOD | {"source": name}, GOOD | {"source": name, "split": "test"})
    with caplog.at_level("INFO"):
        found = read(f"{tmp_path}/**/*.jsonl")
    for record in found[::2]:
        assert record.split == next((split for word, split in splits.items() if word in record.source), "train")
    assert {record.split for record in found[1::2]} == {"test"}  # as the record itself says
    assert ("by its name, the split of its records is" in caplog.text) == bool(splits)
    source = Source("own", "math", jsonl=f"{tmp_path}/**/*.jsonl", formatter="by_keys")
    training = sum(record.split == "train" for record in found[::2])
    assert open_source(source, revision=None, seed=0, rows=0).reader.count == 2 * training


def test_pipes_and_devices_are_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.jsonl")
    refused(tmp_path / "pipe.jsonl", "is a pipe or a device, which can be read only once. Save it to a file.")
    refused("/dev/null", "is a pipe or a device")


def test_damaged_files_are_refused_by_name(tmp_path: Path) -> None:
    data = gzip.compress(json.dumps(GOOD).encode() * 50)
    for name, content in (
        ("cut.jsonl.gz", data[:-9]),
        ("no.jsonl.gz", b"plain text"),
        ("no.jsonl.zst", b"plain text"),
        ("no.parquet", b"plain text"),
    ):
        (tmp_path / name).write_bytes(content)
        message = refused(tmp_path / name, f"{name}' cannot be read: ")
        assert "\n" not in message
    for name in ("empty.jsonl", "empty.csv", "empty.json"):
        refused(write(tmp_path / name, " \n" if name != "empty.csv" else "prompt,response"), f"{name}' is empty")
    refused(write(tmp_path / "bad.json", "[{]"), "bad.json: not valid JSON")
    refused(write(tmp_path / "list.json", "[1]"), "list.json: record 1: must be a JSON object, not a number")


def test_tables_name_their_columns_and_rows(tmp_path: Path) -> None:
    refused(write(tmp_path / "a.csv", "prompt,prompt", "a,b"), "a.csv': its first line must name each column")
    refused(write(tmp_path / "b.csv", "prompt,response", "a,b,c"), "b.csv:2: has 3 cells, but the first line names 2")
    refused(write(tmp_path / "c.csv", "messages", "[1"), "c.csv:2: field 'messages' must hold JSON")
    chat = json.dumps(TURNS).replace('"', '""')
    write(tmp_path / "d.csv", "messages,answer,source", f'"{chat}",,hand', "", f'"{chat}",56,')
    first, second = read(tmp_path / "d.csv")
    assert (first.messages, first.answer, first.source) == (TURNS, None, "hand")
    assert (second.answer, second.source) == ("56", "")


def test_a_quote_of_a_tsv_file_without_quoting_is_text(tmp_path: Path) -> None:
    head, film = "prompt\tcontext\tresponse", ['"Inception is what?\t\ta film', 'Who said "\t\tI did']
    write(tmp_path / "a.tsv", head, *film, 'a\tb\tthe "c"', "")
    records = read(tmp_path / "a.tsv", ignore_columns=("context",))
    assert pairs(records) == [('"Inception is what?', "a film"), ('Who said "', "I did"), ("a", 'the "c"')]
    assert [record.where.rpartition(":")[2] for record in records] == ["2", "3", "4"]
    for rows in (['"Inception" is what?\ta "film"', '"a"\tb'], ['"a\tb', "", "c\td", ""]):
        found = pairs(read(write(tmp_path / "b.tsv", "prompt\tresponse", *rows)))
        assert found == [tuple(row.split("\t")) for row in rows if row]


@pytest.mark.parametrize("how", [{}, {"quoting": csv.QUOTE_ALL, "lineterminator": "\n"}, {"lineterminator": "\n"}])
def test_a_quoted_cell_of_a_tsv_file_may_hold_a_table(tmp_path: Path, how: dict[str, Any]) -> None:
    rows = [("ages", "Here it is:\nName\tAge\nBob\t3"), ("say", 'He said:\n"a"'), ('the "b"', "\tc\n\td")]
    with (tmp_path / "a.tsv").open("w", newline="") as file:
        csv.writer(file, delimiter="\t", **how).writerows([("prompt", "response"), *rows])
    assert pairs(read(tmp_path / "a.tsv")) == rows


def test_rows_of_a_tsv_file_with_and_without_quoting_are_refused(tmp_path: Path) -> None:
    head, table, lines = "prompt\tresponse", 'ages\t"Here:\nBob\t3"', 'say\t"a\nb"'
    doubtful = "a.tsv:2: lines 2 to 3 are one row if a quote encloses its cell, and several if it is text"
    refused(write(tmp_path / "a.tsv", head, table), doubtful, "Save the records as CSV or JSONL")
    write(tmp_path / "a.tsv", head, table, lines, 'the "c"\td')
    refused(tmp_path / "a.tsv", "2 bad records")
    assert pairs(read(tmp_path / "a.tsv", on_bad_record="skip")) == [('the "c"', "d")]


def test_a_quote_that_cannot_be_read_is_named_with_its_line(tmp_path: Path) -> None:
    escaped = r'"he said \"hello\"",b'
    refused(write(tmp_path / "a.csv", "prompt,response", "a,b", escaped), "a.csv:3: a quote does not enclose", "JSONL")
    refused(write(tmp_path / "b.tsv", "prompt\tresponse", '"a', "b\tc"), "b.tsv:2: a quote does not enclose its cell")
    refused(write(tmp_path / "b.tsv", "prompt\tresponse", '"a\tb', "c"), "as text it would leave line 3 with 1 cells")


@pytest.mark.parametrize("compression", ["", ".gz"])
def test_tables_of_a_country_with_decimal_commas_have_semicolons(tmp_path: Path, compression: str) -> None:
    text = 'prompt;"response";source\r\n"a; b\n c";0,5;\r\nd;"e, f";hand\r\n'
    path = tmp_path / f"data.csv{compression}"
    with pa.output_stream(str(path), compression="gzip" if compression else None) as file:
        file.write(text.encode("utf-8-sig"))
    first, second = read(path)
    assert pairs([first, second]) == [("a; b\n c", "0,5"), ("d", "e, f")]
    assert (first.where, second.where) == (f"{path}:3", f"{path}:4") and second.source == "hand"
    refused(write(tmp_path / "e.csv", "prompt;response", "a;b;c"), "e.csv:2: has 3 cells, but the first line names 2")


def test_large_files_are_not_held_in_memory(tmp_path: Path) -> None:
    path = write(tmp_path / "many.jsonl.gz")
    with gzip.open(path, "wt") as file:
        file.writelines(json.dumps(GOOD | {"prompt": "x" * 1000}) + "\n" for _ in range(3000))
        file.write("{")
    items = read_items(path)
    assert next(items)[1]["response"] == "56"  # before the last line was looked at
    assert sum(isinstance(item, dict) for _, item in items) == 2999


# -- forms -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("title", "record", "asked", "answer"),
    [
        ("chat messages", {"messages": TURNS}, "7*8?", "56"),
        ("chat messages", {"messages": json.dumps(TURNS)}, "7*8?", "56"),
        ("prompts and responses", {"prompt": "7*8?", "response": "56"}, "7*8?", "56"),
        ("prompts and responses", {"prompt": TURNS[:1], "response": "56"}, "7*8?", "56"),
        ("Alpaca instructions", {"instruction": "Add.", "input": "7, 8", "output": "15"}, "Add.\n\n7, 8", "15"),
        ("Alpaca instructions", {"instruction": "Add.", "input": "", "output": "15"}, "Add.", "15"),
        (
            "ShareGPT conversations",
            {"conversations": [{"from": "human", "value": "7*8?"}, {"from": "gpt", "value": "56"}], "id": "3"},
            "7*8?",
            "56",
        ),
        ("ShareGPT conversations", {"conversations": TURNS}, "7*8?", "56"),
        ("prompts and completions", {"prompt": "7*8?", "completion": "56"}, "7*8?", "56"),
        ("prompts and completions", {"prompt": TURNS[:1], "completion": TURNS[1:]}, "7*8?", "56"),
        ("questions and answers", {"question": "7*8?", "answer": "56"}, "7*8?", "56"),
        (
            "multiple choice",
            {"question": "Red?", "choices": ["a", "b"], "answer": 1},
            "Red?\nA. a\nB. b",
            "B. b\nAnswer: B",
        ),
    ],
)
def test_forms_are_told_by_their_keys(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, title: str, record: dict[str, Any], asked: str, answer: str
) -> None:
    path = write(tmp_path / "train.jsonl", record, record)
    with caplog.at_level("INFO"):
        assert pairs(read(path)) == [(asked, answer)] * 2
    assert caplog.messages == [f"{path}: 2 records, {title}"]


def test_a_response_that_is_the_whole_conversation_repeats_no_question(tmp_path: Path) -> None:
    asked, answer = {"role": "user", "content": "7*8?"}, {"role": "assistant", "content": "56"}
    for prompt in ("7*8?", [asked], [{"from": "user", "value": "7*8?"}]):
        record = {"prompt": prompt, "chosen": [asked, answer], "rejected": []}
        options = {"columns": {"response": "chosen"}, "ignore_columns": ("rejected",)}
        assert pairs(read(write(tmp_path / "data.jsonl", record), **options)) == [("7*8?", "56")]
    record = {"prompt": "9*8?", "response": [asked, answer]}
    refused(write(tmp_path / "data.jsonl", record), "begins with a turn of the user or system that is not the prompt's")


def test_a_turn_that_says_two_things_is_refused(tmp_path: Path) -> None:
    turn = {"from": "human", "value": "7*8?", "content": "7*9?"}
    record = {"conversations": [turn, {"from": "gpt", "value": "56"}]}
    refused(write(tmp_path / "data.jsonl", record), "a turn has both 'value' and 'content', which differ")


def test_files_that_seem_to_be_held_out_are_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for name in ("sft", "ood_tests"):
        write(tmp_path / f"{name}.jsonl", {"prompt": name, "response": "b"})
    assert all(record.split == "train" for record in read(tmp_path))
    assert caplog.text.count(f"{tmp_path / 'ood_tests.jsonl'}: trained on, although the name says") == 1
    caplog.clear()
    list(read_records(tmp_path, ("math",), option="eval_file"))
    assert "trained on" not in caplog.text


def test_an_alpaca_input_without_an_instruction_is_no_question(tmp_path: Path) -> None:
    path = write(tmp_path / "train.jsonl", {"instruction": " ", "input": "7, 8", "output": "15"})
    refused(path, "train.jsonl:1: field 'instruction' is empty")


@pytest.mark.parametrize(
    ("record", "fault"),
    [
        ({"instruction": "a", "output": ""}, "field 'output' is empty"),
        ({"instruction": "a"}, "field 'output' is missing"),
        ({"instruction": "a", "output": "b", "history": [["c", 1]]}, "field 'history' must be text, not a number"),
        ({"question": "a", "answer": 42}, "field 'answer' must be text, not a number"),
        ({"question": {"a": 1}, "answer": "b"}, "field 'question' must be text, not an object"),
        ({"prompt": "a", "completion": "\ud83d"}, "field 'completion' holds half a surrogate pair: write the whole"),
        ({"prompt": TURNS[:1], "completion": 1}, "field 'completion' must be text, not a number"),
    ],
)
def test_a_fault_is_told_by_the_key_that_the_file_has(tmp_path: Path, record: dict[str, Any], fault: str) -> None:
    refused(write(tmp_path / "train.jsonl", record), f"train.jsonl:1: {fault}")


def test_an_alpaca_history_comes_before(tmp_path: Path) -> None:
    record = {"instruction": "c", "output": "d", "history": [["a", "b"]]}
    (found,) = read(write(tmp_path / "train.jsonl", record))
    assert [message["content"] for message in found.messages] == ["a", "b", "c", "d"]
    refused(write(tmp_path / "train.jsonl", record | {"history": ["a"]}), "field 'history' must be a list of pairs")


@pytest.mark.parametrize(
    ("changes", "letter"),
    [
        ({"answer": "b"}, "A"),
        ({"answer": "B"}, "B"),
        ({"answer": 1}, "B"),
        ({"answer": "1"}, "B"),
        ({"answerKey": "b "}, "B"),
        ({"label": 0}, "A"),
        ({"choices": {"text": ["b", "a"], "label": ["1", "2"]}, "answerKey": "1"}, "A"),
        ({"choices": {"text": ["b", "a"], "label": [1, 2]}, "answerKey": 1}, "A"),
        ({"choices": {"1": "b", "2": "a"}, "answer": 1}, "A"),
        ({"choices": {"X": "b", "Y": "a"}, "answer": "Y"}, "B"),
        ({"choices": {"X": "b", "Y": "a"}, "answer": 1}, "B"),
        ({"label": 1.0}, "B"),
        ({"choices": {"text": ["b", "a"], "label": [1.0, 2.0]}, "answerKey": 1}, "A"),
        ({"choices": {"text": ["b", "a"], "label": [" A", " B"]}, "answerKey": "A"}, "A"),
        ({"choices": {"text": ["C", "Co", "Cp"], "label": ["A", "B", "C"]}, "answerKey": "C"}, "C"),
        ({"choices": {"A": "B", "B": "A"}, "answer": "A"}, "A"),
        ({"choices": {"1": "2", "2": "1"}, "answer": "2"}, "B"),
        ({"choices": ["C", "Co", "Cp"], "answer": 2}, "C"),
        ({"choices": ["a", "b"], "answer": "b"}, "B"),
    ],
)
def test_the_right_choice_is_named_in_any_usual_way(tmp_path: Path, changes: dict[str, Any], letter: str) -> None:
    record = {"question": "Red?", "choices": ["b", "a"]} | changes
    (found,) = read(write(tmp_path / "data.jsonl", record))
    assert found.answer == letter and found.messages[-1]["content"].endswith(f"Answer: {letter}")


@pytest.mark.parametrize(
    ("record", "message"),
    [
        (
            {"question": "a", "choices": ["b", "c"], "answer": "z"},
            "field 'answer' is \"z\": it must be one of the ch",
        ),
        (
            {"question": "a", "choices": ["C", "Co", "Cp"], "answer": "C"},
            "field 'answer' is \"C\", which is the text of one choice and the letter of another: give its number",
        ),
        (
            {"question": "a", "choices": ["4", "3", "1", "0"], "answer": "1"},
            "field 'answer' is \"1\", which is the text of one choice and the number of another: give its letter",
        ),
        ({"question": "a", "choices": ["b", "c"], "answer": 2}, "its letter (A to B) or its number (0 to 1)"),
        ({"question": "a", "choices": {"1": "b", "2": "c"}, "answer": 0}, "one of the choices, its label (1 to 2)."),
        (
            {"question": "a", "choices": {"1)": "b", "2)": "c"}, "answer": 1},
            "one of the choices, its label (1) to 2)).",
        ),
        (
            {"question": "a", "choices": {"text": ["b", "c"], "label": ["A", "A"]}, "answer": "A"},
            "one of the choices, its label (A to A).",
        ),
        ({"question": "a", "choices": ["b", "c"], "answer": True}, "field 'answer' is true: it must be one"),
        ({"question": "a", "choices": ["b", "c"]}, "field 'answer' is missing"),
        ({"question": "a", "choices": ["b", 1], "answer": 1}, "field 'choices' must hold texts"),
        ({"question": "a", "choices": ["b"], "answer": 0}, "an option is missing"),
        ({"question": "a", "choices": ["b", "c"], "options": [], "answer": 0}, "has several of choices, options"),
        ({"question": "a", "choices": ["b", "c"], "answer": 0, "context": ["d"]}, "'context' must be text, not a list"),
        ({"question": "a", "choices": ["b", "c"], "answer": 0, "rationale": {}}, "'rationale' must be text, not an ob"),
        ({"question": "a"}, "field 'answer' is missing"),
        ({"instruction": "a"}, "field 'output' is missing"),
        ({"instruction": "a", "input": 1, "output": "b"}, "field 'input' must be text, not a number"),
        ({"conversations": ["a"]}, "field 'conversations' must be a list of objects with 'from' and 'value'"),
        ({"messages": "[{"}, "field 'messages' is not valid JSON"),
        ({"text": "a"}, "It has 'text': give --columns, such as prompt=question,response=reply."),
        ({"text": "a"}, "needs 'prompt' and 'response', or 'messages', or the keys of another form: messages; conv"),
        (GOOD | {"respnse": 1}, "unknown key 'respnse' in a record of the form prompt_response, which has prompt, res"),
        (GOOD | {"respnse": 1}, "Did you mean 'response'? Map it to a known key with --columns KEY=respnse, or"),
        (GOOD | {"respnse": 1}, "leave it out with --ignore_columns respnse."),
        (GOOD | {"prompt": "\ud83d"}, "field 'prompt' holds half a surrogate pair"),
    ],
)
def test_what_a_form_does_not_know_is_refused_by_name(tmp_path: Path, record: dict[str, Any], message: str) -> None:
    path = write(tmp_path / "data.jsonl", record)
    assert refused(path, message).startswith(f"{path}:1: ")


def test_a_column_may_stand_for_several_keys(tmp_path: Path) -> None:
    names = {"prompt": "text", "answer": "label", "response": "label"}
    (found,) = read(write(tmp_path / "a.jsonl", {"text": "7*8?", "label": "56"}), columns=names)
    assert (found.answer, found.messages[-1]["content"]) == ("56", "56")


def test_columns_are_renamed_and_left_out(tmp_path: Path) -> None:
    record = {"q": "7*8?", "response": "long", "reply": "56", "topic": "math", "id": 3, "note": "x", "extra": None}
    path = write(tmp_path / "data.jsonl", record)
    names = {"prompt": "q", "response": "reply", "domain": "topic"}
    refused(path, "'reply' is to be 'response', but the record already has a 'response'", columns=names)
    refused(path, "unknown key 'note'", columns=names, ignore_columns=("response",))
    for ignored in (("response", "note"), ("response", "*")):
        (found,) = read(path, "math", "code", columns=names, ignore_columns=ignored)
        assert pairs([found]) == [("7*8?", "56")] and found.domain == "math"
    refused(path, "columns: no record of", "has 'qq'", columns=names | {"prompt": "qq"}, ignore_columns=("*",))


def test_a_form_can_be_named(tmp_path: Path) -> None:
    both = {"question": "a", "answer": "b", "prompt": "c", "response": "d"}
    path = write(tmp_path / "data.jsonl", both)
    (found,) = read(path, format="question_answer", ignore_columns=("*",))
    assert pairs([found]) == [("a", "b")]
    refused(path, "unknown key 'question' in a record of the form prompt_response")
    refused(path, "format=alpacca: choose one of messages, ", format="alpacca")


def test_records_of_one_domain_need_not_name_it(tmp_path: Path) -> None:
    unnamed = {"prompt": "a", "response": "b"}
    path = write(tmp_path / "data.jsonl", unnamed, GOOD | {"domain": "code"})
    assert [record.domain for record in read(path, "math", "code", domain="math")] == ["math", "code"]
    refused(path, ":1: field 'domain' is missing. For records of one domain, give --domain.", domains=("math", "code"))
    refused(path, ":2: unknown domain 'code', must be one of math")
    assert read(write(tmp_path / "data.jsonl", unnamed))[0].domain == "math"


def test_the_keys_that_parquet_adds_to_an_object_are_not_there(tmp_path: Path) -> None:
    def record(name: str, arguments: dict[str, Any]) -> dict[str, Any]:
        kinds = {key: {"type": "string", "enum": ["a", None]} for key in arguments}
        call = {"id": "c", "type": "function", "function": {"name": name, "arguments": arguments}}
        turns = [TURNS[0], {"role": "assistant", "content": "", "tool_calls": [call]}, *TURNS]
        return {"messages": turns, "tools": [{"name": name, "parameters": {"type": "object", "properties": kinds}}]}

    rows = [record("weather", {"city": "Paris"}), record("mail", {"to": "Ann", "body": "Hi"})]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "data.parquet")
    datasets.Dataset.from_list(rows).save_to_disk(tmp_path / "saved")
    saved = Source("own", "math", folder=str(tmp_path / "saved"), formatter="by_keys")
    found = [(one.messages, one.tools) for one in read(tmp_path / "data.parquet")]
    reader = open_source(saved, revision=None, seed=0, rows=0).reader
    made = [one for one in reader.examples(0, 2) if isinstance(one, Example)]
    assert [(one.messages, one.more["tools"]) for one in made] == found
    for (messages, tools), row in zip(found, rows, strict=True):
        assert messages[1]["tool_calls"] == row["messages"][1]["tool_calls"]
        assert tools is not None and tools[0]["function"] == row["tools"][0]
    null = write(tmp_path / "data.jsonl", record("weather", {"city": None}))
    assert read(null)[0].messages[1]["tool_calls"][0]["function"]["arguments"] == {"city": None}  # as it was written


# -- bad records -----------------------------------------------------------------------------------------------------


def test_all_bad_records_are_told_at_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    lines = [GOOD, *("{" if number % 2 else GOOD | {"response": ""} for number in range(25)), "[" * 100_000, GOOD]
    path = write(tmp_path / "data.jsonl", *lines)
    report = refused(path).splitlines()
    assert report[0] == "26 bad records. Correct them, or give --on_bad_record skip to leave them out:"
    assert report[1] == f"  {path}:2: field 'response' is empty." and f"{path}:3: not valid JSON" in report[2]
    assert len(report) == 22 and report[-1] == "  and 6 more"
    assert pairs(read(path, on_bad_record="skip")) == [("7*8?", "56")] * 2
    assert "26 bad records are left out:" in caplog.text and "and 6 more" in caplog.text


# -- prompts ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["prompts_bom.txt", "prompts_array.json", "PROMPTS_UPPER.JSONL"])
def test_prompts_are_read_as_what_they_are(name: str) -> None:
    prompts = read_prompts(CASES / name)
    assert prompts[0].messages == [{"role": "user", "content": "What is 7*8?"}]
    assert len(prompts) == (1 if name == "PROMPTS_UPPER.JSONL" else 2)


def test_prompts_of_each_form_are_asked_without_their_answer(tmp_path: Path) -> None:
    records = [
        {"prompt": "a", "response": "no", "answer": "no"},
        {"instruction": "b", "input": "c"},
        {"conversations": [{"from": "human", "value": "d"}, {"from": "gpt", "value": "no"}]},
        {"question": "e"},
        {"question": "f", "choices": ["g", "h"]},
        {"prompt": "i", "completion": "no"},
    ]
    found = [prompt.messages for prompt in read_prompts(write(tmp_path / "p.jsonl", *records))]
    assert [turn["content"] for (turn,) in found] == ["a", "b\n\nc", "d", "e", "f\nA. g\nB. h", "i"]


def test_bad_prompts_are_told_with_their_place(tmp_path: Path) -> None:
    with pytest.raises(SRDEError, match=r"prompts_surrogate.jsonl:1: field 'prompt' holds half a surrogate pair"):
        read_prompts(CASES / "prompts_surrogate.jsonl")
    path = write(tmp_path / "p.jsonl", {"prompt": 1}, "{", {"prompt": "a"})
    with pytest.raises(SRDEError, match="2 bad records"):
        read_prompts(path)
    assert len(read_prompts(path, ReadOptions(on_bad_record="skip"))) == 1
    (tmp_path / "gbk.txt").write_bytes("七乘以八等于多少？这个问题的答案是什么？".encode("gbk"))
    with pytest.raises(SRDEError, match="gbk.txt:1: not UTF-8, looks like GBK: give --encoding gbk"):
        read_prompts(tmp_path / "gbk.txt")
    shutil.copy(tmp_path / "gbk.txt", tmp_path / "again.txt")
    assert read_prompts(tmp_path / "again.txt", ReadOptions(encoding="gbk"))[0].messages[0]["content"][:2] == "七乘"
