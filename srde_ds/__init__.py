"""Sparse Routed Delta Experts on a frozen language model, trained with DeepSpeed.

Importing the package loads neither torch nor deepspeed; the names below are loaded when they are first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # for editors and type checkers; `_PLACES` says the same to Python
    from srde_ds.api import build_dataset, evaluate, generate, train
    from srde_ds.config import AdapterConfig, Config
    from srde_ds.errors import SRDEError
    from srde_ds.model.adapter import SRDEModel, add_experts, load_adapter
    from srde_ds.optim.gram_muon import GramMuonAdamW

__version__ = "0.1.0"

__all__ = [
    "AdapterConfig",
    "Config",
    "GramMuonAdamW",
    "SRDEError",
    "SRDEModel",
    "__version__",
    "add_experts",
    "build_dataset",
    "evaluate",
    "generate",
    "load_adapter",
    "train",
]

_PLACES = {
    "AdapterConfig": "srde_ds.config",
    "Config": "srde_ds.config",
    "GramMuonAdamW": "srde_ds.optim.gram_muon",
    "SRDEError": "srde_ds.errors",
    "SRDEModel": "srde_ds.model.adapter",
    "add_experts": "srde_ds.model.adapter",
    "build_dataset": "srde_ds.api",
    "evaluate": "srde_ds.api",
    "generate": "srde_ds.api",
    "load_adapter": "srde_ds.model.adapter",
    "train": "srde_ds.api",
}


def __getattr__(name: str) -> Any:
    if name not in _PLACES:
        raise AttributeError(f"module 'srde_ds' has no attribute '{name}'")
    return getattr(import_module(_PLACES[name]), name)


def __dir__() -> list[str]:
    return __all__
