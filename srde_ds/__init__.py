"""Sparse Routed Delta Experts on a frozen language model, trained with DeepSpeed.

Importing the package loads neither torch nor deepspeed; names below are resolved on first use.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

_EXPORTS = {
    "AdapterConfig": "srde_ds.config",
    "Config": "srde_ds.config",
    "SRDEError": "srde_ds.errors",
    "SRDEModel": "srde_ds.model.adapter",
    "add_experts": "srde_ds.model.adapter",
    "load_adapter": "srde_ds.model.adapter",
}
__all__ = sorted([*_EXPORTS, "__version__"])


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module 'srde_ds' has no attribute '{name}'")
    return getattr(import_module(_EXPORTS[name]), name)
