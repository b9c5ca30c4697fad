"""Draws docs/picture/srde.svg, the picture of the README, and docs/picture/logo.svg: python docs/make_picture.py

Each picture brings its own background, so that it can be read on light and dark pages.
"""

from __future__ import annotations

from pathlib import Path

FOLDER = Path(__file__).with_name("picture")
EXPERTS = {"math": 0.7, "logic": 0.0, "code": 0.3, "science": 0.0, "planning": 0.0, "abstract": 0.0}
COLOURS = ("#2f6fdb", "#8b5cf6", "#d9822b", "#0f9d77", "#d6457a", "#6b7a90")
WIDTH, HEIGHT = 860, 372
BASE = (150, 248, 560, 66)  # x, y, width, height of the base's block
NEURONS, SUPPORT = 56, (5, 21, 34, 48)
STYLE = """
  .card { fill: #f7f9fc; } .box { fill: #ffffff; stroke: #8794a8; } .neuron { fill: #b4bfce; }
  text { fill: #1f2937; font-family: system-ui, 'DejaVu Sans', sans-serif; font-size: 14px; }
  .note { fill: #56637a; font-size: 12.5px; } .bold { font-weight: 600; } .arrow { stroke: #56637a; fill: none; }
  .head { fill: #56637a; }
  @media (prefers-color-scheme: dark) {
    .card { fill: #161b26; } .box { fill: #212939; stroke: #66758d; } .neuron { fill: #4b586d; }
    text { fill: #e6ebf3; } .note { fill: #a5b1c4; } .arrow { stroke: #a5b1c4; } .head { fill: #a5b1c4; }
  }
"""


def box(x: float, y: float, width: float, height: float, kind: str = "box", extra: str = "") -> str:
    return f'<rect class="{kind}" x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" rx="8" {extra}/>'


def text(x: float, y: float, words: str, kind: str = "", anchor: str = "middle") -> str:
    return f'<text class="{kind}" x="{x:g}" y="{y:g}" text-anchor="{anchor}">{words}</text>'


def arrow(path: str) -> str:
    return f'<path class="arrow" d="{path}" stroke-width="1.6" marker-end="url(#head)"/>'


def neurons(x: float, y: float, width: float, height: float, colour: str | None) -> list[str]:
    """The base's neurons as bars, those of the support coloured; with `colour`, the support alone in that colour."""
    pitch = width / NEURONS
    thick = max(0.55 * pitch, 3)
    bars = []
    for number in range(NEURONS):
        fill = f'fill="{colour or COLOURS[0]}"' if number in SUPPORT else 'class="neuron"'
        if number in SUPPORT or colour is None:
            bars.append(
                f'<rect x="{x + number * pitch:.1f}" y="{y:g}" width="{thick:.1f}" height="{height:g}" {fill}/>'
            )
    return bars


def picture() -> str:
    """Base, router and experts of one layer."""
    x, y, width, height = BASE
    middle = y + height / 2
    parts = [box(0, 0, WIDTH, HEIGHT, "card")]
    # A token comes in on the left and goes to the router and to the base.
    parts += [box(20, middle - 20, 76, 40), text(58, middle + 5, "token x")]
    parts += [arrow(f"M96 {middle} H{x - 4}"), arrow("M58 261 V118"), box(20, 74, 76, 40), text(58, 99, "router")]
    parts += [text(20, 46, "picks 2 of 6", "note", "start"), text(20, 61, "for each token", "note", "start")]
    # The base, with the support's neurons in colour.
    parts += [box(x, y, width, height), *neurons(x + 16, y + 12, width - 32, height - 24, None)]
    parts += [
        text(x, y + height + 22, "frozen base: one feed-forward block, computed once for all experts", "bold", "start"),
        text(
            x,
            y + height + 41,
            "grey: its neurons; blue: the support, which experts may change, by default 1 %",
            "note",
            "start",
        ),
    ]
    # The experts: a change of the same few neurons each.
    gap, tall = 10, 92
    wide = (width - gap * (len(EXPERTS) - 1)) / len(EXPERTS)
    for number, ((name, weight), colour) in enumerate(zip(EXPERTS.items(), COLOURS, strict=True)):
        left = x + number * (wide + gap)
        shade = "" if weight else 'opacity="0.5"'
        frame = f'style="stroke: {colour}; stroke-width: 2.2"' if weight else ""
        parts += [f"<g {shade}>", box(left, 66, wide, tall, "box", frame), text(left + wide / 2, 86, name)]
        parts += [*neurons(left + 8, 98, wide - 16, 46, colour), "</g>"]
        if weight:
            centre = left + wide / 2
            parts += [text(centre + 7, 184, f"p = {weight:g}", "note", "start")]
            parts += [f'<path class="arrow" d="M{centre:g} 158 V206 H{x + width + 46:g}" stroke-width="1.6"/>']
    parts += [arrow(f"M96 94 H{x - 4}")]
    parts += [text(x, 46, "experts: sparse changes Δ of the base’s weights, one a domain", "bold", "start")]
    # Their changes are added to the base's output.
    plus = x + width + 46
    parts += [arrow(f"M{plus} 206 V{middle - 16}"), arrow(f"M{x + width} {middle} H{plus - 17}")]
    parts += [f'<circle class="box" cx="{plus}" cy="{middle}" r="13"/>', text(plus, middle + 6, "+", "bold")]
    parts += [arrow(f"M{plus + 13} {middle} H{plus + 45}"), text(plus + 60, middle + 5, "y")]
    title = "A router sends each token to two of six experts; each expert changes a few neurons of the frozen base."
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" role="img">',
            f"<title>{title}</title>",
            f"<style>{STYLE}</style>",
            '<defs><marker id="head" viewBox="0 0 8 8" refX="6" refY="4" markerWidth="7" markerHeight="7" '
            'orient="auto"><path class="head" d="M0 0 L8 4 L0 8 Z"/></marker></defs>',
            *parts,
            "</svg>",
            "",
        ]
    )


def logo() -> str:
    """Neurons, two of them changed."""
    bars = [
        f'<rect x="{3 + 5 * i}" y="4" width="3" height="16" rx="1" fill="{"#ffb454" if i in (1, 2) else "#dfe6f1"}"/>'
        for i in range(4)
    ]
    return "\n".join(['<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 24 24">', *bars, "</svg>", ""])


if __name__ == "__main__":
    FOLDER.mkdir(exist_ok=True)
    (FOLDER / "srde.svg").write_text(picture(), encoding="utf-8")
    (FOLDER / "logo.svg").write_text(logo(), encoding="utf-8")
