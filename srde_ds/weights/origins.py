"""The origins of an adapter: its history, and statistics of its layers' inputs on each domain."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from srde_ds.weights.file import AdapterMetadata
from srde_ds.weights.tensors import LazyTensor


@dataclass(frozen=True)
class DomainStatistics:
    """Statistics of a feed-forward block's inputs on a sample of each domain's tokens.

    Attributes:
        mean, spread: `[domains, D]` fp32; the spread is the standard deviation of each dimension.
    """

    mean: Tensor
    spread: Tensor


@dataclass
class Origins:
    """History and domain statistics of an adapter; empty for a new one.

    Attributes:
        history: see `AdapterMetadata`.
        domain_tokens: domain -> number of tokens in its sample, in the order of the rows of `statistics`.
        statistics: statistics of each layer, first layer first.
    """

    history: list[dict[str, str | int]] = field(default_factory=list)
    domain_tokens: dict[str, int] = field(default_factory=dict)
    statistics: list[DomainStatistics] = field(default_factory=list)

    @classmethod
    def of(cls, metadata: AdapterMetadata, tensors: Mapping[str, LazyTensor]) -> Origins:
        """The origins of an adapter, from its metadata and tensors."""
        layers = sum(name.endswith(".domain_mean") for name in tensors)
        statistics = [
            DomainStatistics(*(tensors[f"layers.{layer}.domain_{part}"].load().float() for part in ("mean", "spread")))
            for layer in range(layers)
        ]
        return cls(list(metadata.history), dict(metadata.domain_tokens), statistics)

    def tensors(self) -> dict[str, Tensor]:
        """The statistics, by their names in a weights file."""
        return {
            f"layers.{layer}.domain_{part}": getattr(own, part)
            for layer, own in enumerate(self.statistics)
            for part in ("mean", "spread")
        }

    def update(self, domain_tokens: Mapping[str, int], statistics: list[DomainStatistics]) -> None:
        """Replace the statistics of some domains; the others stay."""
        kept = [row for row, domain in enumerate(self.domain_tokens) if domain not in domain_tokens]
        if self.statistics and kept:
            statistics = [
                DomainStatistics(torch.cat([old.mean[kept], new.mean]), torch.cat([old.spread[kept], new.spread]))
                for old, new in zip(self.statistics, statistics, strict=True)
            ]
        old_tokens = {domain: count for domain, count in self.domain_tokens.items() if domain not in domain_tokens}
        self.domain_tokens, self.statistics = old_tokens | dict(domain_tokens), statistics
