"""Which rank holds which experts (docs/design.md, "Placement").

With expert-parallel size P, ranks i·P … i·P + P − 1 form an expert-parallel group and divide the experts among them:
rank r of the group holds slots r·E_l … (r + 1)·E_l − 1, with E_l = ⌈E / P⌉. Slots from E on are padding: every rank
must hold tensors of the same shapes, or collectives hang. Ranks with the same r form an expert-data-parallel group:
they hold the same experts, and ZeRO partitions these over that group alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist

from srde_ds.distributed import deepspeed_internals as internals
from srde_ds.distributed.delta_exchange import GatherShards, SendShards
from srde_ds.distributed.transport import DeltaTransport, TokenTransport
from srde_ds.distributed.workload import slots
from srde_ds.model.adapter import SRDEModel
from srde_ds.model.deltas import AtomDeltas, tagged
from srde_ds.model.layer import SRDEFeedForward


@dataclass(frozen=True)
class TensorCut:
    """The place of a rank's tensor in the global one: a range of entries on one axis.

    Attributes:
        global_shape: shape of the whole tensor, without padding.
        first: index of the rank's first entry.
        entries: number of the rank's entries that exist in the global tensor; the others are padding.
    """

    axis: int
    global_shape: tuple[int, ...]
    first: int
    entries: int


@dataclass(frozen=True)
class ExpertGroups:
    """This rank's process groups."""

    name: str
    expert_parallel: dist.ProcessGroup
    expert_data_parallel: dist.ProcessGroup


def expert_groups(expert_parallel_size: int) -> ExpertGroups:
    """Create DeepSpeed's groups for this size, unless they exist; a collective of all ranks."""
    return ExpertGroups(*internals.expert_and_data_groups(expert_parallel_size))


def place_experts(model: SRDEModel, groups: ExpertGroups, transport: str) -> None:
    """Keep only this rank's experts in a model that has them all, and let its layers reach those of other ranks.

    Args:
        transport: "tokens" or "deltas".
    """
    experts, size = model.config.num_experts, dist.get_world_size(groups.expert_parallel)
    held = slots(experts, size)
    first = dist.get_rank(groups.expert_parallel) * held
    kinds: dict[str, type[TokenTransport | DeltaTransport]] = {"tokens": TokenTransport, "deltas": DeltaTransport}
    dispatch = kinds[transport](groups.expert_parallel, experts)
    for layer in model.layers:
        for key, parameter in _parameters(layer):
            # Scores stay whole, since the experts' masks are compared with each other.
            if parameter.srde_expert_axis is not None and parameter.srde_kind != "scores":
                axis = parameter.srde_expert_axis
                each = parameter.srde_shape[axis] // experts  # 3 matrices of an expert for neuron deltas
                setattr(layer.deltas, key, _part_of(parameter, axis, first * each, held * each, groups))
        layer.deltas.first_expert, layer.deltas.ranks_per_copy = first, size
        layer.dispatch = dispatch
        layer.preparation.drop()


def shard_atoms(model: SRDEModel, owners: ExpertGroups, groups: ExpertGroups | None, transport: str) -> None:
    """Keep only this rank's shard of atoms and importance, and exchange the shards of effective deltas made from it.

    Plain ZeRO-3 gathers atoms and importance, (A + E)·n values per layer, although the layer needs only the E·n
    effective deltas. Here each rank mixes its own shard, and the results travel; backwards their gradients travel,
    summed over ranks.

    Args:
        owners: groups in which every rank is alone with its shard.
        groups: those of expert parallelism, if any; with `transport` "tokens" a rank receives only its experts' deltas.
    """
    world, rank, experts = dist.get_world_size(), dist.get_rank(), model.config.num_experts
    dispatch, first, size = None, 0, 1
    exchange: GatherShards | SendShards = GatherShards()
    if groups is not None and transport == "tokens":
        size = dist.get_world_size(groups.expert_parallel)
        held = slots(experts, size)
        first = dist.get_rank(groups.expert_parallel) * held
        dispatch, exchange = TokenTransport(groups.expert_parallel, experts), SendShards(size, held)
    for layer in model.layers:
        bank = layer.deltas
        assert isinstance(bank, AtomDeltas)
        shard = bank.atoms.shape[0] // world  # the whole tensor is padded to a multiple of the world size
        for key, parameter in _parameters(layer):
            if parameter.srde_kind in ("atoms", "importance"):
                axis = bank.long_axis[parameter.srde_kind]
                setattr(bank, key, _part_of(parameter, axis, rank * shard, shard, owners))
        axis = bank.long_axis["values"]
        bank.exchange = partial(exchange, length=bank.length, axis=axis, expert_axis=bank.expert_axis)
        bank.length = shard
        bank.first_expert, bank.ranks_per_copy = first, size
        if dispatch is not None:
            layer.dispatch = dispatch
        layer.preparation.drop()


def _parameters(layer: SRDEFeedForward) -> list[tuple[str, Any]]:
    """Names and parameters; Any, because we and deepspeed add attributes to them."""
    return list(layer.deltas.named_parameters(recurse=False))


def _part_of(parameter: Any, axis: int, first: int, entries: int, groups: ExpertGroups) -> Any:
    """`entries` entries of a parameter along `axis`, from `first` on; those beyond its end are zero."""
    whole = parameter.srde_shape
    cut = TensorCut(axis, whole, first, max(0, min(entries, whole[axis] - first)))
    shape = list(whole)
    shape[axis] = entries
    if axis != 0:
        shape[0] = parameter.shape[0]  # with its padding
    values = torch.zeros(shape, dtype=parameter.dtype, device=parameter.device)
    if cut.entries:
        values.narrow(axis, 0, cut.entries).copy_(parameter.detach().narrow(axis, cut.first, cut.entries))
    local_shape = (*whole[:axis], entries, *whole[axis + 1 :])
    expert_axis = parameter.srde_expert_axis
    local: Any = tagged(values, parameter.srde_kind, expert_axis=expert_axis, shape=local_shape)
    local.srde_cut, local.srde_groups = cut, groups
    return local
