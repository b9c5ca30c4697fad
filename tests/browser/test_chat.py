"""The chat's page in a browser."""

from __future__ import annotations

import http.client
import json
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import pytest
from playwright.sync_api import Browser, BrowserContext, Page, expect

from srde_ds.data.inputs import read_records
from srde_ds.inference.generate import Sampling
from srde_ds.inference.page.command import address, listening
from srde_ds.inference.page.visit import STOPPED, ChatPage
from srde_ds.model.adapter import SRDEModel
from tests.browser_helpers import DESKTOP, HEIGHTS, PHONE, collect_errors, cut_off, sticking_out
from tests.data_helpers import tiny_tokenizer
from tests.evaluation_helpers import tiny_model

HOSTILE = "<img src=x onerror=hacked=1>"
NAMES = ["math", HOSTILE, "code"]
ANSWER = "ab <script>hacked=1</script> ${hacked=1} {{value}} 51"
PASSWORD = "a long password"
CONTRAST = """() => {
    const tokens = [...document.querySelectorAll('.token')];
    const canvas = document.createElement('canvas').getContext('2d', {willReadFrequently: true});
    const luminance = colors => {
        for (const color of colors) { canvas.fillStyle = color; canvas.fillRect(0, 0, 1, 1); }
        const [r, g, b] = [...canvas.getImageData(0, 0, 1, 1).data].map(v => v / 255)
            .map(v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
        return 0.2126 * r + 0.7152 * g + 0.0722 * b;
    };
    const behind = element => {
        const colors = [];
        for (let e = element; e; e = e.parentElement) colors.unshift(getComputedStyle(e).backgroundColor);
        return luminance(['white', ...colors]);
    };
    return Math.min(...tokens.map(token => {
        const [a, b] = [luminance([getComputedStyle(token).color]), behind(token)];
        return (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
    }));
}"""


