"""Settles the options of a run that depend on the memory at hand."""

from __future__ import annotations

from srde_ds.config import Config
from srde_ds.planner.base_placement import settle_base_placement
from srde_ds.planner.recompute import settle_recompute


def settle(config: Config) -> Config:
    """The config with the choice for this machine in place of each `auto`.

    First comes `recompute`, so that holding the whole base never costs computation.

    Raises:
        SRDEError: `base_placement: resident` does not fit, or the base or the DeepSpeed configuration cannot be used.
    """
    return settle_base_placement(settle_recompute(config))
