"""Random numbers that depend on their purpose, but not on the process or the order of calls."""

from __future__ import annotations

import hashlib

import torch


def seeded_generator(*parts: str | int) -> torch.Generator:
    """A CPU generator whose seed is a hash of `parts`, e.g. `(seed, "router", layer)`."""
    digest = hashlib.sha256("/".join(map(str, parts)).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
