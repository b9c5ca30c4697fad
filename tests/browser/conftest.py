"""A headless Chromium for the tests of pages; a test fails if its page reports an error."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Literal

import pytest
from playwright.sync_api import Browser, Page

from tests.browser_helpers import DESKTOP, HEIGHTS, MISSING, PROGRAM, chromium, collect_errors


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    if PROGRAM is None:
        pytest.skip(MISSING)
    with chromium() as started:
        yield started


@pytest.fixture(scope="module")
def tab(browser: Browser) -> Iterator[tuple[Page, list[str]]]:
    """One for all tests of a file, since it keeps the scripts that it has compiled; and what its pages report."""
    context = browser.new_context()
    page = context.new_page()
    yield page, collect_errors(page)
    context.close()


@pytest.fixture
def open_page(tab: tuple[Page, list[str]]) -> Iterator[Callable[..., Page]]:
    """`open_page(url, width=DESKTOP, offline=False, color_scheme="light")`: a page that is visited the first time."""
    page, errors = tab

    def opened(
        url: str, *, width: int = DESKTOP, offline: bool = False, color_scheme: Literal["light", "dark"] = "light"
    ) -> Page:
        page.set_viewport_size({"width": width, "height": HEIGHTS[width]})
        page.emulate_media(color_scheme=color_scheme, media="screen")
        page.context.set_offline(offline)
        page.goto(url, timeout=120_000)  # milliseconds; beside other tests it may take most of a minute
        return page

    yield opened
    page.evaluate("localStorage.clear()")  # it keeps the choice of a theme
    page.goto("about:blank")
    found = errors.copy()
    errors.clear()
    assert not found