class Speaker:
    """Has a model say a text, and stop for as long as a test wants before it takes its next step."""

    def __init__(self, model: SRDEModel, text: str) -> None:
        tokenizer = tiny_tokenizer()
        self.script = [*tokenizer(text, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
        self.position = 0
        self.steps: int | None = None
        self._changed = threading.Condition()
        model.base.register_forward_hook(self._speak, with_kwargs=True)

    def allow(self, steps: int | None) -> None:
        """Go on for this many forwards; None: to the end."""
        with self._changed:
            self.steps = steps
            self._changed.notify_all()

    def _speak(self, _: Any, __: Any, inputs: dict[str, Any], output: Any) -> None:
        with self._changed:
            self._changed.wait_for(lambda: self.steps != 0, timeout=60)
            self.steps = None if self.steps is None else self.steps - 1
        self.position = 0 if inputs["input_ids"].shape[1] > 1 else self.position + 1
        output.logits[:] = 0
        output.logits[..., self.script[min(self.position, len(self.script) - 1)]] = 99


def _serve(model: SRDEModel, password: str | None) -> Iterator[str]:
    page = ChatPage(model, tiny_tokenizer(), Sampling(100, 0.7, 0.9), seed=1)
    # Loads gradio, which only the worker that runs this file shall wait for.
    from srde_ds.inference.page.server import chat_server

    server = chat_server(page, title="runs/first on a base", password=password, host="127.0.0.2")
    with listening("127.0.0.1", 0) as listener:
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        try:
            yield address(listener)
        finally:
            server.should_exit = True
            thread.join()


@pytest.fixture(scope="module")
def model() -> SRDEModel:
    model = tiny_model()
    model.expert_names = NAMES
    return model


@pytest.fixture(scope="module")
def speaker(model: SRDEModel) -> Speaker:
    return Speaker(model, ANSWER)


@pytest.fixture(scope="module")
def url(model: SRDEModel, speaker: Speaker) -> Iterator[str]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("srde_ds.inference.page.visit.BETWEEN_UPDATES", 0.0)
        yield from _serve(model, None)


@pytest.fixture(autouse=True)
def never_silent(speaker: Speaker) -> Iterator[None]:
    yield
    speaker.allow(None)


@pytest.fixture(scope="module")
def window(browser: Browser) -> Iterator[BrowserContext]:
    """For all pages, so that each file of gradio is fetched and compiled once."""
    context = browser.new_context()
    yield context
    context.close()


@pytest.fixture
def visit(window: BrowserContext) -> Iterator[Callable[..., Page]]:
    """`visit(url, width=..., color_scheme=...)`: a page. In the end none may have told an error or left the host."""
    pages, errors, requests = [], [], []

    def visited(url: str, *, width: int = DESKTOP, color_scheme: Literal["light", "dark"] = "light") -> Page:
        page = window.new_page()
        pages.append(page)
        page.set_viewport_size({"width": width, "height": HEIGHTS[width]})
        page.emulate_media(color_scheme=color_scheme)
        page.set_default_timeout(30_000)
        errors.append(collect_errors(page))
        page.on("request", lambda request: requests.append(request.url))
        page.goto(url, timeout=120_000)  # milliseconds; beside other tests it may take most of a minute
        return page

    yield visited
    for page in pages:
        page.close()
    # Gradio itself aborts the stream of an answer that is over, and what was under way when its page is loaded anew.
    assert not [error for found in errors for error in found if not error.endswith("net::ERR_ABORTED")]
    assert requests and all(r.startswith(("http://127.0.0.1:", "data:", "blob:")) for r in requests)


def _ask(page: Page, question: str) -> None:
    page.get_by_label("Message").fill(question)
    page.get_by_label("Message").press("Enter")


def _answered(page: Page, turns: int = 1) -> None:
    expect(page.locator(".turn .mean")).to_have_count(turns, timeout=30_000)
    expect(page.locator("[aria-busy]")).to_have_count(0, timeout=30_000)


def test_an_answer_is_streamed_beside_the_bases(
    url: str, visit: Callable[..., Page], speaker: Speaker, tmp_path: Path
) -> None:
    page = visit(url)
    expect(page.locator(".legend li")).to_have_text(NAMES)
    expect(page.locator("#conversation")).to_contain_text("No messages yet")
    speaker.allow(4)
    _ask(page, "What is 17 * 3?")
    answers = page.locator(".answer .text")
    expect(answers).to_have_text(["ab <", ""])
    expect(page.locator("[aria-busy] h3")).to_have_text("With experts")
    expect(page.get_by_label("Message")).to_have_value("")
    page.get_by_label("Message").fill("the next one")
    speaker.allow(None)
    expect(answers).to_have_text([ANSWER, ANSWER])
    _answered(page)
    expect(page.get_by_label("Message")).to_have_value("the next one")
    expect(page.locator(".answer h3")).to_have_text(["With experts", "Base alone"])
    assert page.evaluate("typeof hacked") == "undefined" and page.locator("#conversation img").count() == 0

    tokens = page.locator(".answer .token")
    shown = "getComputedStyle(document.activeElement, '::after').content"
    tokens.nth(2).hover()
    hovered = tokens.nth(2).evaluate("token => getComputedStyle(token, '::after').content")
    assert hovered == json.dumps(tokens.nth(2).get_attribute("data-weights")) and "code 0." in hovered
    tokens.nth(0).focus()
    assert page.evaluate(shown) == json.dumps(tokens.nth(0).get_attribute("data-weights"))
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowLeft")
    assert page.evaluate(shown) == json.dumps(tokens.nth(1).get_attribute("data-weights"))

    everywhere = [token.get_attribute("data-weights") for token in tokens.all()]
    page.get_by_label("Layers shown").click()
    page.get_by_role("option", name="layer 1").click()
    expect(tokens.nth(1)).not_to_have_attribute("data-weights", str(everywhere[1]))
    page.keyboard.press("Escape")

    with page.expect_download() as download:
        page.get_by_role("link", name="Export").click()
    assert download.value.suggested_filename == "conversation.json"
    download.value.save_as(tmp_path / "conversation.json")
    (record,) = read_records(tmp_path / "conversation.json", ["math"])
    assert [message["content"] for message in record.messages] == ["What is 17 * 3?", ANSWER]


def test_experts_are_switched_off_and_pinned_and_an_error_ends_nothing(url: str, visit: Callable[..., Page]) -> None:
    page = visit(url)
    page.get_by_label("Show the base's answer beside").uncheck()
    page.get_by_role("checkbox", name=HOSTILE).uncheck()
    _ask(page, "one")
    _answered(page)
    expect(page.locator(".answer h3")).to_have_text("With math, code alone")
    weights = [str(token.get_attribute("data-weights")) for token in page.locator(".answer .token").all()]
    assert any("math" in text for text in weights) and not any("img" in text for text in weights)

    page.get_by_role("checkbox", name="math").uncheck()
    page.get_by_role("checkbox", name="code").uncheck()
    _ask(page, "two")
    expect(page.get_by_role("alert")).to_contain_text("All experts are switched off")
    page.get_by_label("Pin an expert").click()
    page.get_by_role("option", name=HOSTILE).click()
    _ask(page, "three")
    _answered(page, 2)
    expect(page.get_by_role("alert")).to_have_count(0)
    expect(page.locator(".turn h2")).to_have_text(["one", "three"])
    expect(page.locator(".mean").last).to_have_text(f"Mean: {HOSTILE} 1.00")
    page.get_by_role("button", name="New chat").click()
    expect(page.locator(".turn")).to_have_count(0)
    expect(page.locator("#conversation")).to_contain_text("No messages yet")
    expect(page.get_by_role("link", name="Export")).to_have_count(0)


def test_others_wait_in_line_and_a_stopped_answer_makes_room(
    url: str, visit: Callable[..., Page], speaker: Speaker
) -> None:
    first, second = visit(url), visit(url)
    speaker.allow(3)
    _ask(first, "first")
    expect(first.locator(".answer .text").first).to_have_text("ab")
    second.get_by_label("Message").fill("second")
    second.get_by_role("button", name="Send").click()
    expect(second.get_by_text("queue: 1/1")).to_be_visible()
    assert second.locator(".turn").count() == 0
    first.get_by_role("button", name="Stop").click()
    speaker.allow(None)
    expect(first.get_by_role("alert")).to_have_text(STOPPED)
    _answered(second)
    expect(second.locator(".answer .text")).to_have_text([ANSWER, ANSWER])
    _ask(first, "again")
    _answered(first)
    expect(first.locator(".turn h2")).to_have_text("again")

    speaker.allow(3)
    _ask(first, "nobody waits for this answer")
    expect(first.locator("[aria-busy]")).to_be_visible()
    first.close()
    _ask(second, "third")
    speaker.allow(None)
    _answered(second, 2)


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [DESKTOP, PHONE])
def test_the_page_fits_and_can_be_read(url: str, visit: Callable[..., Page], width: int, scheme: str) -> None:
    page = visit(url, width=width, color_scheme=scheme)
    _ask(page, "a long question " * 5)
    _answered(page)
    assert not sticking_out(page) and not cut_off(page)
    boxes = [box.bounding_box() for box in page.locator(".answer").all()]
    assert boxes[0] and boxes[1]
    if width == PHONE:
        assert boxes[1]["y"] >= boxes[0]["y"] + boxes[0]["height"]
    else:
        assert boxes[1]["y"] == boxes[0]["y"] and boxes[1]["x"] >= boxes[0]["x"] + boxes[0]["width"]
    assert page.evaluate(CONTRAST) >= 4.5


def test_other_names_of_the_host_and_uploads_are_refused(url: str) -> None:
    host = url.removeprefix("http://")
    own = [host.replace("127.0.0.1", name) for name in ("127.0.0.1", "localhost", "127.0.0.2")]
    for name, status in (*((name, 200) for name in own), ("evil.example", 400)):
        connection = http.client.HTTPConnection(host, timeout=30)
        connection.request("GET", "/", headers={"Host": name})
        assert connection.getresponse().status == status
        connection.close()
    connection = http.client.HTTPConnection(host, timeout=30)
    body = '--x\r\nContent-Disposition: form-data; name="files"; filename="a"\r\n\r\nsome text\r\n--x--\r\n'
    connection.request("POST", "/gradio_api/upload", body, {"Content-Type": "multipart/form-data; boundary=x"})
    assert connection.getresponse().status == 413
    connection.close()


def test_a_password_is_asked_for(model: SRDEModel, visit: Callable[..., Page]) -> None:
    for url in _serve(model, PASSWORD):
        page = visit(url)
        expect(page.get_by_text("and the chat's password")).to_be_visible()
        assert page.locator("#conversation").count() == 0
        page.get_by_label("username").fill("anybody")
        page.get_by_label("password").fill(PASSWORD)
        page.get_by_role("button", name="Login").click()
        _ask(page, "hi")
        _answered(page)
        given: dict[str, str | float | bool] = {"username": "anybody", "password": "a wrong password"}
        assert page.request.post(f"{url}/login", form=given).status == 400
        stranger = page.context.browser.new_context()  # type: ignore[union-attr]
        for path in ("config", "gradio_api/queue/join", "gradio_api/info"):
            assert stranger.request.get(f"{url}/{path}").status in (401, 404, 405)
        stranger.close()
