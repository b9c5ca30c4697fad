"""What a page is made of. All texts are plain: `render` escapes them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from srde_ds.utils.tables import Rows


@dataclass(frozen=True)
class Text:
    """A paragraph; `note` sets it apart, for what a reader must not miss."""

    text: str
    note: bool = False

    kind = "text"


@dataclass(frozen=True)
class Table:
    """A table; the first row is the header. `numbers`: the first column that is set flush right; None: none."""

    rows: Rows
    caption: str = ""
    numbers: int | None = 1

    kind = "table"


@dataclass(frozen=True)
class Chart:
    """A chart of plotly.

    Attributes:
        title: what it shows.
        figure: `data` and `layout`, as `charts` makes them.
        summary: what is to be seen, in words, for readers who do not see it.
        table: the values, or some of them; none: the page has them elsewhere.
        choices: names of which one is shown at a time, each with as many traces as the others; none: all traces.
        choice_label: what the choices are.
    """

    title: str
    figure: dict[str, Any]
    summary: str
    table: Table | None = None
    choices: Sequence[str] = ()
    choice_label: str = ""

    kind = "chart"


@dataclass(frozen=True)
class Items:
    """Items of an evaluation, or examples of a dataset, to browse.

    Attributes:
        packed: what `items.pack` made of them.
        count: of the items.
        domains: names, in the order of their numbers in `packed`.
        experts: names, in the order of the shares in `packed`.
        models: the names of the models that answered, in the order of their answers in `packed`.
    """

    packed: str
    count: int
    domains: Sequence[str]
    experts: Sequence[str] = ()
    models: Sequence[str] = ()

    kind = "items"


@dataclass(frozen=True)
class Folded:
    """Parts that are shown when a reader opens them."""

    title: str
    parts: Sequence[Part]

    kind = "folded"


Part = Text | Table | Chart | Items | Folded


@dataclass(frozen=True)
class Section:
    """A heading and what stands below it."""

    title: str
    parts: Sequence[Part]


@dataclass(frozen=True)
class Page:
    """A whole page.

    Attributes:
        kicker: what kind of page it is, above the title.
        lead: the page in a sentence or two.
        facts: label, value and a remark, for a row of figures below the lead.
    """

    title: str
    kicker: str
    lead: str
    sections: Sequence[Section]
    facts: Sequence[tuple[str, str, str]] = field(default=())
