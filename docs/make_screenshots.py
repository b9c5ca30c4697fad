"""Pictures of a run's page for the README and the documentation: python -m docs.make_screenshots RUN [FOLDER].

They are made by the browser that the tests use; RUN/report.html has to be there (srde-ds report --run RUN).
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Literal

from tests.browser_helpers import DESKTOP, HEIGHTS, PHONE, chromium, collect_errors, drawn

TOP = "the top of the page"
# name of the picture, heading that it begins with, theme, width
PICTURES: list[tuple[str, str, Literal["light", "dark"], int]] = [
    ("summary", TOP, "light", DESKTOP),
    ("summary-dark", TOP, "dark", DESKTOP),
    ("summary-phone", TOP, "light", PHONE),
    ("loss", "Loss", "light", DESKTOP),
    ("experts", "Which experts each domain uses", "light", DESKTOP),
    ("items", "Items", "light", DESKTOP),
    ("items-phone", "Items", "dark", PHONE),
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path)
    parser.add_argument("folder", type=Path, nargs="?", default=Path("docs/picture"), help="gets report-*.png")
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    with chromium() as browser:
        for name, heading, theme, width in PICTURES:
            page = browser.new_page(viewport={"width": width, "height": HEIGHTS[width]}, color_scheme=theme)
            errors = collect_errors(page)
            page.goto((options.run / "report.html").resolve().as_uri())
            drawn(page)
            if heading != TOP:
                page.get_by_role("heading", name=heading, exact=True).evaluate("heading => heading.scrollIntoView()")
            path = options.folder / f"report-{name}.png"
            page.screenshot(path=path, animations="disabled")
            page.close()
            if errors:
                raise SystemExit(f"{path}: the page reports errors: {errors}")
            print(path)


if __name__ == "__main__":
    main()
