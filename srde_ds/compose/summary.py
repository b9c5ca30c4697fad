"""Describes an adapter from its weights alone: the base is not loaded, and memory holds one layer."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from srde_ds.config.granularity import entry_weights
from srde_ds.data.manifest import TEMPLATE, VOCABULARY
from srde_ds.model.adapter_source import AdapterSource, open_adapter
from srde_ds.utils.escape import one_line
from srde_ds.utils.tables import aligned_table
from srde_ds.weights.origins import Origins
from srde_ds.weights.schema import SHARED_DELTA


@dataclass(frozen=True)
class AdapterSummary:
    """A description of an adapter.

    Attributes:
        place: its file or checkpoint.
        base: the base's name, architecture and identity hash.
        config: the adapter's options.
        layers, hidden: number of decoder layers, and D.
        values: number of trained values, without supports.
        values_per_expert: number of weights that an expert changes in all layers.
        experts: the experts' names.
        support_overlap: `[E][E]` share of one expert's support that also belongs to another's, averaged over layers.
        delta_norms: `[L][E]` norm of each expert's effective delta.
        shared_expert_norms: `[L]` norm of the shared expert's delta; empty: there is none.
        router_norms: `[L][E]` norm of each expert's routing vector.
        selection_biases: layers whose router has a selection bias.
        domain_tokens: domain -> number of tokens behind its statistics; empty: there are no statistics.
        domain_distances: `[L]` mean distance between two domains' mean inputs, in spreads; empty with fewer than two.
        history: how the weights were made, oldest entry first.
    """

    place: str
    base: dict[str, str | int]
    config: dict[str, Any]
    layers: int
    hidden: int
    values: int
    values_per_expert: int
    experts: list[str]
    support_overlap: list[list[float]]
    delta_norms: list[list[float]]
    shared_expert_norms: list[float]
    router_norms: list[list[float]]
    selection_biases: list[int]
    domain_tokens: dict[str, int]
    domain_distances: list[float]
    history: list[dict[str, str | int]]

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)

    def describe(self) -> str:
        """In words."""
        config, names = self.config, [one_line(name) for name in self.experts]
        scope = "one support for all experts" if config["support_scope"] == "shared" else "a support for each expert"
        part = f" (1/{config['neuron_parts']} of each)" if config["neuron_parts"] > 1 else ""
        how = "at random" if config["support_strategy"] == "random" else f"by {config['support_strategy']}"
        form = f"{config['num_atoms']} atoms, {config['atom_mixing']} mixing" if config["num_atoms"] else "free deltas"
        facts = [
            ("weights", self.place),
            ("base", f"{self.base['name']} ({self.base['architecture']}, identity {str(self.base['hash'])[:12]})"),
            ("experts", f"{', '.join(self.experts)}; {config['top_k']} per token"),
            ("sizes", f"{self.layers} layers of {self.hidden} dimensions; {self.values:,} trained values"),
            (
                "supports",
                f"density {config['density']:g} of {config['granularity']}s{part} {how}, "
                f"{scope}; an expert changes {self.values_per_expert:,} weights",
            ),
            ("deltas", form),
            *([("shared", self._shared_expert())] if self.shared_expert_norms else []),
            ("router", self._router()),
            ("domains", self._domains()),
        ]
        parts = [aligned_table([["", ""], *([name, text] for name, text in facts)]).lstrip("\n ")]
        if len(names) > 1:
            parts.append(f"Overlap of the supports, averaged over layers\n{_matrix(self.support_overlap, names)}")
        layers = [str(layer) for layer in range(self.layers)]
        norms = [[layer, *(f"{norm:.4g}" for norm in row)] for layer, row in zip(layers, self.delta_norms, strict=True)]
        parts.append(f"Norm of the deltas\n{aligned_table([['layer', *names], *norms], right=1)}")
        steps = [_step(entry) for entry in self.history]
        parts.append("History\n" + "\n".join(f"  {one_line(step)}" for step in steps or ["not recorded"]))
        return "\n\n".join(parts)

    def _shared_expert(self) -> str:
        low, high = min(self.shared_expert_norms), max(self.shared_expert_norms)
        density = f"{self.config['shared_expert_density']:g}"
        return f"a shared expert of density {density}, used by every token; delta of norm {low:.3g} to {high:.3g}"

    def _router(self) -> str:
        norms = [norm for row in self.router_norms for norm in row]
        biased = f"; a selection bias in {len(self.selection_biases)} layers" if self.selection_biases else ""
        return f"vectors of norm {min(norms):.3g} to {max(norms):.3g}{biased}"

    def _domains(self) -> str:
        if not self.domain_tokens:
            return "no statistics of their inputs"
        tokens = ", ".join(f"{name} ({count:,} tokens)" for name, count in self.domain_tokens.items())
        if not self.domain_distances:
            return tokens
        low, high = min(self.domain_distances), max(self.domain_distances)
        return f"{tokens}; their means are {low:.3g} to {high:.3g} spreads apart"


def inspect_weights(place: str | Path) -> AdapterSummary:
    """Describe the weights that `place` names, see `locate_weights`.

    Raises:
        SRDEError: the weights do not exist or are damaged.
    """
    adapter = open_adapter(place)
    metadata, layers = adapter.metadata, range(adapter.num_layers)
    experts = range(metadata.config.num_experts)
    overlaps, deltas, routers = [], [], []
    for layer in layers:
        overlaps.append(_overlap([adapter.support(layer, expert) for expert in experts]))
        deltas.append([_norm(adapter.expert_delta(layer, expert)) for expert in experts])
        routers.append([_norm(row) for row in adapter.router(layer).load()])
    hidden = adapter.router(0).shape[1]
    entry = entry_weights(metadata.config.granularity, hidden, metadata.config.neuron_parts)
    support_sizes = [adapter.tensors[f"layers.{layer}.support"].shape[-1] for layer in layers]
    parts = (".deltas.", ".router.weight", f".{SHARED_DELTA}")
    trained = [t for name, t in adapter.tensors.items() if any(part in name for part in parts)]
    shared = [adapter.shared_expert(layer) for layer in layers]
    return AdapterSummary(
        place=str(adapter.place),
        base=metadata.base,
        config=asdict(metadata.config),
        layers=len(layers),
        hidden=hidden,
        values=sum(math.prod(tensor.shape) for tensor in trained),
        values_per_expert=sum(entry * size for size in support_sizes),
        experts=metadata.expert_names,
        support_overlap=torch.stack(overlaps).mean(0).tolist(),
        delta_norms=deltas,
        shared_expert_norms=[_norm(found[1]) for found in shared if found is not None],
        router_norms=routers,
        selection_biases=adapter.selection_biases(),
        domain_tokens=metadata.domain_tokens,
        domain_distances=_distances(adapter),
        history=metadata.history,
    )


def _step(entry: dict[str, str | int]) -> str:
    """An entry of the history in words, with a shortened hash of the dataset."""
    shown = {key: value for key, value in entry.items() if key not in ("verb", VOCABULARY, TEMPLATE)}
    rest = {key: str(value)[:12] if key == "dataset" else value for key, value in shown.items()}
    return f"{entry.get('verb', 'unknown')}: " + "; ".join(f"{key} {value}" for key, value in rest.items())


def _norm(values: Tensor) -> float:
    return float(torch.linalg.vector_norm(values.detach(), dtype=torch.float32))


def _overlap(supports: Sequence[Tensor]) -> Tensor:
    """`[E, E]` fp64: the share of one support's entries that another also has."""
    rows = [[float(torch.isin(one, other).double().mean()) for other in supports] for one in supports]
    return torch.tensor(rows, dtype=torch.float64)


def _distances(adapter: AdapterSource) -> list[float]:
    statistics = Origins.of(adapter.metadata, adapter.tensors).statistics
    if len(adapter.metadata.domain_tokens) < 2:
        return []
    found = []
    for layer in statistics:
        spread = layer.spread.square().sum(1).mean().sqrt().clamp(min=torch.finfo(torch.float32).tiny)
        found.append(float(torch.pdist(layer.mean).mean() / spread))
    return found


def _matrix(values: Sequence[Sequence[float]], names: Sequence[str]) -> str:
    rows = [[name, *(f"{value:.0%}" for value in row)] for name, row in zip(names, values, strict=True)]
    return aligned_table([["", *names], *rows], right=1)
