"""Figures for Markdown reports, which cannot hold the pages' charts."""

from __future__ import annotations

from typing import Any

from srde_ds.errors import SRDEError

try:
    from matplotlib.figure import Figure as Figure  # others take it from here
except ImportError:
    raise SRDEError(
        "package 'matplotlib' is missing, which plots need. Install it: pip install 'srde-ds[pages]'"
    ) from None


def new_figure() -> tuple[Figure, Any]:
    """A figure with one pair of axes, and these axes."""
    figure = Figure(figsize=(7, 4.2), dpi=120, layout="constrained")
    return figure, figure.add_subplot()
