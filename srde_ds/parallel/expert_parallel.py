"""Which rank holds which experts (DESIGN §4).

With expert-parallel size P, ranks i·P … i·P + P − 1 form an expert-parallel group and share the experts among them:
its rank r holds slots r·E_l … (r + 1)·E_l − 1, E_l = ⌈E / P⌉. Slots from E on are padding: every rank must hold
tensors of the same shapes, or collectives hang. Ranks with the same r form an expert-data-parallel group: they hold
the same experts, and ZeRO partitions these over that group alone.
"""

from __future__ import annotations

import math

import torch
import torch.distributed as dist
from torch import nn

from srde_ds.errors import SRDEError
from srde_ds.model.adapter import SRDEModel
from srde_ds.parallel.topology import deepspeed
from srde_ds.parallel.transport import DeltaTransport, TokenTransport


def cut_experts(model: SRDEModel, expert_parallel_size: int, transport: str) -> None:
    """Keep this rank's experts of a whole model, and let the layers reach the others.

    Sets on every expert parameter the attributes by which DeepSpeed 0.19.8 partitions it over the
    expert-data-parallel group; with only some of them, gradients are silently P times too large or deltas are
    silently broadcast (DESIGN §3).

    Raises:
        SRDEError: `expert_parallel_size` does not divide the number of processes.
    """
    world_size = dist.get_world_size()
    if world_size % expert_parallel_size:
        raise SRDEError(
            f"expert_parallel_size={expert_parallel_size}: must divide the number of processes, {world_size}."
        )
    if expert_parallel_size == 1:
        return
    groups = deepspeed.utils.groups
    groups._create_expert_and_data_parallel(expert_parallel_size)
    name = f"ep_size_{expert_parallel_size}"
    group, data_group = groups._get_expert_parallel_group(name), groups._get_expert_data_parallel_group(name)
    experts = model.config.num_experts
    slots = math.ceil(experts / expert_parallel_size)
    first = dist.get_rank(group) * slots
    dispatch = (TokenTransport if transport == "tokens" else DeltaTransport)(group, experts)
    for layer in model.layers:
        for key, parameter in list(layer.deltas.named_parameters(recurse=False)):
            if parameter.srde_expert_axis is not None:
                local = _slots_of(parameter, experts, first, slots)
                local.ds_zero_partition_process_group = data_group
                local.ds_zero_placement_family = "autoep_expert"
                local.ds_zero_partition_group_name = name
                local.group_name = name
                local.allreduce = False
                setattr(layer.deltas, key, local)
        layer.deltas.first_expert = first
        layer.dispatch = dispatch


def _slots_of(parameter: nn.Parameter, experts: int, first: int, slots: int) -> nn.Parameter:
    """This rank's slots of a parameter; slots without an expert are zero."""
    axis = parameter.srde_expert_axis
    each = parameter.shape[axis] // experts  # entries of one expert on the axis: 3 matrices for neuron deltas
    real = max(0, min(slots, experts - first))
    shape = list(parameter.shape)
    shape[axis] = slots * each
    values = torch.zeros(shape, dtype=parameter.dtype, device=parameter.device)
    if real:
        values.narrow(axis, 0, real * each).copy_(parameter.detach().narrow(axis, first * each, real * each))
    local = nn.Parameter(values)
    for attribute in ("kind", "expert_axis", "rows"):
        setattr(local, f"srde_{attribute}", getattr(parameter, f"srde_{attribute}"))
    if axis == 0:
        local.srde_rows = slots
    local.srde_shape = (local.srde_rows, *shape[1:])
    local.srde_global_shape = parameter.srde_shape
    local.srde_first, local.srde_real = first * each, real * each
    return local
