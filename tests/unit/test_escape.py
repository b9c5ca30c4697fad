"""Text of others: shown, not obeyed, by terminals, Markdown, HTML and matplotlib."""

from __future__ import annotations

import html as entities
import io
import json
import logging
from collections.abc import Sequence
from pathlib import Path

import pytest
from markdown_it import MarkdownIt

from srde_ds.cli.main import VERBS, main
from srde_ds.errors import SRDEError
from srde_ds.evaluation.plots import plot_usage
from srde_ds.evaluation.table import format_tables
from srde_ds.inference.chat import Chat
from srde_ds.utils import escape
from srde_ds.utils.tables import markdown_table

PARSER = MarkdownIt("gfm-like", {"linkify": False})
HOSTILE = [
    "\x1b]0;title\x07\x1b[2J",
    "\r\x08over",
    "\x9b31m",
    "abc\u202edef\u2066",
    "a\u2028b\u200b",
    "\ud800",
    "\U000e0041",
    "a\x00b\x7f",
]  # fmt: skip
MARKS = [
    "[click](javascript:alert(1))",
    "![x](http://example.org/pixel)",
    "<script>alert(1)</script>",
    "<img src=x onerror=alert(1)>",
    "a | b | c",
    "`code` ``x``",
    "**bold** *i* __u__ ~~s~~",
    "&lt;b&gt; &amp;",
    "\\",
    "a\n\n# head\n\n- item",
    "x ]( y ][ z",
    "$\\frac{",
    "end\\",
    "[a]: http://example.org",
]  # fmt: skip


@pytest.mark.parametrize("text", HOSTILE)
def test_control_characters_are_shown(text: str) -> None:
    for shown in (escape.terminal(text), escape.one_line(text), escape.markdown(text), escape.markdown_quote(text)):
        assert all(c.isprintable() for c in shown)
        assert "\\" in shown
    assert json.loads(escape.json_line(json.dumps(text, ensure_ascii=False))) == text
    assert escape.json_line(json.dumps(text, ensure_ascii=False)).isprintable()


@pytest.mark.parametrize("text", ["plain", "Zürich – 東京　です", "a\u00a0b", "👩‍👧 می‌خواهم", "x_y → 2 [+0.1, -0.2]"])
def test_ordinary_text_stays(text: str) -> None:
    assert escape.terminal(text) == escape.one_line(text) == escape.markdown(text) == text
    assert escape.terminal("a\n\tb") == "a\n\tb" and escape.one_line("a\n\tb") == r"a\n\tb"


def _texts(markdown: str) -> list[str]:
    """All text that a page shows; fails where it holds more than paragraphs, quotes and tables of text."""
    kinds = {"inline", "text", "softbreak", "hardbreak", "text_special"}
    parts = ("paragraph", "table", "thead", "tbody", "tr", "th", "td", "blockquote")
    kinds |= {f"{part}_{end}" for part in parts for end in ("open", "close")}
    shown = []
    for token in PARSER.parse(markdown):
        assert token.type in kinds, token
        if token.type == "inline":
            assert {child.type for child in token.children or []} <= kinds, token
            shown.append("".join(child.content or "\n" for child in token.children or []))
    return shown


@pytest.mark.parametrize("text", MARKS)
def test_markdown_is_text(text: str) -> None:
    expected = escape.one_line(text)
    assert _texts(f"Name: {escape.markdown(text)}") == [f"Name: {expected}"]
    table = markdown_table([["name", "value"], [text, "1"], ["2", text]])
    assert _texts(table) == ["name", "value", expected, "1", "2", expected]
    quoted = "\n".join(_texts(escape.markdown_quote(text)))
    assert quoted.split() == text.split()


def test_code_is_text() -> None:
    for text in [*MARKS, *HOSTILE]:
        (inline,) = (token for token in PARSER.parse(f"- {escape.markdown_code(text)}") if token.type == "inline")
        assert [child.type for child in inline.children or []] == ["code_inline"]


def test_errors_and_log_lines_are_escaped(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert main(["\x1b[2Jtrain"]) == 2
    assert capsys.readouterr().err.startswith("srde-ds: error: unknown verb '\\x1b[2Jtrain': choose one of ")

    def verb(arguments: Sequence[str]) -> None:
        logging.getLogger("srde_ds.test").warning("source %s", "\x1b[31mred\nnext")
        raise SRDEError("a\nb\x9b")

    monkeypatch.setitem(VERBS, "test", verb)
    assert main(["test"]) == 2
    assert capsys.readouterr().err == "srde-ds: source \\x1b[31mred\nnext\nsrde-ds: error: a\\nb\\x9b\n"


def test_chat_shows_what_the_model_says() -> None:
    target = io.StringIO()
    chat = Chat.__new__(Chat)
    chat.target = target
    chat.say("\x1b[2Jhello\nthere")
    assert target.getvalue() == "\\x1b[2Jhello\nthere\n"


def test_tables_and_plots_take_any_name(tmp_path: Path) -> None:
    name = "\x1b[2J$\\frac{"
    figures = {"items": 1, "loss": 1.0, "loss_interval": [1, 1], "perplexity": 2.0, "perplexity_interval": [1, 2]}
    figures |= {"accuracy": 1.0, "accuracy_interval": [1, 1], "scored": 1}
    table = format_tables({"domains": {name: {"srde": figures}}, "overall": {"srde": figures}, "sources": {}})
    assert "\x1b" not in table and "\\x1b[2J" in table
    plot_usage({"experts": [name], "domains": [name], "share": [[1.0]]}, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 0


@pytest.mark.parametrize("text", [*HOSTILE, *MARKS])
def test_html_shows_the_text(text: str) -> None:
    shown = escape.html(text)
    assert not set(shown) & set("<>\"'") and entities.unescape(shown) == escape.terminal(text)
    label = escape.plotly_label(text)
    assert not set(label) & set("<>") and entities.unescape(label) == escape.one_line(text)


@pytest.mark.parametrize("text", [*HOSTILE, *MARKS, "</script><!--", "]]>"])
def test_json_does_not_end_its_script(text: str) -> None:
    written = escape.script_json({text: [text]})
    assert not set(written) & set("<>&") and written.isascii()
    assert json.loads(written) == {text: [text]}
