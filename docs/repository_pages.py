"""The documentation site's pages that live outside of docs/, and links between the two places.

A hook of mkdocs (mkdocs.yml). The README is the site's first page; other pages of the repository keep their text, too.
A link to a file of the repository that has no page becomes plain text; a link to nothing fails the strict build.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
PAGES = {
    "README.md": "index.md",
    "cluster/README.md": "cluster.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "SECURITY.md": "security_policy.md",
}
"""From a path in the repository to one on the site."""
LINK = re.compile(r"(!?)\[([^\]]*)\]\(([^)\s#]+)(#[^)\s]*)?\)|(src|srcset)=\"([^\"#]+)\"")


def on_files(files: Files, config: Any) -> Files:
    """Add the pages of the repository."""
    for path, page in PAGES.items():
        files.append(File.generated(config, page, abs_src_path=str(ROOT / path)))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Point links at the site's pages."""
    if page.file.src_uri == "index.md":
        page.meta["hide"] = ["navigation"]  # it has no pages beside it
    place = next((path for path, name in PAGES.items() if name == page.file.src_uri), f"docs/{page.file.src_uri}")
    here, there = posixpath.dirname(place), posixpath.dirname(page.file.src_uri)

    def relocated(link: re.Match[str]) -> str:
        image, text, target, anchor, attribute, address = link.groups()
        target = target or address
        if ":" in target:
            return link[0]
        path = posixpath.normpath(posixpath.join(here, target))
        if path in PAGES:
            new = PAGES[path]
        elif path.startswith("docs/"):
            new = path.removeprefix("docs/")
        elif (ROOT / path).exists():
            return text or ""
        else:
            return link[0]
        new = posixpath.relpath(new, there or ".")
        return f'{attribute}="{new}"' if attribute else f"{image}[{text}]({new}{anchor or ''})"

    return LINK.sub(relocated, markdown)
