"""What the documentation site takes from outside of docs/: pages, links between the two places, the options of a run.

A hook of mkdocs (mkdocs.yml). The README is the site's first page; other pages of the repository keep their text, too.
A link to a file of the repository that has no page becomes plain text; a link to nothing fails the strict build.
"""

from __future__ import annotations

import dataclasses
import posixpath
import re
import sys
import typing
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from srde_ds.config import Config  # noqa: E402  the package need not be installed

PAGES = {
    "README.md": "index.md",
    "cluster/README.md": "cluster.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "SECURITY.md": "security_policy.md",
}
"""From a path in the repository to one on the site."""
LINK = re.compile(r"(!?)\[([^\]]*)\]\(([^)\s#]+)(#[^)\s]*)?\)|(src|srcset)=\"([^\"#]+)\"")
OPTIONS = "<!-- options -->"


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

    return LINK.sub(relocated, markdown.replace(OPTIONS, options()))


def options() -> str:
    """A table of the options for each section of the configuration."""
    lines = []
    for section in dataclasses.fields(Config):
        kind = type(getattr(Config(), section.name))
        hints = typing.get_type_hints(kind)
        lines += [f"## {section.name}", "", str(kind.__doc__), "", "| Option | Default | |", "|---|---|---|"]
        for field in dataclasses.fields(kind):
            default = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
            default = field.metadata.get("derived") or _written(default)
            text = field.metadata["help"].replace("|", "\\|")
            if typing.get_origin(hints[field.name]) is typing.Literal:
                text += f" ({', '.join(f'`{value}`' for value in typing.get_args(hints[field.name]))})"
            if field.metadata["aliases"]:
                text += f"; also {', '.join(f'`{alias}`' for alias in field.metadata['aliases'])}"
            lines.append(f"| `{field.name}` | {default} | {text} |")
        lines.append("")
    return "\n".join(lines)


def _written(default: Any) -> str:
    """As YAML has it, or none."""
    if isinstance(default, list):
        return ", ".join(default)
    if isinstance(default, bool):
        return str(default).lower()
    return "none" if default is None else str(default)
