"""Reads a trained adapter from a weights file or a checkpoint, one tensor at a time."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from srde_ds.checkpoint.prune import PrunedLayers
from srde_ds.checkpoint.resume import find_checkpoint, load_common_tensors, load_run_state, locate_checkpoint
from srde_ds.checkpoint.shards import ShardIndex
from srde_ds.config.values import checked
from srde_ds.errors import SRDEError
from srde_ds.model.base_files import BaseFiles, check_base
from srde_ds.model.deltas import empty_deltas
from srde_ds.model.feed_forward import block_shapes
from srde_ds.model.merging import expert_delta
from srde_ds.utils.launcher import launched_rank
from srde_ds.weights.file import AdapterMetadata, read_header, read_metadata, read_weights
from srde_ds.weights.locate import locate_weights
from srde_ds.weights.origins import awaits_routers
from srde_ds.weights.schema import (
    NEURONS,
    SHARED_DELTA,
    SHARED_KINDS,
    STATISTICS,
    check_fits_base,
    check_shapes,
    check_values,
    support_hash,
)
from srde_ds.weights.tensors import LazyTensor

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class AdapterSource:
    """An adapter's metadata, and its tensors by stable name, such as `layers.{i}.deltas.free`.

    Attributes:
        place: the adapter's file or folder, for messages.
        run: folder of the training run that it comes from; None: it comes from elsewhere.
    """

    place: Path
    metadata: AdapterMetadata
    tensors: dict[str, LazyTensor]
    run: Path | None = None

    @property
    def num_layers(self) -> int:
        """Number of layers with experts."""
        return sum(name.endswith(".support") for name in self.tensors)

    def support(self, layer: int, expert: int) -> Tensor:
        """`[m]` or `[n]`: the expert's support, see `supports/`."""
        support = self.tensors[f"layers.{layer}.support"].load()
        return support if support.dim() == 1 else support[expert]

    def router(self, layer: int) -> LazyTensor:
        """`[E, D]`."""
        return self.tensors[f"layers.{layer}.router.weight"]

    def deltas(self, layer: int, *, whole: bool = True) -> Tensor:
        """The layer's effective deltas, fp32: `[D, E, 3, m]` or `[E, n]`, as from `deltas.DeltaBank`.

        Args:
            whole: those of whole neurons, also where these have parts.
        """
        prefix, config = f"layers.{layer}.", self.metadata.config
        own = {name.removeprefix(prefix): t for name, t in self.tensors.items() if name.startswith(f"{prefix}deltas.")}
        values = {name.removeprefix("deltas."): tensor.load().float() for name, tensor in own.items()}
        size = self.tensors[f"{prefix}support"].shape[-1]
        bank = empty_deltas(config, hidden=self.router(layer).shape[1], size=size, layer=layer)
        bank.load_state_dict(values, assign=True)
        with torch.no_grad():
            return bank.whole() if whole else bank()

    def expert_delta(self, layer: int, expert: int) -> Tensor:
        """`[D, 3, m]` or `[n]`, fp32."""
        return self.expert_part(self.deltas(layer), expert)

    def expert_part(self, deltas: Tensor, expert: int) -> Tensor:
        """One expert's part of the result of `deltas`, in the shape of `expert_delta`."""
        return expert_delta(deltas, expert, self.metadata.config.granularity)

    def shared_expert(self, layer: int) -> tuple[Tensor, Tensor] | None:
        """Neurons `[m]` and delta `[D, 3, m]`, fp32, of the layer's shared expert; None: there is none."""
        if not self.metadata.config.shared_expert_density:
            return None
        neurons, delta = (self.tensors[f"layers.{layer}.{part}"].load() for part in (NEURONS, SHARED_DELTA))
        return neurons, delta.float()

    def check_fits(self, base: PreTrainedModel | BaseFiles) -> dict[str, str | int]:
        """Check that these experts fit a base, and return its identity, see `check_base`.

        Raises:
            SRDEError: they were trained on another base, or reach beyond this one's weights.
        """
        identity = check_base(base, self.metadata.base, self.place)
        if isinstance(base, BaseFiles):
            base.check_shapes()
            base = base.empty
        check_fits_base(self.metadata.config, self.tensors, block_shapes(base), self.place)
        return identity

    def selection_biases(self) -> list[int]:
        """The layers whose routers have a nonzero selection bias."""
        biases = {name: t for name, t in self.tensors.items() if name.endswith(".router_bias")}
        return sorted(int(name.split(".")[1]) for name, tensor in biases.items() if bool(tensor.load().any()))


