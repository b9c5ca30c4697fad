"""Reports in a browser: charts drawn, items filtered, nothing cut off at the widths of a desktop and of a phone."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import pytest
from playwright.sync_api import Page, expect

from srde_ds.data.build.page import build_page
from srde_ds.evaluation.comparison_page import write_comparison_page
from srde_ds.evaluation.run_page import write_run_page
from srde_ds.pages.render import render
from tests.browser_helpers import DESKTOP, PHONE, cut_off, drawn, sticking_out
from tests.report_helpers import DOMAINS, HOSTILE, item, summary, write_run

Open = Callable[..., Page]
MOST_BYTES = 15e6
BACKGROUND, WHITE, BLACK = "getComputedStyle(document.body).backgroundColor", "rgb(255, 255, 255)", "rgb(20, 23, 27)"
MOST_SECONDS = 60  # 3 where nothing else runs; tests share their machine

_EMPTY_CHARTS = """() => [...document.querySelectorAll('.plot')].filter(plot => {
    const marks = plot.querySelectorAll('.trace path, .point path, .hm image, .heatmaplayer image, .js-line');
    return plot.checkVisibility() && ![...marks].some(mark => mark.getBoundingClientRect().width > 0);
}).map(plot => plot.id)"""


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The address of a page of each kind."""
    folder = tmp_path_factory.mktemp("reports")
    runs = [
        write_run(folder / "first"),
        write_run(folder / "second", options={"muon_lr": "0.5"}, domains=["math", "logic"]),
        write_run(folder / "a_run_whose_name_is_as_long_as_names_become_when_they_hold_all_settings", finished=False),
    ]
    unfinished = write_run(folder / "unfinished", steps=1, finished=False, items=None)
    build = folder / "build.html"
    build.write_text(render(build_page("dataset", summary(), None)), encoding="utf-8")
    paths = {
        "run": write_run_page(runs[0]),
        "unfinished": write_run_page(unfinished),
        "comparison": write_comparison_page(runs, folder / "comparison.html"),
        "build": build,
    }
    return {name: path.as_uri() for name, path in paths.items()}


@pytest.mark.parametrize("kind", ["run", "unfinished", "comparison", "build"])
def test_nothing_is_cut_off_or_empty(pages: dict[str, str], kind: str, open_page: Open) -> None:
    for width, theme, background in ((DESKTOP, "light", WHITE), (PHONE, "dark", BLACK)):
        page = open_page(pages[kind], width=width, offline=True, color_scheme=theme)
        drawn(page)
        assert not cut_off(page) and not sticking_out(page)
        assert page.evaluate(_EMPTY_CHARTS) == []
        assert page.evaluate(BACKGROUND) == background


def test_items_are_filtered_searched_and_turned(pages: dict[str, str], open_page: Open) -> None:
    page = open_page(pages["run"])
    cards, found = page.locator(".item"), page.locator(".found")
    expect(found).to_have_text("9 items")
    page.get_by_role("button", name="logic").click()
    expect(found).to_have_text("3 of 9 items")
    expect(cards).to_have_count(3)
    expect(cards.first.locator(".origin strong")).to_have_text("logic")
    page.get_by_label("experts: right or wrong").select_option("wrong")
    expect(found).to_have_text("1 of 9 items")
    expect(cards.first).to_contain_text("experts ✗ wrong")
    page.get_by_label("base: right or wrong").select_option("right")
    expect(cards.first).to_have_text("No item fits.")
    for name in ("experts", "base"):
        page.get_by_label(f"{name}: right or wrong").select_option("")
    page.get_by_role("button", name="all domains").click()
    page.get_by_label("Search").fill("it is 1.")  # in the experts' answers
    expect(found).to_have_text("3 of 9 items")
    page.get_by_label("Search").fill("IS IT 2")
    expect(found).to_have_text("3 of 9 items")
    page.get_by_label("Search").fill("")
    expect(page.get_by_role("button", name="Next").first).to_be_disabled()


