"""Reports as pages: what they hold, in which order, and that nothing of the data acts in them."""

from __future__ import annotations

import base64
import gzip
import hashlib
import html
import importlib
import json
import os
import re
import sys
from pathlib import Path
from typing import Any

import pytest

from srde_ds.data.build.page import build_page
from srde_ds.errors import SRDEError
from srde_ds.evaluation.comparison_page import write_comparison_page
from srde_ds.evaluation.report import write_report
from srde_ds.evaluation.run_files import read_metrics
from srde_ds.evaluation.run_page import NOT_EVALUATED, write_run_page
from srde_ds.pages import items as items_module
from srde_ds.pages import theme
from srde_ds.pages.charts import Series, lines
from srde_ds.pages.items import Answer, Item, pack
from srde_ds.pages.render import render
from srde_ds.utils.escape import terminal
from tests.cli_helpers import fails
from tests.report_helpers import HOSTILE, item, summary, write_run

SECTIONS = [
    "Base against experts", "Loss", "Which experts each domain uses", "Tokens by expert", "Gradients and deltas",
    "Speed and memory", "Phases", "Items", "Data and licences", "Settings and versions",
]  # fmt: skip


def headings(page: str) -> list[str]:
    return re.findall(r"<h2[^>]*>(.*?)</h2>", page)


def charts(page: str) -> list[dict[str, Any]]:
    found = re.findall(r'<script type="application/json" id="chart-\d+-data">(.*?)</script>', page)
    return [json.loads(text) for text in found]


def items_of(page: str) -> list[Any]:
    packed = re.search(r'class="packed">(.*?)</script>', page)
    assert packed is not None
    return list(json.loads(gzip.decompress(base64.b64decode(packed[1]))))


def without_scripts(page: str) -> str:
    return re.sub(r"<script>.*?</script>", "", page, flags=re.DOTALL)


def test_the_page_holds_all_of_a_run_in_its_order(tmp_path: Path) -> None:
    path = write_run_page(write_run(tmp_path / "first"))
    page = path.read_text(encoding="utf-8").replace("\N{NO-BREAK SPACE}", " ")
    assert path == tmp_path / "first" / "report.html" and headings(page) == SECTIONS
    assert (
        "3 experts of which each token uses 2, each free to change 1 % of the feed-forward weights, were trained"
        in page
    )
    assert "base a/base on 4,500 documents of 3 domains (math, logic, code)." in page
    assert "Training took 12 steps and 12,000 tokens, with 2 processes on a box." in page
    assert "Of 9 held-out items the base has 33 % right, the experts 67 %." in page
    assert page.count('<div class="plot"') == len(charts(page)) == 11
    assert "Before step 5 the routers were set by a warm start (domain_means)." in page
    for text in (
        "Time line of the phases",
        "McNemar p",
        "pretraining, steps 1 to 4: all experts, density 1 %",
        "train.py --bf16",
    ):
        assert text in page
    assert "are no longer at tokenized" in page
    assert page.count("plotly.js v") == 1 and len(page) < 6e6
    first = items_of(page)[0]
    tokens = ["It", " is", " 0", "."]
    assert first == [
        0,
        "made",
        [["user", "What is it 0?"]],
        "0",
        [["no idea about 0", True], [0, True, tokens, [[33] * 3, [100, 0, 0], [33] * 3]]],
    ]


def test_nothing_is_loaded_and_no_foreign_script_runs(tmp_path: Path) -> None:
    page = write_run_page(write_run(tmp_path / "run")).read_text(encoding="utf-8")
    policy = re.search(r'http-equiv="Content-Security-Policy" content="(.*?)"', page)
    assert policy is not None
    allowed = html.unescape(policy[1])
    assert allowed.startswith("default-src 'none'; script-src 'sha256-")
    scripts = re.findall(r"<script>(.*?)</script>", page, flags=re.DOTALL)
    hashes = [base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() for script in scripts]
    assert re.findall("sha256-(.*?)'", allowed) == hashes and len(hashes) == 4
    assert not re.search(r"<(link|iframe|img|object|base)\b|\ssrc=|@import|url\(", without_scripts(page))


