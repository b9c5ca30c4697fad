"""Charts as plotly data and layout. Names are escaped here; colours are the light ones of `theme`."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from srde_ds.errors import SRDEError
from srde_ds.pages.theme import GREY, LIGHT, color
from srde_ds.utils.escape import plotly_label

try:
    from plotly import graph_objects as go
except ImportError:
    raise SRDEError("package 'plotly' is missing, which pages need. Install it: pip install 'srde-ds[pages]'") from None

LONGEST_NAME = 40  # characters of a name in a chart
FEW = 30  # up to so many points are marked, since a single one makes no line
Values = Sequence[float | None]


@dataclass(frozen=True)
class Series:
    """A line of a chart.

    Attributes:
        x, y: values of the same length; None in `y` leaves a gap.
        marked: draw a dot on each point, if points are few.
        plain: draw the line grey and thin, behind the others.
    """

    name: str
    x: Values
    y: Values
    marked: bool = False
    plain: bool = False


@dataclass(frozen=True)
class Bars:
    """The bars of one model or kind.

    Attributes:
        values: a value for each name of the chart.
        intervals: [low, high] of each value; None: no intervals.
    """

    name: str
    values: Values
    intervals: Sequence[Sequence[float] | None] | None = None
    plain: bool = False


def lines(
    series: Sequence[Series], *, x: str, y: str, from_zero: bool = False, stacked: bool = False
) -> dict[str, Any]:
    """Lines over a common axis; `stacked` ones are shares that add up to 1."""
    figure, number = go.Figure(), 0
    for one in series:
        shade = GREY if one.plain else color(number)
        number += not one.plain
        figure.add_scatter(
            x=np.asarray(one.x),
            y=np.asarray(one.y, dtype=float),
            name=_name(one.name),
            mode="lines+markers" if one.marked or len(one.x) <= FEW else "lines",
            opacity=0.85 if stacked else 1,
            line={"color": shade, "width": 1.2 if one.plain else 0.5 if stacked else 2},
            marker={"color": shade, "size": 6 if one.marked else 4},
            hovertemplate="%{y:.1%}" if stacked else "%{y:.4~g}",
            **({"stackgroup": "all", "fillcolor": shade} if stacked else {}),
        )
    figure.update_layout(hovermode="x unified", xaxis_title=x, yaxis_title=y, showlegend=len(series) > 1)
    if stacked:
        figure.update_yaxes(range=[0, 1], tickformat=".0%")
    elif from_zero:
        figure.update_yaxes(rangemode="tozero")
    return _plain(figure)


def bars(
    names: Sequence[str], groups: Sequence[Bars], *, x: str, stacked: bool = False, form: str = ".3~g"
) -> dict[str, Any]:
    """Horizontal bars, the first name on top; `form` is d3's format of the values."""
    figure, number = go.Figure(), 0
    labels = unique([_name(name) for name in names])
    for group in groups:
        error = None
        if group.intervals is not None:
            pairs = [
                (value - low, high - value) if value is not None and bounds else (0, 0)
                for value, bounds in zip(group.values, group.intervals, strict=True)
                for low, high in [bounds or (0, 0)]
            ]
            below, above = np.clip(np.array(pairs).reshape(-1, 2).T, 0, None)
            error = {"type": "data", "array": above, "arrayminus": below, "thickness": 1.5, "width": 3}
        ends = [
            f" [{format(bounds[0], '.3g')}, {format(bounds[1], '.3g')}]" if bounds else ""
            for bounds in group.intervals or [None] * len(names)
        ]
        figure.add_bar(
            y=labels,
            x=np.asarray(group.values, dtype=float),
            orientation="h",
            name=_name(group.name),
            marker={"color": GREY if group.plain else color(number)},
            error_x=error,
            customdata=ends,
            hovertemplate=f"%{{y}}: %{{x:{form}}}%{{customdata}}",
        )
        number += not group.plain
    figure.update_layout(barmode="stack" if stacked else "group", bargap=0.3, xaxis_title=x, showlegend=len(groups) > 1)
    figure.update_yaxes(autorange="reversed", type="category")
    figure.update_xaxes(tickformat=form)
    return _plain(figure, height=(120 if stacked else 90) + len(names) * (34 if stacked else 18 + 18 * len(groups)))


