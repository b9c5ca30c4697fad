"""Renders a page as HTML: one file that loads nothing and runs only its own scripts."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Iterator, Sequence
from importlib.resources import files

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from srde_ds.errors import SRDEError
from srde_ds.pages import theme
from srde_ds.pages.parts import Chart, Folded, Page, Part
from srde_ds.utils.escape import script_json, terminal

_TEMPLATES = files("srde_ds.pages") / "templates"


def render(page: Page) -> str:
    """Render a page. Its content security policy allows only the page's own scripts, by their hashes."""
    environment = Environment(
        loader=PackageLoader("srde_ds.pages"),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=lambda value: terminal(value) if type(value) is str else value,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["identity"] = id
    parts = [part for section in page.sections for part in _all(section.parts)]
    charts = [part for part in parts if isinstance(part, Chart)]
    scripts = [_plotly_js()] if charts else []
    scripts += [(_TEMPLATES / name).read_text(encoding="utf-8") for name in ("page.js", "items.js")]
    first = (_TEMPLATES / "theme.js").read_text(encoding="utf-8")
    return environment.get_template("page.html.jinja").render(
        page=page,
        numbers={id(chart): number for number, chart in enumerate(charts)},
        script_json=lambda value: Markup(script_json(value)),
        css=Markup((_TEMPLATES / "page.css").read_text(encoding="utf-8")),
        variables=Markup(theme.variables()),
        colors={"light": theme.LIGHT, "dark": theme.DARK},
        first=Markup(first),
        scripts=[Markup(script) for script in scripts],
        hashes=" ".join(f"'sha256-{_hash(script)}'" for script in [first, *scripts]),
    )


def _plotly_js() -> str:
    try:
        from plotly.offline import get_plotlyjs
    except ImportError:
        raise SRDEError(
            "package 'plotly' is missing, which pages need. Install it: pip install 'srde-ds[pages]'"
        ) from None
    return str(get_plotlyjs())


def _hash(script: str) -> str:
    return base64.b64encode(hashlib.sha256(script.encode("utf-8")).digest()).decode()


def _all(parts: Sequence[Part]) -> Iterator[Part]:
    for part in parts:
        yield part
        if isinstance(part, Folded):
            yield from _all(part.parts)
