"""Records the experts that each token uses while a model reads and writes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from srde_ds.errors import SRDEError
from srde_ds.model.adapter import SRDEModel
from srde_ds.model.policy import RoutingPolicy, of_all_layers


class RoutingRecord:
    """The experts of all T tokens that a model has read inside `recording`.

    Args:
        with_weights: also record what `weights_TE` needs, which takes L times the memory.

    Attributes:
        forwards: for each forward `[T, E]`, the share of each expert in each token's choices over all layers.
    """

    def __init__(self, *, with_weights: bool = True) -> None:
        self.forwards: list[Tensor] = []
        self._weights: list[Tensor] | None = [] if with_weights else None

    @property
    def shares_TE(self) -> Tensor:
        """`forwards` joined."""
        return torch.cat(self.forwards)

    def weights_TE(self, layers: Sequence[int] = ()) -> Tensor:
        """`[T, E]`: each token's weights p_e, averaged over these layers, by default over all."""
        if self._weights is None:
            raise SRDEError("these experts were recorded without their weights: give with_weights=True.")
        weights_TLE = torch.cat(self._weights)
        return (weights_TLE[:, list(layers)] if layers else weights_TLE).mean(1)

    @contextmanager
    def recording(self, model: SRDEModel, policy: RoutingPolicy) -> Iterator[RoutingPolicy]:
        """A context with a completed `policy`; forwards that follow it are recorded."""
        columns = len(model.expert_names) + 1  # the first counts -1, "no expert", and is dropped
        choices: dict[int, Tensor] = {}
        weights: dict[int, Tensor] = {}

        def record(*_: Any) -> None:
            if not choices:  # a forward that follows another policy
                return
            columns_TLK = of_all_layers(choices, dim=1) + 1
            columns_TC = columns_TLK.flatten(1)
            counts_TE = columns_TC.new_zeros(len(columns_TC), columns)
            counts_TE = counts_TE.scatter_add_(1, columns_TC, torch.ones_like(columns_TC))[:, 1:]
            self.forwards.append((counts_TE / counts_TE.sum(1, keepdim=True)).cpu())
            if self._weights is not None:
                weights_TLK = of_all_layers(weights, dim=1).float()
                weights_TLE = weights_TLK.new_zeros(*columns_TLK.shape[:2], columns)
                self._weights.append(weights_TLE.scatter_(2, columns_TLK, weights_TLK)[..., 1:].cpu())
            choices.clear()

        handle = model.base.register_forward_hook(record)
        try:
            yield replace(policy, choices=choices, choice_weights=None if self._weights is None else weights)
        finally:
            handle.remove()