def heat_maps(
    maps: Sequence[Sequence[Sequence[float]]], *, columns: Sequence[str], rows: Sequence[str], x: str, y: str
) -> dict[str, Any]:
    """Shares as colours on a common scale; the first of several maps is shown."""
    figure = go.Figure()
    highest = max((value for shares in maps for row in shares for value in row), default=1)
    for number, shares in enumerate(maps):
        figure.add_heatmap(
            z=np.round(np.array(shares, dtype=float), 4),
            x=unique([_name(name) for name in columns]),
            y=unique([_name(name) for name in rows]),
            zmin=0,
            zmax=highest,
            visible=number == 0,
            colorscale=LIGHT["scale"],
            colorbar={"tickformat": ".0%", "thickness": 12, "outlinewidth": 0},
            hovertemplate=f"{y} %{{y}}, {x} %{{x}}: %{{z:.1%}}<extra></extra>",
            **({"texttemplate": "%{z:.0%}"} if len(rows) <= 12 and len(columns) <= 12 else {}),
        )
    figure.update_layout(xaxis_title=x, yaxis_title=y)
    figure.update_xaxes(type="category")
    figure.update_yaxes(type="category", autorange="reversed")
    return _plain(figure, height=max(300, 130 + len(rows) * (34 if len(rows) <= 12 else 14)))


def phases(names: Sequence[str], spans: Sequence[tuple[int, int, str]], *, x: str) -> dict[str, Any]:
    """A bar for each span of steps, one below the other: first step, last step, description."""
    figure = go.Figure()
    order = list(dict.fromkeys(names))
    for number, name in enumerate(order):
        own = [span for span, of in zip(spans, names, strict=True) if of == name]
        figure.add_bar(
            y=[_name(name)] * len(own),
            x=[last - first + 1 for first, last, _ in own],
            base=[first - 0.5 for first, _, _ in own],
            orientation="h",
            marker={"color": color(number)},
            customdata=[plotly_label(told) for _, _, told in own],
            hovertemplate="%{customdata}<extra></extra>",
        )
    figure.update_layout(barmode="overlay", xaxis_title=x, showlegend=False, bargap=0.35)
    figure.update_xaxes(range=[0.5, max(last for _, last, _ in spans) + 0.5])
    figure.update_yaxes(autorange="reversed", type="category")
    return _plain(figure, height=110 + 44 * len(order))


def steps(histograms: Mapping[str, tuple[Sequence[float], Sequence[int]]], *, x: str, y: str) -> dict[str, Any]:
    """Histograms, each given by edges and counts, over a logarithmic axis."""
    figure = go.Figure()
    for number, (name, (edges, counts)) in enumerate(histograms.items()):
        figure.add_scatter(
            x=np.asarray(edges, dtype=float),
            y=np.asarray([*counts, 0]),
            name=_name(name),
            mode="lines",
            line={"shape": "hv", "color": color(number), "width": 2},
            hovertemplate="%{y} from %{x:.0f}",
        )
    figure.update_layout(xaxis_title=x, yaxis_title=y, xaxis_type="log", showlegend=len(histograms) > 1)
    figure.update_xaxes(tickvals=[2**power for power in range(25)], tickformat=",")
    figure.update_yaxes(rangemode="tozero")
    return _plain(figure)


def unique(labels: Sequence[str]) -> list[str]:
    """The labels, with a number added to repeated ones, which plotly would draw over each other."""
    found: dict[str, int] = {}
    shown = []
    for label in labels:
        found[label] = found.get(label, 0) + 1
        shown.append(label if found[label] == 1 else f"{label} ({found[label]})")
    return shown


def _name(text: str) -> str:
    shown = text if len(text) <= LONGEST_NAME else f"{text[: LONGEST_NAME - 1]}…"
    return plotly_label(shown) or "(no name)"


def _plain(figure: Any, *, height: int = 360) -> dict[str, Any]:
    figure.update_layout(
        template=go.layout.Template(),
        height=height,
        margin={"l": 8, "r": 8, "t": 8, "b": 8},
        paper_bgcolor="rgba(0,0,0,0)",
        plot_bgcolor="rgba(0,0,0,0)",
        legend={"orientation": "h", "y": 1.02, "yanchor": "bottom", "x": 0, "xanchor": "left", "traceorder": "normal"},
    )
    figure.update_xaxes(automargin=True, showline=True, ticks="outside", ticklen=4)
    figure.update_yaxes(automargin=True, ticklen=4)
    content: dict[str, Any] = json.loads(figure.to_json())
    return content
