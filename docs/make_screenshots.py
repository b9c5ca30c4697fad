"""Pictures of a run's page for the README and the documentation: python docs/make_screenshots.py RUN [FOLDER].

They are made by the browser that the tests use; RUN/report.html has to be there (srde-ds report --run RUN).
"""

from __future__ import annotations

import argparse
from pathlib import Path

from tests.browser_helpers import DESKTOP, HEIGHTS, PHONE, chromium, drawn

SECTIONS = {"summary": None, "loss": "Loss", "experts": "Which experts each domain uses", "items": "Items"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path)
    parser.add_argument("folder", type=Path, nargs="?", default=Path("docs/picture"), help="gets report-*.png")
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    url = (options.run / "report.html").resolve().as_uri()
    with chromium() as browser:
        for theme, width in (("light", DESKTOP), ("dark", DESKTOP), ("light", PHONE)):
            page = browser.new_page(
                viewport={"width": width, "height": HEIGHTS[width]},
                color_scheme="dark" if theme == "dark" else "light",
            )
            page.goto(url)
            drawn(page)
            for name, section in SECTIONS.items():
                if section is not None:
                    page.evaluate(
                        "title => [...document.querySelectorAll('h2')].find(each => each.textContent === title)"
                        ".scrollIntoView()",
                        section,
                    )
                path = options.folder / f"report-{name}-{theme}-{width}.png"
                page.screenshot(path=path, animations="disabled")
                print(path)


if __name__ == "__main__":
    main()