def test_tokens_are_coloured_by_their_experts(pages: dict[str, str], open_page: Open) -> None:
    page = open_page(pages["run"])
    tokens = page.locator(".item").first.locator(".token")
    expect(tokens).to_have_count(3)  # the fourth token was not read
    assert tokens.nth(1).get_attribute("title") == "math 100\N{NO-BREAK SPACE}%"
    colors = tokens.evaluate_all("all => all.map(each => getComputedStyle(each).backgroundColor)")
    assert len(set(colors)) == 2 and "rgba(0, 0, 0, 0)" not in colors
    expect(page.locator(".item").first).to_contain_text("math 55 %")
    tokens.nth(1).click()  # a finger does not hover
    expect(page.locator(".item").first.locator(".mean")).to_have_text("“ is”: math 100 %")
    assert page.locator(".legend .key").all_inner_texts() == [*DOMAINS]


def test_theme_choice_and_paper(pages: dict[str, str], open_page: Open) -> None:
    page = open_page(pages["run"])
    drawn(page)
    bar = page.locator("#chart-0 .point path").last
    light = bar.evaluate("each => getComputedStyle(each).fill")
    page.get_by_role("button", name="Dark theme").click()
    assert page.evaluate(BACKGROUND) == BLACK
    assert bar.evaluate("each => getComputedStyle(each).fill") != light
    page.reload()  # the choice is kept
    drawn(page)
    assert page.evaluate(BACKGROUND) == BLACK
    page.emulate_media(media="print")
    assert page.evaluate(BACKGROUND) == WHITE
    assert not page.locator("nav").is_visible()
    assert page.pdf(format="A4").startswith(b"%PDF")


def test_a_layer_by_layer_map_of_the_chosen_domain(pages: dict[str, str], open_page: Open) -> None:
    page = open_page(pages["run"])
    drawn(page)
    chosen = page.get_by_label("Domain: Experts by layer")
    visible = "select => document.getElementById(select.dataset.chart).data.map(trace => trace.visible)"
    assert chosen.evaluate(visible) == [True, False, False]
    chosen.select_option("code")
    assert chosen.evaluate(visible) == [False, False, True]


def test_the_keyboard_reaches_everything(pages: dict[str, str], open_page: Open) -> None:
    page = open_page(pages["run"], width=PHONE)
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.textContent") == "Skip to the content"
    names = page.evaluate(
        "[...document.querySelectorAll('button, select, input, [role=img]')].filter(each => !each.labels?.length"
        " && !each.textContent.trim() && !each.ariaLabel && !each.getAttribute('aria-labelledby')).length"
    )
    assert names == 0  # nothing without a name
    chip = page.get_by_role("button", name="code")
    chip.focus()
    page.keyboard.press("Enter")
    expect(chip).to_have_attribute("aria-pressed", "true")
    assert page.locator(".found").inner_text() == "3 of 9 items"


def test_hostile_items_are_text(tmp_path: Path, open_page: Open) -> None:
    lines = [item(HOSTILE, 0, text=HOSTILE, experts=1)]
    page = open_page(write_run_page(write_run(tmp_path / "run", domains=[HOSTILE], items=lines)).as_uri())
    drawn(page)
    expect(page.locator(".item .message")).to_contain_text(
        "<img src=x onerror=\"document.title='x'\"></script><script>"
    )
    assert page.title() == "run – Training run" and page.locator("main img").count() == 0
    label = page.locator("#chart-0 g.ytick").last.text_content()
    assert label is not None and label.startswith("<img src=x onerror=")


def test_ten_thousand_items(tmp_path: Path, open_page: Open) -> None:
    words = ["sum", "tree", "of", "seven", "list", "carbon", "if", "then", "plan", "rule"]
    text = " ".join(words[number * number % 10] for number in range(80))
    lines = [item(DOMAINS[number % 3], number, text=f"{number * 7919 % 10007} {text}") for number in range(10_000)]
    path = write_run_page(write_run(tmp_path / "run", items=lines))
    assert path.stat().st_size < MOST_BYTES
    started = time.monotonic()
    page = open_page(path.as_uri())
    expect(page.locator(".found")).to_have_text("10000 items")
    assert time.monotonic() - started < MOST_SECONDS
    assert page.locator(".item").count() == 10  # the others when they are asked for
    page.get_by_role("button", name="Next").first.click()
    expect(page.locator(".place").first).to_have_text("page 2 of 1000")
    page.get_by_role("button", name="code").click()
    expect(page.locator(".found")).to_have_text("3333 of 10000 items")