def test_hostile_texts_are_shown_as_text(tmp_path: Path) -> None:
    lines_ = [item(HOSTILE, 0, text=HOSTILE, experts=2), item("<b>", 1, experts=2)]
    lines_[0] |= {"source": HOSTILE, "answer": HOSTILE}
    run = write_run(tmp_path / "a<b>&", domains=[HOSTILE, "<b>"], items=lines_, options={"output_dir": HOSTILE})
    pages = [write_run_page(run), write_comparison_page([run, write_run(tmp_path / "other")], tmp_path / "all.html")]
    built = summary(skipped={HOSTILE: HOSTILE})
    built.domains = {HOSTILE: built.domains["math"], "logic": built.domains["logic"]}
    built.domains[HOSTILE]["example"]["messages"][0]["content"] = HOSTILE
    texts = [*(path.read_text(encoding="utf-8") for path in pages), render(build_page(HOSTILE, built, None))]
    for text in texts:
        text = without_scripts(text)
        assert "<img" not in text and "<b>" not in text and "</script><script>document" not in text
        assert not re.search("[\x1b\u202e\u2028]", text)
        assert r"\x1b[31m \u202e \u2028" in text and "&lt;img src=x" in text
        for figure in charts(text):
            assert "<img" not in json.dumps(figure)  # plotly reads HTML in labels
    assert items_of(texts[0])[0][2] == [["user", f"{terminal(HOSTILE)} 0?"]]


