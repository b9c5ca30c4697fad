"""A headless Chromium, and what must hold for every page of ours in it."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager

from playwright.sync_api import Browser, Page, expect, sync_playwright

DESKTOP, PHONE = 1280, 390
WIDTHS = (DESKTOP, PHONE)
HEIGHTS = {DESKTOP: 900, PHONE: 844}
PROGRAM = shutil.which("chromium") or shutil.which("chromium-browser")
expect.set_options(timeout=60_000)  # milliseconds; beside other tests, on a slow machine, 20,000 are not always enough
MISSING = "chromium is missing: apt-get install chromium"

_STICKING_OUT = """() => [...document.querySelectorAll('body *')].filter(element => {
    const box = element.getBoundingClientRect();
    if (!box.width || !box.height || box.right <= document.documentElement.clientWidth + 1) return false;
    for (let parent = element.parentElement; parent; parent = parent.parentElement)
        if (getComputedStyle(parent).overflowX !== 'visible') return false;
    return true;
}).map(element => element.outerHTML.slice(0, 120))"""


@contextmanager
def chromium() -> Iterator[Browser]:
    """The distribution's Chromium. Meanwhile this thread has a running event loop: no `asyncio.run` in it."""
    with sync_playwright() as playwright:
        # Without GPU: drawing as if there were one costs a quarter of the time.
        browser = playwright.chromium.launch(executable_path=PROGRAM, args=["--no-sandbox", "--disable-gpu"])
        try:
            yield browser
        finally:
            browser.close()


def collect_errors(page: Page) -> list[str]:
    """A list that grows with what the page reports: console errors, uncaught exceptions, failed requests."""
    errors: list[str] = []
    page.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.on("requestfailed", lambda request: errors.append(f"{request.url[:200]}: {request.failure}"))
    return errors


def sticking_out(page: Page) -> list[str]:
    """Elements wider than the window, apart from those in a box that scrolls or cuts them."""
    return list(page.evaluate(_STICKING_OUT))


def cut_off(page: Page) -> bool:
    """Whether the whole page scrolls sideways."""
    return bool(page.evaluate("document.documentElement.scrollWidth > document.documentElement.clientWidth"))


def drawn(page: Page) -> None:
    """Wait until all charts of a report are drawn and its items are there."""
    page.wait_for_function(
        "[...document.querySelectorAll('.plot')].every(plot => plot.closest('details:not([open])')"
        " || plot.querySelector('.main-svg')) && !document.querySelector('.items:not([data-ready])')"
    )
