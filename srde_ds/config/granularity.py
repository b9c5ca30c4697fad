"""What the entries of a support are: neurons, blocks of weights, or single weights."""

from __future__ import annotations

from typing import Literal

Granularity = Literal["neuron", "block", "element"]

BLOCK_SIDE = 16
"""A block is a square of so many rows and columns of gate, up or down"""
PLURALS: dict[Granularity, str] = {
    "neuron": "neurons",
    "block": f"blocks of {BLOCK_SIDE} x {BLOCK_SIDE} weights",
    "element": "single weights",
}


def entry_weights(granularity: Granularity, hidden: int, parts: int = 1) -> int:
    """The number of weights that an expert changes for an entry of its support.

    Args:
        hidden: D.
        parts: of an expert's neurons, see `AdapterConfig.neuron_parts`.
    """
    return {"neuron": 3 * hidden // parts, "block": BLOCK_SIDE**2, "element": 1}[granularity]


def candidates(granularity: Granularity, hidden: int, intermediate: int) -> int:
    """The number of entries that a support may choose from: F neurons, or the blocks or weights of all matrices."""
    return 3 * hidden * intermediate // entry_weights(granularity, hidden)
