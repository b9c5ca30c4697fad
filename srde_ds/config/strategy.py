"""How the weights that experts may change are chosen: the values of `support_strategy`."""

from __future__ import annotations

from typing import Literal

Strategy = Literal["magnitude", "random", "activation", "gradient", "learned"]
WITHOUT_DATA = ("magnitude", "random")
"""Those that need only the base"""
CALIBRATED = ("activation", "gradient")
"""Those that look at rows before training"""
