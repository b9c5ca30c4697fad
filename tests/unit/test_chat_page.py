"""The chat's page without a browser: what it shows, what it does with settings and errors, who may see it."""

from __future__ import annotations

import base64
import json
import re
import socket
import sys
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch

from srde_ds.cli.main import main
from srde_ds.errors import SRDEError
from srde_ds.inference import session as session_module
from srde_ds.inference.generate import Generation, Sampling, generate
from srde_ds.inference.page.command import PASSWORD, address, is_loopback, listening, page_password
from srde_ds.inference.page.html import UNREAD, View, legend, prompt_html, turn_html
from srde_ds.inference.page.options import ChatOptions
from srde_ds.inference.page.visit import NOTHING_YET, STOPPED, ChatPage, Settings, Shown, Visit
from srde_ds.inference.session import Turn
from srde_ds.model.adapter import SRDEModel
from srde_ds.utils.escape import terminal
from tests.cli_helpers import fails
from tests.data_helpers import tiny_tokenizer
from tests.evaluation_helpers import NAMES, save_model, tiny_model

EVERYTHING = Settings([0, 1, 2], None, True, temperature=0.0, top_p=1.0, max_new_tokens=8, seed=1)
NEEDS_GRADIO = "gradio is not installed: pip install srde-ds[pages]"
HOSTILE = "<script>alert(1)</script> \"'&\x1b[31m${1+1}{{value}}"