def open_adapter(place: str | Path, *, revision: str | None = None, verified: bool = False) -> AdapterSource:
    """The adapter that `place` names, for every verb and for Python; for the other arguments see `locate_weights`.

    Args:
        verified: another rank has opened it, so that its files need not be hashed, nor its values checked, once more.

    If supports are still being learned, it takes the best candidates, which count in eval mode. Their number follows
    from the configuration of the base that the checkpoint names.

    Raises:
        SRDEError: it does not exist or is damaged (see `weights.schema`), or supports are being learned and the base is
            not found.
    """
    location = locate_weights(place, revision=revision)
    if location.kind == "checkpoint":
        find = locate_checkpoint if verified else find_checkpoint
        found = checkpoint_adapter(find(location.path, location.path, field="weights"), check=not verified)
        found = replace(found, run=location.run)
    else:
        file = read_header(location.path) if verified else read_weights(location.path)
        found = AdapterSource(file.path, file.metadata, file.tensors, location.run)
    if launched_rank() == 0 and awaits_routers(found.metadata):
        _warn_of_unset_routers(found.place)
    return found


def read_adapter_metadata(place: str | Path) -> AdapterMetadata:
    """The metadata of the result of `open_adapter`, from small files alone, so that every rank may read them.

    Raises:
        SRDEError: there are none, or they are damaged.
    """
    location = locate_weights(place)
    if location.kind == "file":
        return read_metadata(location.path)
    folder = locate_checkpoint(location.path, location.path, field="weights")
    state = load_run_state(folder)
    metadata = _saved_metadata(state, folder)
    # While supports are being learned, the metadata are those of the candidates.
    if metadata.config.support_strategy == "learned":
        config = metadata.config
        metadata = replace(metadata, config=replace(config, density=checked(config, "density", _density(state))))
    return metadata


@cache
def _warn_of_unset_routers(place: Path) -> None:
    """Once, since a verb may open weights several times."""
    logger.warning(
        "weights '%s': training_phases=by_domain sets the routers after the last step, and this is an earlier one, so "
        "they are those that the run began with. Name single experts, or train to the end.",
        place,
    )


def checkpoint_adapter(folder: Path, *, check: bool = True) -> AdapterSource:
    """The adapter in a verified checkpoint; errors as in `open_adapter`.

    Args:
        check: whether to check all values.
    """
    state = load_run_state(folder)
    metadata, index = _saved_metadata(state, folder), ShardIndex(folder)
    if any(name.endswith(".scores") for _, name in index.shapes):
        masters, common, metadata = _learned_so_far(folder, _density(state))
    else:
        masters = {
            name: LazyTensor(torch.float32, shape, partial(index.tensor, kind, name))
            for (kind, name), shape in sorted(index.shapes.items())
            if kind == "master"
        }
        common = load_common_tensors(folder)
    kept = {name: tensor for name, tensor in common.items() if name.rpartition(".")[2] in SHARED_KINDS}
    if not masters or not any(name.endswith(".support") for name in kept):
        raise SRDEError(f"checkpoint '{folder}': it holds no master weights or no supports: nothing to export.")
    tensors = masters | {name: LazyTensor.of(tensor) for name, tensor in kept.items()}
    check_shapes(metadata.config, tensors, folder, domains=len(metadata.domain_tokens))
    if check:
        check_values(tensors, metadata.support_hash, folder)
    return AdapterSource(folder, metadata, tensors)


