"""The parts of a page. All texts are plain; `render` escapes them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from srde_ds.utils.tables import Rows


@dataclass(frozen=True)
class Text:
    """A paragraph. `note` highlights what a reader must not miss."""

    text: str
    note: bool = False

    kind = "text"


@dataclass(frozen=True)
class Table:
    """A table whose first row is the header. `numbers`: the first right-aligned column; None: none."""

    rows: Rows
    caption: str = ""
    numbers: int | None = 1

    kind = "table"


@dataclass(frozen=True)
class Chart:
    """A plotly chart.

    Attributes:
        title: what it shows.
        figure: `data` and `layout` from `charts`.
        summary: the content in words, for readers who do not see the chart.
        table: the values, or some of them; None: the page has them elsewhere.
        choices: names of which one is shown at a time, all with equally many traces; empty: all traces are shown.
        choice_label: name of what can be chosen.
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
        packed: the items, packed by `items.pack`.
        count: number of items.
        domains: names, in the order of their numbers in `packed`.
        experts: names, in the order of the shares in `packed`.
        models: names of the models, in the order of their answers in `packed`.
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
    """A heading and the parts below it."""

    title: str
    parts: Sequence[Part]


@dataclass(frozen=True)
class Page:
    """A whole page.

    Attributes:
        kicker: the kind of page, shown above the title.
        lead: a summary in a sentence or two.
        key_figures: label, value and remark of the figures in a row below the lead.
    """

    title: str
    kicker: str
    lead: str
    sections: Sequence[Section]
    key_figures: Sequence[tuple[str, str, str]] = field(default=())