class Tags(HTMLParser):
    """The tags of a text and their attributes, and the text beside them."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data

    def tokens(self) -> list[dict[str, str | None]]:
        return [attributes for _, attributes in self.tags if attributes.get("class") == "token"]


def _page(model: SRDEModel | None = None) -> ChatPage:
    return ChatPage(model or tiny_model(), tiny_tokenizer(), Sampling(8))


def _asked(page: ChatPage, visit: Visit, question: str, settings: Settings = EVERYTHING) -> Shown:
    *_, shown = page.ask(visit, question, settings)
    return shown


def _turn(model: SRDEModel) -> Turn:
    answer = generate(model, tiny_tokenizer(), [{"role": "user", "content": "hi"}], Sampling(8, 0.0), show_routing=True)
    answer.token_texts = answer.tokens[answer.prompt_length :]
    return Turn("hi", answer=answer)


def test_each_token_shows_its_experts() -> None:
    model = tiny_model()
    turn = _turn(model)
    assert turn.answer and turn.answer.routing
    for layers in ([], [0], [1]):
        rows = turn.answer.routing.weights_TE(layers)[turn.answer.prompt_length :].tolist()
        tokens = Tags(turn_html(turn, View(NAMES, layers))).tokens()
        assert len(tokens) == len(rows) + 1 == 8
        for row, token in zip(rows, tokens, strict=False):
            best = max(range(3), key=row.__getitem__)
            weights = dict(re.findall(r"(\w+) ([\d.]+)", token["data-weights"] or ""))
            assert weights == {name: f"{p:.2f}" for name, p in zip(NAMES, row, strict=True) if p >= 0.005}
            assert next(iter(weights)) == NAMES[best]
            assert f"--share:{row[best]:.0%}" in (token["style"] or "")
        assert tokens[-1]["data-weights"] == UNREAD
        assert [token["tabindex"] for token in tokens] == ["0"] + ["-1"] * 7
    one, other = (turn_html(turn, View(NAMES, [layer])) for layer in (0, 1))
    assert one != other
    legend_colors = [a["style"] for _, a in Tags(legend(NAMES)).tags if a.get("class") == "swatch"]
    assert len(set(legend_colors)) == 3
    assert all(any((token["style"] or "").startswith(str(color)) for color in legend_colors) for token in tokens[:-1])
    prompt = Tags(prompt_html(turn, View(NAMES))).tokens()
    assert len(prompt) == turn.answer.prompt_length


def test_what_others_wrote_is_shown_as_text() -> None:
    model = tiny_model()
    turn = _turn(model)
    assert turn.answer is not None
    turn.question = HOSTILE
    turn.answer.token_texts[:2] = [HOSTILE, "<b>"]
    turn.base = Generation(HOSTILE, [], 0)
    names = [HOSTILE, "<i>", "code"]
    turn.experts = names[:2]
    shown = turn_html(turn, View(names), note=HOSTILE) + legend(names) + prompt_html(turn, View(names))
    found = Tags(shown)
    allowed = {"section", "h2", "h3", "div", "article", "span", "p", "ul", "li", "details", "summary"}
    assert {tag for tag, _ in found.tags} <= allowed
    assert {name for _, attributes in found.tags for name in attributes} <= {
        *("class", "tabindex", "style", "data-weights", "role", "aria-label"),
    }
    assert found.text.count("<script>alert(1)</script>") == 7 and "\\x1b[31m" in found.text and "\x1b" not in found.text


def test_both_answers_grow_and_are_kept() -> None:
    page = _page()
    visit = page.visit()
    assert NOTHING_YET in page.shown(visit).latest and page.shown(visit).export == ""
    first, *_, last = page.ask(visit, "hi", EVERYTHING)
    assert "hi" in first.latest and first.latest.count("<article") == 2
    assert Tags(first.latest).text == "hiWith expertsBase alone"
    assert last.latest.count("<article") == 2 and "aria-busy" not in last.latest and "<details" in last.latest
    (turn,) = visit.session.turns
    assert turn.answer and turn.base
    for answer in (turn.answer, turn.base):
        assert answer.text and terminal(answer.text) in Tags(last.latest).text
    alone = _asked(page, visit, "more", replace(EVERYTHING, base_beside=False))
    assert alone.latest.count("<article") == 1 and "hi" in alone.past
    link = next(attributes for tag, attributes in Tags(alone.export).tags if tag == "a")
    content = base64.b64decode(str(link["href"]).partition(",")[2]).decode()
    assert content == visit.session.export() and len(json.loads(content)[0]["messages"]) == 4


def test_the_growing_answers_are_marked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("srde_ds.inference.page.visit.BETWEEN_UPDATES", 0.0)
    page = _page()
    shown = [part.latest for part in page.ask(page.visit(), "hi", EVERYTHING)]
    busy = [text.count("aria-busy") for text in shown]
    assert busy[-1] == 0 and set(busy[:-1]) == {1} and len(shown) > 10
    assert {text.count("<article") for text in shown} == {2}


@pytest.mark.parametrize(
    ("settings", "used"),
    [
        (replace(EVERYTHING, experts=[2, 0]), ["math", "code"]),
        (replace(EVERYTHING, experts=[], pinned=1), ["logic"]),
        (EVERYTHING, None),
    ],
)
def test_experts_are_switched_off_and_pinned(settings: Settings, used: list[str] | None) -> None:
    page = _page()
    visit = page.visit()
    title = f"With {', '.join(used)} alone" if used else "With experts"
    assert title in _asked(page, visit, "hi", settings).latest
    assert visit.session.turns[0].experts == used


def test_sampling_follows_the_settings() -> None:
    seen = []

    def fake(model: Any, tokenizer: Any, messages: Any, sampling: Sampling, *, stream: Any, **_: Any) -> None:
        seen.append((sampling, torch.initial_seed()))
        stream(Generation("", [], 0))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(session_module, "generate", fake)
        page = _page()
        _asked(page, page.visit(), "hi", Settings([0], None, False, 0.3, 0.4, 5, 77))
    assert seen == [(Sampling(5, 0.3, 0.4), 77)]


@pytest.mark.parametrize(
    ("question", "settings", "message"),
    [
        ("hi", replace(EVERYTHING, experts=[]), "All experts are switched off"),
        ("", EVERYTHING, "is empty"),
        ("a" * 300, EVERYTHING, "context of 256"),
        ("break", EVERYTHING, "out of memory &lt;b&gt;"),
    ],
)
def test_an_error_is_shown_and_the_next_question_answered(
    question: str, settings: Settings, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = generate

    def breaking(model: Any, tokenizer: Any, messages: Any, *others: Any, **options: Any) -> Generation:
        if messages[-1]["content"] == "break":
            raise RuntimeError("out of memory <b>")
        return real(model, tokenizer, messages, *others, **options)

    monkeypatch.setattr(session_module, "generate", breaking)
    page = _page()
    visit = page.visit()
    shown = _asked(page, visit, question, settings)
    assert message in shown.latest and 'role="alert"' in shown.latest and visit.session.turns == []
    assert "alert" not in _asked(page, visit, "hi").latest and len(visit.session.turns) == 1


def test_a_stopped_answer_is_forgotten() -> None:
    page = _page()
    visit = page.visit()
    growing = page.ask(visit, "hi", replace(EVERYTHING, max_new_tokens=200, temperature=2.0))
    next(growing)
    next(growing)
    growing.close()  # type: ignore[attr-defined]
    assert STOPPED in page.stop(visit).latest and visit.session.turns == []
    _asked(page, visit, "hi")
    assert STOPPED not in page.stop(visit).latest and len(visit.session.turns) == 1


def test_layers_are_chosen_after_the_answer() -> None:
    page = _page()
    visit = page.visit()
    everywhere = _asked(page, visit, "hi")
    chosen = page.choose_layers(visit, [1])
    assert chosen.latest != everywhere.latest
    assert page.choose_layers(visit, []) == everywhere == page.choose_layers(visit, [0, 1])


@pytest.mark.parametrize(
    ("host", "loopback"),
    [("127.0.0.1", True), ("127.8.8.8", True), ("::1", True), ("localhost", True), ("0.0.0.0", False), ("::", False)]
    + [("192.168.1.7", False), ("localhost.example.org", False), ("", False)],
)
def test_other_machines_are_asked_for_a_password(host: str, loopback: bool) -> None:
    assert is_loopback(host) == loopback
    password = page_password(ChatOptions(host=host), {})
    assert (password is None) == loopback
    assert password != page_password(ChatOptions(host=host), {}) or loopback
    assert len(page_password(ChatOptions(host=host, ask_password=True), {}) or "") >= 16


def test_a_password_comes_from_a_file_or_the_environment(tmp_path: Path) -> None:
    (tmp_path / "word").write_text("from the file\n")
    (tmp_path / "short").write_text("short")
    (tmp_path / "binary").write_bytes(b"\xff" * 20)
    assert page_password(ChatOptions(), {PASSWORD: "from outside"}) == "from outside"
    both = ChatOptions(password_file=str(tmp_path / "word"))
    assert page_password(both, {PASSWORD: "from outside"}) == "from the file"
    for file, message in (("short", "has 5 characters"), ("none", "No such file"), ("binary", "no UTF-8")):
        with pytest.raises(SRDEError, match=message):
            page_password(ChatOptions(password_file=str(tmp_path / file)), {})
    with pytest.raises(SRDEError, match=f"{PASSWORD}.*at least 8"):
        page_password(ChatOptions(), {PASSWORD: ""})


def test_an_address_that_is_taken_is_told_before_a_model_is_loaded(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("gradio", reason=NEEDS_GRADIO)
    with listening("127.0.0.1", 0) as taken:
        port = taken.getsockname()[1]
        assert address(taken) == f"http://127.0.0.1:{port}"
        fails(capsys, ["chat", "/nowhere", "--port", str(port)], f"port={port}: cannot listen there", "another --port")
    fails(capsys, ["chat", "/nowhere", "--host", "192.0.2.1"], "cannot listen there")
    fails(capsys, ["chat", "/nowhere", "--port", "70000"], "port=70000: must be at most 65535")
    fails(capsys, ["chat", "/nowhere", "--port", "0"], "no such file or folder")
    fails(capsys, ["chat"], "weights is missing")


def test_the_verb_serves_and_tells_where(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("gradio", reason=NEEDS_GRADIO)
    make = ChatPage.__init__

    def kept(page: ChatPage, *arguments: Any, **options: Any) -> None:
        pages.append(page)
        make(page, *arguments, **options)

    served: list[socket.socket] = []
    pages: list[ChatPage] = []
    monkeypatch.setattr("uvicorn.Server.run", lambda _, sockets: served.extend(sockets))
    monkeypatch.setattr(ChatPage, "__init__", kept)
    weights = str(save_model(tmp_path))
    assert main(["chat", weights, "--port", "0", "--bf16", "false"]) == 0
    printed = capsys.readouterr().out
    assert re.search(r"The chat is at http://127.0.0.1:\d+ \(Ctrl-C", printed) and "password" not in printed
    assert len(served) == 1
    assert main(["chat", weights, "--port", "0", "--ask_password", "--route_by", "prompt"]) == 0
    assert re.search(r"Its password is \S{16}", capsys.readouterr().out)
    assert [page.model.route_by for page in pages] == ["token", "prompt"]
    (tmp_path / "word").write_text("my own word")
    assert main(["chat", weights, "--port", "0", "--password_file", str(tmp_path / "word")]) == 0
    printed = capsys.readouterr().out
    assert "password that you gave" in printed and "my own word" not in printed


def test_a_missing_package_is_named_with_its_remedy(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "gradio", None)
    for name in ("server", "blocks"):
        monkeypatch.delitem(sys.modules, f"srde_ds.inference.page.{name}", raising=False)
    fails(capsys, ["chat", "/nowhere"], "package 'gradio' is missing", "pip install 'srde-ds[pages]'")