def test_a_run_in_the_middle_of_training_has_a_page(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", steps=3, finished=False, items=None)
    with open(run / "metrics.jsonl", "a") as file:
        file.write('{"step": 4, "lo')
    assert [line["step"] for line in read_metrics(run / "metrics.jsonl")] == [1, 2, 3]
    page = write_run_page(run).read_text(encoding="utf-8")
    assert headings(page) == SECTIONS and page.count(NOT_EVALUATED) == 3
    assert "Training is not finished: so far 3 steps and 3,000 tokens, of 12 steps" in page
    assert "Norm of each expert" not in page  # not measured yet: no empty chart
    assert all(trace["x"] is not None for figure in charts(page) for trace in figure["data"])
    one = write_run(tmp_path / "one", steps=1, finished=False, items=None)
    loss = charts(write_run_page(one).read_text(encoding="utf-8"))[0]
    assert loss["data"][0]["mode"] == "lines+markers"  # of one point there is no line


def test_what_a_run_lacks_is_said(tmp_path: Path) -> None:
    line = item("math", 0)
    del line["base"], line["srde"]["answer_tokens"], line["srde"]["answer_experts"]
    run = write_run(tmp_path / "run", items=[item("math", 0)], domains=["math"])
    result = json.loads((run / "evaluation.json").read_text())
    for figures in (result["overall"], *result["domains"].values(), *result["sources"].values()):
        del figures["base"], figures["difference"]
    (run / "evaluation.json").write_text(json.dumps(result))
    (run / "evaluation_items.jsonl").write_text(json.dumps(line) + "\n")
    page = write_run_page(run).read_text(encoding="utf-8")
    assert "evaluate with --compare_baseline to get both" in page
    assert "are not recorded: only generated answers have them" in page
    assert items_of(page) == [[0, "made", [["user", "What is it 0?"]], "0", [["It is 0.", True]]]]


def test_sources_and_their_licences(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    split = {
        "file": "data.jsonl",
        "file_sha256": "f" * 64,
        "rows": 1,
        "fill_rate": 1.0,
        "content_sha256": "",
        "domains": {},
    }
    manifest: dict[str, Any] = {
        "format_version": 1, "max_length": 8, "too_long": "drop", "seed": 0, "domains": [], "tokenizer": {},
        "splits": {"train": split},
    }  # fmt: skip
    (run / "tokenized").mkdir()
    (run / "tokenized" / "manifest.json").write_text(json.dumps(manifest))
    page = write_run_page(run).read_text(encoding="utf-8")
    assert "ffffffffffffffff" in page and "Files of records do not name a licence" in page
    manifest["sources"] = [{"name": "sums", "domain": "math", "location": "a/sums", "license": "cc-by-4.0"}]
    (run / "tokenized" / "manifest.json").write_text(json.dumps(manifest))
    page = write_run_page(run).read_text(encoding="utf-8")
    assert "<td>cc-by-4.0</td>" in page and "Files of records do not name a licence" not in page


def test_several_runs_are_compared(tmp_path: Path) -> None:
    runs = [
        write_run(tmp_path / "a"),
        write_run(tmp_path / "b", options={"router_lr": "0.5"}),
        write_run(tmp_path / "c", finished=False, items=None),
    ]
    page = write_comparison_page(runs, tmp_path / "out.html").read_text(encoding="utf-8")
    assert headings(page) == [
        "Overview",
        "Settings that differ",
        "Loss",
        "On held-out items",
        "Speed",
        "What was trained",
    ]
    rows = re.findall(r'<th scope="row">(\S+)</th>\s*<td>(.*?)</td>\s*<td>(.*?)</td>\s*<td>(.*?)</td>\s*</tr>', page)
    assert rows == [("router_lr", "0.001", "0.5", "0.001")]
    assert "12, not finished" in page and "Not evaluated yet: c." in page
    assert [trace["name"] for trace in charts(page)[0]["data"]] == ["a", "b", "c"]
    result = json.loads((runs[1] / "evaluation.json").read_text())
    result["run"]["eval_file"] = "others.jsonl"
    (runs[1] / "evaluation.json").write_text(json.dumps(result))
    page = write_comparison_page(runs, tmp_path / "out.html").read_text(encoding="utf-8")
    assert "evaluated on different items (9 of held_out.jsonl, 9 of others.jsonl)" in page
    for run, settings in zip(runs, [{"route_by": "token"}, {"route_by": "prompt"}], strict=False):
        result = json.loads((run / "evaluation.json").read_text())
        result["run"] |= {"items_sha256": "ab"} | settings
        (run / "evaluation.json").write_text(json.dumps(result))
    page = write_comparison_page(runs, tmp_path / "out.html").read_text(encoding="utf-8")
    assert "different items" not in page and "evaluated with different route_by: token, prompt." in page
    result["run"]["items_sha256"] = "cd"
    (runs[1] / "evaluation.json").write_text(json.dumps(result))
    page = write_comparison_page(runs, tmp_path / "out.html").read_text(encoding="utf-8")
    assert "evaluated on different items (9 of held_out.jsonl, 9 of others.jsonl)" in page
    with pytest.raises(SRDEError, match="is given twice"):
        write_comparison_page([runs[0], runs[0] / "metrics.jsonl"], tmp_path / "out.html")


def test_a_build_is_shown_in_the_same_form() -> None:
    page = render(build_page("data", summary(skipped={"gone": "no such dataset"}), None))
    assert headings(page) == [
        "Domains", "What was left out", "Sources and licences", "An example of each domain", "Settings and time",
    ]  # fmt: skip
    for text in (
        "100 conversations in 2 domains",
        "Source gone is missing: no such dataset",
        "<td>mit</td>",
        "near duplicate",
    ):
        assert text in page
    assert len(charts(page)) == 2 and len(items_of(page)) == 2


def test_texts_are_cut_where_a_page_would_become_too_large(monkeypatch: pytest.MonkeyPatch) -> None:
    hashes = [hashlib.sha256(str(number).encode()).hexdigest() for number in range(4000)]
    texts = ["".join(hashes[first : first + 100]) for first in range(0, 4000, 100)]
    many = [Item("math", "s", [("user", text)], None, [Answer(text, None, [text], [[1]])]) for text in texts]
    packed, cut = pack(many, ["math"])
    assert cut is None and str(items_module._row(many[0], {"math": 0}, 20000)[2]) == str([["user", texts[0]]])
    monkeypatch.setattr(items_module, "MOST_BYTES", len(packed) // 4)
    smaller, cut = pack(many, ["math"])
    assert cut is not None and len(smaller) < len(packed) / 2
    row = json.loads(gzip.decompress(base64.b64decode(smaller)))[0]
    assert row[2] == [["user", texts[0][:cut] + " …"]] and len(row[4][0]) == 2  # tokens of a cut answer do not fit it


def test_colours_can_be_told_from_their_background() -> None:
    def luminance(color: str) -> float:
        parts = [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
        return sum(weight * part for weight, part in zip((0.2126, 0.7152, 0.0722), linear, strict=True))

    def contrast(one: str, other: str) -> float:
        low, high = sorted((luminance(one), luminance(other)))
        return (high + 0.05) / (low + 0.05)

    for colors in (theme.LIGHT, theme.DARK):
        for name in ("text", "muted", "accent", "right", "wrong"):
            for background in ("background", "surface"):
                assert contrast(colors[name], colors[background]) >= 4.5, name
        assert contrast(colors["text"], colors["note"]) >= 4.5
        for color in colors["series"]:
            assert contrast(color, colors["background"]) >= 3, color


def test_gaps_stay_gaps() -> None:
    figure = lines([Series("a", [1, 2, 3], [1.0, None, 3.0])], x="step", y="loss")
    assert "NaN" not in json.dumps(figure)


def test_without_plotly_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "plotly", None)
    monkeypatch.delitem(sys.modules, "srde_ds.pages.charts")
    with pytest.raises(SRDEError, match=r"package 'plotly' is missing.*'srde-ds\[pages\]'"):
        importlib.import_module("srde_ds.pages.charts")


def test_separators_of_lines_in_a_text_do_not_end_its_item(tmp_path: Path) -> None:
    text = "a\u2028b\x85c\u2029d"
    run = write_run(tmp_path / "run", domains=["math"], items=[item("math", 0)])
    line = json.dumps(item("math", 0, text=text), ensure_ascii=False)  # as evaluation writes it
    (run / "evaluation_items.jsonl").write_text(f"{line}\n", encoding="utf-8")
    (only,) = items_of(write_run_page(run).read_text(encoding="utf-8"))
    assert only[2] == [["user", r"a\u2028b\x85c\u2029d 0?"]]


def test_losses_that_were_not_finite_leave_a_gap(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    metrics = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    metrics[-1]["held_out"]["math"] = metrics[-1]["loss"] = None  # as training writes a number that is not finite
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in metrics))
    assert "mean of the domains: 4.000 at step 0, – at step 12." in write_run_page(run).read_text(encoding="utf-8")
    page = write_comparison_page([run, write_run(tmp_path / "other")], tmp_path / "all.html")
    assert "Last measured: run –, other 2.000." in page.read_text(encoding="utf-8")
    result = json.loads((run / "evaluation.json").read_text())
    result["run"]["dtype"] = "float32"
    (run / "evaluation.json").write_text(json.dumps(result))
    assert "last training loss not finite." in write_report(run).read_text(encoding="utf-8")


def test_a_domain_may_be_named_all(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", domains=["all", "math"])
    result = json.loads((run / "evaluation.json").read_text())
    result["domains"]["all"]["srde"]["loss"] = 7.0
    (run / "evaluation.json").write_text(json.dumps(result))
    pages = [write_run_page(run), write_comparison_page([run, write_run(tmp_path / "other")], tmp_path / "out.html")]
    for page in pages:
        text = page.read_text(encoding="utf-8")
        assert "all (2)" in json.dumps(charts(text)) and ">7.00 [0.90, 1.10]</td>" in text


@pytest.mark.parametrize("name", ["metrics.jsonl", "environment.json", "evaluation.json", "evaluation_items.jsonl"])
@pytest.mark.parametrize("content", [b"[1]\n", b'"\xff"\n'])
def test_damaged_files_are_named(tmp_path: Path, name: str, content: bytes) -> None:
    run = write_run(tmp_path / "run")
    (run / name).write_bytes(content)
    with pytest.raises(SRDEError, match=rf"{name}': (not UTF-8|(it|each line) must hold a JSON object)"):
        write_run_page(run)


@pytest.mark.parametrize("name", ["metrics.jsonl", "environment.json", "evaluation_items.jsonl"])
def test_what_would_never_end_is_not_read(tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    run = write_run(tmp_path / "run")
    before = (run / name).read_bytes()
    for spoil in (os.mkfifo, Path.mkdir, lambda path: path.symlink_to("/dev/zero")):
        (run / name).unlink()
        spoil(run / name)
        fails(capsys, ["report", str(run)], f"'{run / name}': not an ordinary file")
        (run / name).rmdir() if (run / name).is_dir() else (run / name).unlink()
        (run / name).write_bytes(before)
    (run / name).write_text("[" * 100_000 + "\n")
    fails(capsys, ["report", str(run)], f"'{run / name}': not valid JSON")
    fails(capsys, ["report", str(run / name / "x")], "no such file")


def damaged(run: Path, file: str, *keys: str | int, line: int = 0) -> None:
    """Take one value out of a file of a run."""
    path = run / file
    lines = path.read_text().splitlines()
    content = json.loads(lines[line])
    inner = content
    for key in keys[:-1]:
        inner = inner[key]
    del inner[keys[-1]]
    lines[line] = json.dumps(content)
    path.write_text("\n".join(lines) + "\n")


@pytest.mark.parametrize(
    ("file", "keys", "line", "message"),
    [
        ("metrics.jsonl", ["tokens_per_second"], 3, "the line of step 4: it lacks 'tokens_per_second': train again"),
        ("evaluation.json", ["usage"], 0, "it lacks 'usage': evaluate again"),
        ("evaluation.json", ["usage", "share"], 0, "usage lacks 'share': evaluate again"),
        ("evaluation.json", ["run", "seconds"], 0, "run lacks 'seconds': evaluate again"),
        ("evaluation.json", ["overall", "srde"], 0, "overall lacks 'srde': evaluate again"),
        ("evaluation.json", ["domains", "math", "base", "loss"], 0, "domains.math.base lacks 'loss': evaluate again"),
        ("evaluation.json", ["sources", "made", "difference", "mcnemar_p"], 0, "difference lacks 'mcnemar_p'"),
        ("evaluation_items.jsonl", ["scoring"], 2, "item 3: it lacks 'scoring': evaluate again"),
        ("evaluation_items.jsonl", ["prompt"], 0, "item 1: it lacks 'prompt': evaluate again"),
        ("evaluation_items.jsonl", ["prompt", 0, "content"], 0, "item 1: prompt[0] lacks 'content'"),
        ("evaluation_items.jsonl", ["srde", "correct"], 0, "item 1: srde lacks 'correct': evaluate again"),
    ],
)
def test_what_a_report_needs_and_a_file_lacks_is_named(
    file: str, keys: list[str | int], line: int, message: str, tmp_path: Path
) -> None:
    run = write_run(tmp_path / "run")
    damaged(run, file, *keys, line=line)
    for write in (write_run_page, write_report):
        with pytest.raises(SRDEError, match=re.escape(f"{file}': ") + f".*{re.escape(message)}"):
            write(run)
    assert not (run / "report.html").exists() and not (run / "report.md").exists()


def test_an_environment_that_says_nothing_is_left_out(tmp_path: Path) -> None:
    run, other = write_run(tmp_path / "run"), write_run(tmp_path / "other")
    (run / "environment.json").write_text("{}")
    page = write_run_page(run).read_text(encoding="utf-8").replace("\N{NO-BREAK SPACE}", " ")
    assert "Training took 12 steps and 12,000 tokens." in page and page.count("not recorded") == 5
    text = write_comparison_page([run, other], tmp_path / "all.html").read_text(encoding="utf-8")
    assert "not recorded" in text and "a box" in text
    assert write_report(run).read_text(encoding="utf-8").count("not recorded") == 5
