"""The origins of an adapter: its history, and statistics of its layers' inputs on each domain."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from srde_ds.weights.file import AdapterMetadata
from srde_ds.weights.schema import FACTORS, STATISTICS
from srde_ds.weights.tensors import LazyTensor

ROUTERS_SET, ROUTERS_UNSET, ROUTERS_KEPT = (
    "by domain",
    "by domain, routers not set yet",
    "by domain, routers could not be set",
)
"""What the history of a run with training_phases=by_domain says under `routing`"""


def awaits_routers(metadata: AdapterMetadata) -> bool:
    """Whether weights come from the middle of a run with training_phases=by_domain, which sets the routers at its end.

    Runs of before 2026-11-29 wrote ROUTERS_SET from their first checkpoint on, but had statistics only at the end.
    """
    for entry in reversed(metadata.history):
        if "routing" in entry:
            measured = all(name in metadata.domain_tokens for name in metadata.expert_names)
            return entry["routing"] == ROUTERS_UNSET or (entry["routing"] == ROUTERS_SET and not measured)
        if entry.get("verb") in ("train", "combine", "train routers"):
            return False
    return False


@dataclass(frozen=True)
class DomainStatistics:
    """Statistics of a feed-forward block's inputs on a sample of each domain's tokens, `domain_...` in a weights file.

    They describe a domain's inputs by a factor model: the covariance of the dimensions i and j is about
    sum_r factors_ri factors_rj, and the variance of dimension i is spread_i^2.

    Attributes:
        mean, spread: `[domains, D]` fp32; the spread is the standard deviation of each dimension.
        factors: `[domains, FACTORS, D]` fp32, the longest first; zeros where none are known.
    """

    mean: Tensor
    spread: Tensor
    factors: Tensor

    @classmethod
    def independent(cls, mean: Tensor, spread: Tensor) -> DomainStatistics:
        """Statistics without factors, as weights of before 2026-11-29 hold them."""
        return cls(mean, spread, mean.new_zeros(len(mean), FACTORS, mean.shape[1]))

    def rows(self, kept: list[int]) -> DomainStatistics:
        """Those of some domains."""
        return DomainStatistics(self.mean[kept], self.spread[kept], self.factors[kept])

    def beside(self, other: DomainStatistics) -> DomainStatistics:
        """Those of these domains, followed by others', on the device of these."""
        device = self.mean.device
        return DomainStatistics(
            torch.cat([self.mean, other.mean.to(device)]),
            torch.cat([self.spread, other.spread.to(device)]),
            torch.cat([self.factors, other.factors.to(device)]),
        )


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

        def of_layer(layer: int) -> DomainStatistics:
            names = [f"layers.{layer}.{kind}" for kind in STATISTICS]
            found = [tensors[name].load().float() for name in names if name in tensors]
            return DomainStatistics(*found) if len(found) == len(names) else DomainStatistics.independent(*found)

        statistics = [of_layer(layer) for layer in range(layers)]
        return cls(list(metadata.history), dict(metadata.domain_tokens), statistics)

    def tensors(self) -> dict[str, Tensor]:
        """The statistics, by their names in a weights file."""
        return {
            f"layers.{layer}.{kind}": getattr(own, kind.removeprefix("domain_"))
            for layer, own in enumerate(self.statistics)
            for kind in STATISTICS
        }

    def statistics_of(self, domains: Sequence[str], layer: int) -> DomainStatistics:
        """The statistics of these domains in a layer, in this order; there are statistics of all of them."""
        rows = list(self.domain_tokens)
        return self.statistics[layer].rows([rows.index(domain) for domain in domains])

    def update(self, domain_tokens: Mapping[str, int], statistics: list[DomainStatistics]) -> None:
        """Replace the statistics of some domains; the others stay."""
        kept = [row for row, domain in enumerate(self.domain_tokens) if domain not in domain_tokens]
        if self.statistics and kept:
            pairs = zip(self.statistics, statistics, strict=True)
            statistics = [old.rows(kept).beside(new) for old, new in pairs]
        old_tokens = {domain: count for domain, count in self.domain_tokens.items() if domain not in domain_tokens}
        self.domain_tokens, self.statistics = old_tokens | dict(domain_tokens), statistics