def _saved_metadata(state: dict[str, Any], folder: Path) -> AdapterMetadata:
    if "adapter" not in state:
        raise SRDEError(f"checkpoint '{folder}': its run state has no 'adapter': nothing to export.")
    return AdapterMetadata.from_dict(state["adapter"])


def _density(state: dict[str, Any]) -> Any:
    """The density that the run is to reach."""
    return state["config"]["adapter"]["density"]


def _learned_so_far(folder: Path, density: float) -> tuple[dict[str, LazyTensor], dict[str, Tensor], AdapterMetadata]:
    """Masters, common tensors and metadata of a checkpoint, as if its supports were frozen now."""
    pruned = PrunedLayers(folder, density)
    masters: dict[str, LazyTensor] = {}
    supports = []
    for layer in range(len(pruned.sizes)):
        positions = pruned.positions(layer)
        kept = pruned.tensors(layer, positions, {"master"})
        masters |= {name: LazyTensor.of(tensor) for (_, name), tensor in kept.items()}
        supports.append(pruned.support(layer, positions))
    return masters, pruned.common_tensors(supports), replace(pruned.metadata, support_hash=support_hash(supports))


def select_experts(adapter: AdapterSource, names: Sequence[str]) -> AdapterSource:
    """An adapter with only these experts, in this order.

    Atoms and a shared expert stay whole. Routers, selection biases, importance, mixing weights, free deltas and
    separate supports keep only the rows of these experts, and top_k becomes at most their number. Statistics of other
    experts' domains are removed. The result is the same as with `set_active_experts`: the softmax runs over the chosen
    experts among the remaining.

    Raises:
        SRDEError: a name is unknown or occurs twice, or there is none.
    """
    old = adapter.metadata
    if not names or len(set(names)) != len(names):
        raise SRDEError(f"experts={','.join(names)}: give each expert once, of {', '.join(old.expert_names)}.")
    rows = torch.tensor([old.expert_index(name) for name in names])
    gone = set(old.expert_names) - set(names)
    domain_tokens = {domain: count for domain, count in old.domain_tokens.items() if domain not in gone}
    tensors = {
        name: _of_experts(name, tensor, rows, old)
        for name, tensor in adapter.tensors.items()
        if domain_tokens or not name.endswith(STATISTICS)
    }
    supports = [tensors[f"layers.{layer}.support"].load() for layer in range(adapter.num_layers)]
    metadata = replace(
        old,
        config=replace(old.config, num_experts=len(names), top_k=min(old.config.top_k, len(names))),
        expert_names=list(names),
        support_hash=support_hash(supports),
        domain_tokens=domain_tokens,
    )
    return AdapterSource(adapter.place, metadata, tensors)


def _of_experts(name: str, tensor: LazyTensor, rows: Tensor, metadata: AdapterMetadata) -> LazyTensor:
    kind, config = name.rpartition(".")[2], metadata.config
    if kind in ("atoms", "neurons", "delta") or (kind == "support" and config.support_scope == "shared"):
        return tensor
    axis = 0
    if kind in STATISTICS:
        gone = set(metadata.expert_names) - {metadata.expert_names[row] for row in rows.tolist()}
        rows = torch.tensor([row for row, domain in enumerate(metadata.domain_tokens) if domain not in gone])
    if kind == "free" and config.granularity == "neuron":  # [D, 3*E, m], an expert's three side by side
        axis, rows = 1, (3 * rows[:, None] + torch.arange(3)).flatten()
    shape = list(tensor.shape)
    shape[axis] = len(rows)
    return LazyTensor(tensor.dtype, tuple(shape), lambda: tensor.load().index_select(axis, rows))
