"""A headless Chromium for the tests of pages; a test fails if its page reports an error."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
from playwright.sync_api import Browser, Page

from tests.browser_helpers import DESKTOP, HEIGHTS, MISSING, PROGRAM, chromium, collect_errors


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    if PROGRAM is None:
        pytest.skip(MISSING)
    with chromium() as started:
        yield started


@pytest.fixture
def open_page(browser: Browser) -> Iterator[Callable[..., Page]]:
    """`open_page(url, width=DESKTOP, offline=False, **context_options)`: a page in a fresh window."""
    contexts, errors = [], []

    def opened(url: str, *, width: int = DESKTOP, offline: bool = False, **options: object) -> Page:
        context = browser.new_context(
            viewport={"width": width, "height": HEIGHTS[width]},
            offline=offline,
            **options,  # type: ignore[arg-type]
        )
        contexts.append(context)
        page = context.new_page()
        errors.append(collect_errors(page))
        page.goto(url, timeout=120_000)  # milliseconds; beside other tests it may take most of a minute
        return page

    yield opened
    for context in contexts:
        context.close()
    assert not [error for found in errors for error in found]
