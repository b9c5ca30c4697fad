"""The colours of pages, light and dark.

Text has a contrast of at least 4.5 to 1 with its background, and the series of a chart at least 3 to 1.
"""

from __future__ import annotations

from typing import Any

LIGHT: dict[str, Any] = {
    "background": "#ffffff",
    "surface": "#f6f7f9",
    "text": "#1b1f24",
    "muted": "#57606a",
    "grid": "#d5dae1",
    "accent": "#1f5f9f",
    "right": "#1a6b3f",
    "wrong": "#a8321c",
    "note": "#fff6dd",
    "series": ["#2267ad", "#c24a1a", "#23804f", "#94489a", "#96690a", "#0b7f8f", "#b0365f", "#828d9b"],
    "scale": [[0.0, "#f3f6fa"], [0.5, "#7fb0dd"], [1.0, "#123f73"]],
}
DARK: dict[str, Any] = {
    "background": "#14171b",
    "surface": "#1c2127",
    "text": "#e7eaee",
    "muted": "#a5afbb",
    "grid": "#363e48",
    "accent": "#7ab8f0",
    "right": "#6fcf97",
    "wrong": "#f49a85",
    "note": "#2e2813",
    "series": ["#6cb0ee", "#f0875a", "#5cc28b", "#d091d2", "#dcb24a", "#49c3d1", "#ee86a8", "#7d8896"],
    "scale": [[0.0, "#1b222c"], [0.5, "#3d7bb8"], [1.0, "#d6ebff"]],
}
GREY = LIGHT["series"][-1]
"""the background for contrasts"""
SHADES = len(LIGHT["series"]) - 1


def color(number: int) -> str:
    """The light colour of series `number`; the page's script replaces it by the dark one if needed."""
    return str(LIGHT["series"][number % SHADES])


def variables() -> str:
    """The colours as CSS: by the system's setting or the reader's choice, and light in print."""
    light, dark = _declared(LIGHT), _declared(DARK)
    return (
        f":root {{ color-scheme: light dark; {light} }}\n"
        f"@media (prefers-color-scheme: dark) {{ :root {{ {dark} }} }}\n"
        f':root[data-theme="light"] {{ color-scheme: light; {light} }}\n'
        f':root[data-theme="dark"] {{ color-scheme: dark; {dark} }}\n'
        f"@media print {{ :root, :root[data-theme] {{ color-scheme: light; {light} }} }}\n"
    )


def _declared(colors: dict[str, Any]) -> str:
    plain = {name: value for name, value in colors.items() if isinstance(value, str)}
    plain |= {f"series-{number}": shade for number, shade in enumerate(colors["series"])}
    return " ".join(f"--{name}: {value};" for name, value in plain.items())
