"""The conversation as HTML, with each token in the colour of its experts. All texts are escaped here."""

from __future__ import annotations

import base64
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from srde_ds.inference.session import Turn
from srde_ds.pages.theme import DARK, LIGHT, SHADES
from srde_ds.utils.escape import html, one_line

UNREAD = "no experts yet: the model has not read this token"


@dataclass(frozen=True)
class View:
    """How turns are shown.

    Attributes:
        layers: layers whose mean weights are shown; empty: all.
    """

    expert_names: Sequence[str]
    layers: Sequence[int] = ()


def legend(expert_names: Sequence[str]) -> str:
    """A legend of the experts' colours."""
    items = "".join(
        f'<li><span class="swatch" style="{_color(number)}"></span>{_label(name)}</li>'
        for number, name in enumerate(expert_names)
    )
    return f'<ul class="legend" aria-label="Colours of the experts">{items}</ul>'


def conversation(turns: Iterable[Turn], view: View) -> str:
    """The finished turns."""
    return "".join(turn_html(turn, view) for turn in turns)


def turn_html(turn: Turn, view: View, *, growing: bool = False, note: str = "") -> str:
    """A question and its answers.

    Args:
        growing: whether more will come.
        note: an error, if any.
    """
    answers = []
    if turn.answer is not None or growing:
        title = "With experts" if turn.experts is None else f"With {', '.join(turn.experts)} alone"
        busy = growing and turn.base is None
        answers.append(_box(title, _answer_tokens(turn, view), _mean(turn, view), busy=busy))
    if turn.base is not None or (growing and turn.base_beside):  # at once, so that the other box does not shrink
        text = html(turn.base.text) if turn.base else ""
        answers.append(_box("Base alone", text, "", busy=growing and turn.base is not None))
    warning = f'<p class="note" role="alert">{html(note)}</p>' if note else ""
    return (
        f'<section class="turn"><h2>{html(turn.question)}</h2>'
        f'<div class="answers">{"".join(answers)}</div>{warning}</section>'
    )


def prompt_html(turn: Turn, view: View) -> str:
    """The prompt as the model read it, folded."""
    if turn.answer is None or turn.answer.routing is None:
        return ""
    length = turn.answer.prompt_length
    rows = turn.answer.routing.weights_TE(view.layers)[:length].tolist()
    tokens = _tokens(turn.answer.tokens[:length], rows, view)
    return (
        f'<details class="prompt"><summary>The prompt as the model read it, {length} tokens</summary>'
        f'<div class="text">{tokens}</div></details>'
    )


def download(name: str, content: str) -> str:
    """A link that saves a file. The link contains the file, so that no copy is left on the server."""
    data = base64.b64encode(content.encode("utf-8")).decode()
    return f'<a class="download" download="{html(name)}" href="data:application/json;base64,{data}">Export</a>'


def _box(title: str, content: str, below: str, *, busy: bool) -> str:
    state = ' aria-busy="true"' if busy else ""
    return f'<article class="answer"{state}><h3>{_label(title)}</h3><div class="text">{content}</div>{below}</article>'


def _answer_tokens(turn: Turn, view: View) -> str:
    if turn.answer is None:
        return ""
    if turn.answer.routing is None:
        return html(turn.answer.text)
    rows = turn.answer.routing.weights_TE(view.layers)[turn.answer.prompt_length :].tolist()
    return _tokens(turn.answer.token_texts, rows, view)


def _mean(turn: Turn, view: View) -> str:
    """The mean weights over the answer."""
    if turn.answer is None or turn.answer.routing is None:
        return ""
    weights_TE = turn.answer.routing.weights_TE(view.layers)[turn.answer.prompt_length :]
    if not len(weights_TE):
        return ""
    return f'<p class="mean">Mean: {_weights(weights_TE.mean(0).tolist(), view)}</p>'


def _tokens(token_texts: Sequence[str], rows: Sequence[Sequence[float]], view: View) -> str:
    """Tokens in the colour of the expert with the largest weight; the larger the weight, the stronger the colour.

    The arrow keys move between them, see `style.ARROW_KEYS`, so the tab key stops only at the first.
    """
    spans, stop = [], 0
    for number, piece in enumerate(token_texts):
        if not piece:  # a special token, or a part of a character
            continue
        row = rows[number] if number < len(rows) else None
        first = max(range(len(row)), key=row.__getitem__) if row else 0
        color = f"{_color(first)};--share:{row[first]:.0%}" if row else ""
        weights = _weights(row, view) if row else UNREAD
        spans.append(
            f'<span class="token" tabindex="{stop}" style="{color}" data-weights="{weights}">{html(piece)}</span>'
        )
        stop = -1
    return "".join(spans)


def _weights(row: Sequence[float], view: View) -> str:
    """Such as `math 0.62, code 0.38`: largest first, without those that round to zero."""
    ranked = sorted(zip(row, view.expert_names, strict=True), key=lambda pair: -pair[0])
    return ", ".join(f"{_label(name)} {weight:.2f}" for weight, name in ranked if weight >= 0.005)


def _color(expert: int) -> str:
    light, dark = (theme["series"][expert % SHADES] for theme in (LIGHT, DARK))
    return f"--light:{light};--dark:{dark}"


def _label(name: str) -> str:
    return html(one_line(name))
