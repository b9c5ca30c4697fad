"""Pictures of the chat with a run for the README and the documentation:
python -m docs.make_chat_screenshots RUN [FOLDER] [--base BASE].

They are made by the browser that the tests use.
"""

from __future__ import annotations

import argparse
import threading
from pathlib import Path
from typing import Literal

from playwright.sync_api import Browser, expect

from srde_ds.inference.generate import Sampling
from srde_ds.inference.load import load_model
from srde_ds.inference.options import ModelOptions
from srde_ds.inference.page.command import address, listening
from srde_ds.inference.page.server import chat_server
from srde_ds.inference.page.visit import ChatPage
from tests.browser_helpers import DESKTOP, HEIGHTS, PHONE, chromium

QUESTION = "Calculate 7 * 5."
SLOWEST_ANSWER = 300_000  # milliseconds
# name of the picture, theme, width
PICTURES: list[tuple[str, Literal["light", "dark"], int]] = [
    ("chat", "light", DESKTOP),
    ("chat-dark", "dark", DESKTOP),
    ("chat-phone", "light", PHONE),
]


def take(browser: Browser, url: str, path: Path, theme: Literal["light", "dark"], width: int) -> None:
    page = browser.new_page(viewport={"width": width, "height": HEIGHTS[width]}, color_scheme=theme)
    page.goto(url)
    page.get_by_label("Message").fill(QUESTION)
    page.get_by_label("Message").press("Enter")
    expect(page.get_by_role("link", name="Export")).to_be_visible(timeout=SLOWEST_ANSWER)
    page.locator(".answer .token").first.hover()
    page.screenshot(path=path, animations="disabled")
    page.close()
    print(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path)
    parser.add_argument("folder", type=Path, nargs="?", default=Path("docs/picture"), help="gets chat*.png")
    parser.add_argument("--base", help="where the base is, if it has moved")
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    model, tokenizer = load_model(ModelOptions(options.run, options.base, bf16=False))
    chat = ChatPage(model, tokenizer, Sampling(60, temperature=0.0), seed=0)
    title = f"{options.run} on {Path(str(model.base_identity['name'])).name}"
    server = chat_server(chat, title=title, password=None)
    with listening("127.0.0.1", 0) as listener, chromium() as browser:
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        try:
            for name, theme, width in PICTURES:
                take(browser, address(listener), options.folder / f"{name}.png", theme, width)
        finally:
            server.should_exit = True
            thread.join()


if __name__ == "__main__":
    main()
