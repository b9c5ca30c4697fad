"""The random number generators of a process as JSON, for checkpoints."""

from __future__ import annotations

from typing import Any

import torch

from srde_ds.errors import SRDEError


def random_state() -> dict[str, str]:
    """State of the CPU's generator and of the current GPU's, if there is one, in hexadecimal."""
    states = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    return {device: bytes(state.tolist()).hex() for device, state in states.items()}


def set_random_state(states: Any) -> None:
    """Set the generators to saved states. The state of a device that this machine lacks is skipped.

    Raises:
        SRDEError: the value is not such a state.
    """
    try:
        tensors = {name: torch.tensor(list(bytes.fromhex(states[name])), dtype=torch.uint8) for name in states}
        torch.set_rng_state(tensors["cpu"])
        if "cuda" in tensors and torch.cuda.is_available():
            torch.cuda.set_rng_state(tensors["cuda"])
    except (KeyError, TypeError, ValueError, RuntimeError) as error:  # the latter two come from torch
        text = " ".join(f"{type(error).__name__}: {error}".split())
        raise SRDEError(f"random_state: not the state of random number generators: {text}.") from None
