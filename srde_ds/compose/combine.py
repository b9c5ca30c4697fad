"""Combines the experts of several adapters of one base into one adapter.

Each expert computes the same as before: its delta is copied, or mixed once from its atoms. If the adapters' supports
differ, each expert gets its own support. All supports of a layer have the same length, so shorter ones are filled up
with further entries whose deltas are zero, which has no effect.

New routers are made from the adapters' statistics of their domains. This needs neither data nor the base.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from srde_ds.compose.names import parse_renames, renamed, with_entry
from srde_ds.compose.options import CombineOptions
from srde_ds.compose.train_routers import train_routers
from srde_ds.config import AdapterConfig
from srde_ds.config.granularity import entry_weights
from srde_ds.errors import SRDEError
from srde_ds.export.weights import write_weights
from srde_ds.model.adapter_source import AdapterSource, open_adapter
from srde_ds.model.base_files import described_base
from srde_ds.training.warm_start.from_statistics import router_of
from srde_ds.weights.origins import Origins
from srde_ds.weights.schema import check_history, support_hash
from srde_ds.weights.tensors import LazyTensor


def combine_command(options: CombineOptions) -> Path:
    """Write the combined adapter, and return its path.

    Raises:
        SRDEError: see `open_adapter` and `combine`, or the file cannot be written.
    """
    for key, default in (("router_steps", CombineOptions.router_steps), ("base", None)):
        if options.router_data is None and getattr(options, key) != default:
            raise SRDEError(
                f"{key}={getattr(options, key)} without router_data: give --router_data, or leave --{key} out."
            )
    adapters = [open_adapter(place) for place in options.weights]
    combined = combine(_renamed(adapters, options.rename or []), top_k=options.top_k, seed=options.seed)
    if options.router_data is not None:
        if combined.metadata.config.top_k == 1:
            raise SRDEError(
                "router_data with top_k=1: a token's one expert has weight 1, so what is answered does not depend on "
                "the router's logits, and nothing can be learnt from data. Give --top_k 2, or leave --router_data out."
            )
        combined = train_routers(
            combined, options.router_data, steps=options.router_steps, base=options.base, seed=options.seed
        )
    return write_weights(combined, options.output, dtype=torch.float32)


def combine(adapters: Sequence[AdapterSource], *, top_k: int | None = None, seed: int = 0) -> AdapterSource:
    """An adapter with all experts of the adapters, in order, and routers made from the statistics of their domains.

    Args:
        top_k: number of experts that each token uses; None: the largest of the adapters' values.
        seed: seed of the tokens that are drawn from the statistics.

    Raises:
        SRDEError: there are fewer than two adapters, their bases or granularities differ, names occur twice, an expert
            has no statistics of its domain, or a router could not distinguish the domains.
    """
    _check_together(adapters)
    names = [name for adapter in adapters for name in adapter.metadata.expert_names]
    used = max(adapter.metadata.config.top_k for adapter in adapters)
    if top_k is not None and top_k > len(names):
        raise SRDEError(f"top_k={top_k}: must not exceed the number of experts, {len(names)}. Lower --top_k.")
    origins = _origins(adapters)
    layers = [_Layer(adapters, layer) for layer in range(adapters[0].num_layers)]
    shared = all(layer.is_shared for layer in layers)
    config = replace(
        max((adapter.metadata.config for adapter in adapters), key=lambda config: config.density),
        preset="default",
        num_experts=len(names),
        top_k=top_k or used,
        num_atoms=0,
        atom_mixing="linear",
        support_scope="shared" if shared else "per_expert",
    )
    tensors: dict[str, LazyTensor] = {}
    for number, layer in enumerate(layers):
        try:
            router = router_of(origins.statistics_of(names, number), seed=seed, layer=number)
        except SRDEError:
            raise SRDEError(
                f"weights: layer {number}: the statistics of the domains {', '.join(names)} are too similar for a "
                "router to distinguish them. Give adapters of different domains."
            ) from None
        tensors |= {
            f"layers.{number}.router.weight": LazyTensor.of(router),
            f"layers.{number}.support": layer.support(config),
            f"layers.{number}.deltas.free": layer.free(config),
        }
    tensors |= {name: LazyTensor.of(tensor) for name, tensor in origins.tensors().items()}
    metadata = replace(
        adapters[0].metadata,
        config=config,
        expert_names=names,
        support_hash=support_hash(layer.support(config).load() for layer in layers),
        domain_tokens=origins.domain_tokens,
        history=origins.history,
    )
    combined = AdapterSource(adapters[0].place, metadata, tensors)
    return with_entry(combined, {"verb": "combine", "experts": ", ".join(names)})


class _Layer:
    """The experts of all adapters in one layer, which are read when they are needed, one layer at a time.

    Attributes:
        size: entries in each expert's support.
        is_shared: whether all experts have the same support.
    """

    def __init__(self, adapters: Sequence[AdapterSource], layer: int) -> None:
        self.adapters, self.layer = adapters, layer
        self.hidden = adapters[0].router(layer).shape[1]
        own = self._own_supports()
        self.size = max(len(support) for support in own)
        self.is_shared = all(torch.equal(support, own[0]) for support in own)

    def support(self, config: AdapterConfig) -> LazyTensor:
        """`support` of the combined adapter, each row in ascending order."""
        shape = (self.size,) if config.support_scope == "shared" else (config.num_experts, self.size)
        return LazyTensor(torch.int32, shape, lambda: self._supports()[0] if len(shape) == 1 else self._supports())

    def free(self, config: AdapterConfig) -> LazyTensor:
        """`deltas.free` of all experts, fp32."""
        experts, neuron = config.num_experts, config.granularity == "neuron"
        each = 1 if neuron else entry_weights(config.granularity, self.hidden)  # values of an entry on the last axis
        width = self.hidden // config.neuron_parts
        shape = (width, 3 * experts, self.size) if neuron else (experts, self.size * each)
        return LazyTensor(torch.float32, shape, partial(self._deltas, neuron, each))

    def _deltas(self, neuron: bool, each: int) -> Tensor:
        found: list[Tensor] = []
        supports = self._supports()
        for adapter in self.adapters:
            deltas = adapter.deltas(self.layer, whole=False)
            for expert in range(adapter.metadata.config.num_experts):
                delta, place = adapter.expert_part(deltas, expert), len(found)
                values = delta.new_zeros(*delta.shape[:-1], self.size * each)
                # Both are ascending, so the positions of the expert's own entries are as well.
                kept = torch.isin(supports[place], adapter.support(self.layer, expert))
                values[..., kept.repeat_interleave(each)] = delta
                found.append(values)
        return torch.cat(found, dim=1) if neuron else torch.stack(found)

    def _own_supports(self) -> list[Tensor]:
        return [
            adapter.support(self.layer, expert)
            for adapter in self.adapters
            for expert in range(adapter.metadata.config.num_experts)
        ]

    def _supports(self) -> Tensor:
        """`[E, n]`."""
        return torch.stack([_filled_up(support, self.size) for support in self._own_supports()])


def _filled_up(support: Tensor, size: int) -> Tensor:
    """An ascending `support` plus the lowest entries that it lacks, `size` in total and in ascending order."""
    candidates = torch.arange(size, dtype=support.dtype)  # contains at least size - len(support) entries that it lacks
    further = candidates[~torch.isin(candidates, support)][: size - len(support)]
    return torch.cat([support, further]).sort().values


def _check_together(adapters: Sequence[AdapterSource]) -> None:
    if len(adapters) < 2:
        raise SRDEError("weights: there is only one adapter to combine. Give at least two.")
    first, *others = adapters
    for adapter in adapters:
        if adapter.metadata.config.shared_expert_density:
            raise SRDEError(
                f"weights '{adapter.place}': its experts were trained beside a shared expert (shared_expert_density="
                f"{adapter.metadata.config.shared_expert_density}), which those of other adapters would use as well. "
                "Give adapters without one."
            )
    for other in others:
        one, two = first.metadata, other.metadata
        if one.base["hash"] != two.base["hash"]:
            raise SRDEError(
                f"weights '{other.place}': trained on {described_base(two.base)}, but '{first.place}' on "
                f"{described_base(one.base)}. Give adapters of one base."
            )
        if one.config.granularity != two.config.granularity:
            raise SRDEError(
                f"weights '{other.place}': granularity={two.config.granularity}, but '{first.place}' has "
                f"{one.config.granularity}. Give adapters of one granularity."
            )
        if one.config.neuron_parts != two.config.neuron_parts:
            raise SRDEError(
                f"weights '{other.place}': neuron_parts={two.config.neuron_parts}, but '{first.place}' has "
                f"{one.config.neuron_parts}. Give adapters with the same parts."
            )
        if (first.num_layers, first.router(0).shape[1]) != (other.num_layers, other.router(0).shape[1]):
            raise SRDEError(f"weights '{other.place}': other layers than '{first.place}'. Export them again.")
    owners: dict[str, int] = {}
    for number, adapter in enumerate(adapters, 1):
        for name in {**dict.fromkeys(adapter.metadata.expert_names), **adapter.metadata.domain_tokens}:
            if name in owners:
                raise SRDEError(
                    f"weights '{adapter.place}': '{adapters[owners[name] - 1].place}' also has an expert '{name}'. "
                    f"Rename one: --rename {number}:{name}=NAME"
                )
            owners[name] = number


def _origins(adapters: Sequence[AdapterSource]) -> Origins:
    """History and statistics of all adapters. SRDEError if an expert has no statistics of its domain."""
    together = Origins()
    for adapter in adapters:
        for name in adapter.metadata.expert_names:
            if name not in adapter.metadata.domain_tokens:
                raise SRDEError(
                    f"weights '{adapter.place}': no statistics of a domain '{name}', which the router needs for expert "
                    f"'{name}'. Train the adapter with --domain_statistics_rows above 0 and an expert for each "
                    "domain (with PEFT: srde_ds.peft.statistics.measure_domains), or take the expert out: srde-ds "
                    f"remove {adapter.place} --experts {name}"
                )
        own = Origins.of(adapter.metadata, adapter.tensors)
        together.update(own.domain_tokens, own.statistics)
        together.history += [entry for entry in own.history if entry not in together.history]
    check_history(together.history)
    return together


def _renamed(adapters: Sequence[AdapterSource], texts: Sequence[str]) -> list[AdapterSource]:
    """The adapters with new names from --rename; "2:old=new" applies only to the second."""
    chosen: list[list[str]] = [[] for _ in adapters]
    for text in texts:
        number, sign, rest = text.partition(":")
        if sign and number.strip().isdecimal():
            if not 0 < int(number) <= len(adapters):
                raise SRDEError(f"rename={text}: there are {len(adapters)} adapters, numbered from 1.")
            chosen[int(number) - 1].append(rest)
            continue
        (old,) = parse_renames([text])
        owners = [place for place, adapter in enumerate(adapters) if old in adapter.metadata.expert_names]
        if len(owners) != 1:
            numbers = " or ".join(f"{place + 1}:{text}" for place in owners) or "the name of an expert"
            raise SRDEError(f"rename={text}: {len(owners)} of the adapters have an expert '{old}'. Give {numbers}.")
        chosen[owners[0]].append(text)
    return [renamed(adapter, parse_renames(own)) for adapter, own in zip(adapters, chosen, strict=True)]
