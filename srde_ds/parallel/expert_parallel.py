"""Which rank holds which experts (DESIGN §4).

With expert-parallel size P, ranks i·P … i·P + P − 1 form an expert-parallel group and share the experts among them:
its rank r holds slots r·E_l … (r + 1)·E_l − 1, E_l = ⌈E / P⌉. Slots from E on are padding: every rank must hold
tensors of the same shapes, or collectives hang. Ranks with the same r form an expert-data-parallel group: they hold
the same experts, and ZeRO partitions these over that group alone.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from srde_ds.model.adapter import SRDEModel
from srde_ds.model.deltas import tagged
from srde_ds.parallel.topology import deepspeed
from srde_ds.parallel.transport import DeltaTransport, TokenTransport


@dataclass(frozen=True)
class ExpertCut:
    """Where a rank's slots lie in a tensor of all experts; counted in entries of the expert axis.

    Attributes:
        global_shape: shape of the whole tensor, without padding.
        first: the rank's first entry.
        entries: how many of its entries are experts; the others are padding.
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
    """Create DeepSpeed's groups for this size, or find them; a collective of all ranks."""
    groups = deepspeed.utils.groups
    groups._create_expert_and_data_parallel(expert_parallel_size)
    name = f"ep_size_{expert_parallel_size}"
    return ExpertGroups(name, groups._get_expert_parallel_group(name), groups._get_expert_data_parallel_group(name))


def cut_experts(model: SRDEModel, groups: ExpertGroups, transport: str) -> None:
    """Keep this rank's experts of a model that has them all, and let its layers reach the others.

    Args:
        transport: "tokens" or "deltas".
    """
    experts = model.config.num_experts
    slots = math.ceil(experts / dist.get_world_size(groups.expert_parallel))
    first = dist.get_rank(groups.expert_parallel) * slots
    kinds: dict[str, type[TokenTransport | DeltaTransport]] = {"tokens": TokenTransport, "deltas": DeltaTransport}
    dispatch = kinds[transport](groups.expert_parallel, experts)
    for layer in model.layers:
        parameters: dict[str, Any] = dict(layer.deltas.named_parameters(recurse=False))
        for key, parameter in parameters.items():
            if parameter.srde_expert_axis is not None:
                setattr(layer.deltas, key, _slots_of(parameter, experts, first, slots))
        layer.deltas.first_expert = first
        layer.dispatch = dispatch


def _slots_of(parameter: Any, experts: int, first: int, slots: int) -> Any:
    """This rank's slots of a parameter; slots without an expert are zero."""
    axis, whole = parameter.srde_expert_axis, parameter.srde_shape
    each = whole[axis] // experts  # entries of one expert on the axis: 3 matrices for neuron deltas
    cut = ExpertCut(axis, whole, first * each, max(0, min(slots, experts - first)) * each)
    shape = list(parameter.shape)
    shape[axis] = slots * each
    values = torch.zeros(shape, dtype=parameter.dtype, device=parameter.device)
    if cut.entries:
        values.narrow(axis, 0, cut.entries).copy_(parameter.detach().narrow(axis, cut.first, cut.entries))
    local_shape = (*whole[:axis], slots * each, *whole[axis + 1 :])
    local: Any = tagged(values, parameter.srde_kind, expert_axis=axis, shape=local_shape)
    local.srde_cut = cut
    return local
