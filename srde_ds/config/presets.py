"""What `preset` changes, unless an option is given explicitly."""

from __future__ import annotations

from typing import Any

PRESETS: dict[str, dict[str, Any]] = {
    "default": {},
    "reference": {"granularity": "element", "support_scope": "shared", "num_atoms": 16, "atom_mixing": "softmax"},
}
