"""Everything that this package uses beyond deepspeed's public interface. Verified with deepspeed 0.19.8.

No other file may use private parts of deepspeed (tests/unit/test_imports.py): check this one with each new release.
"""

from __future__ import annotations

import datetime
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

if not torch.cuda.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # must be set before deepspeed is imported

import deepspeed as deepspeed
from deepspeed.runtime import compiler
from deepspeed.runtime.zero import parameter_offload, stage3
from deepspeed.runtime.zero.partitioned_param_coordinator import PartitionedParameterCoordinator

_TORCH_LINEAR = F.linear


def adopt_mpi_launcher() -> None:
    """Copy what Open MPI says about the processes into torch's environment variables."""
    deepspeed.comm.comm.mpi_discovery(verbose=False)


def avoid_jit_builds() -> None:
    """Keep deepspeed's CPU backend from compiling its shared-memory collectives at start, which takes 80 s.

    Only that backend looks into deepspeed's table of operators that can be compiled. Without an entry, the first look
    would fill the whole table, for which every process runs compilers and other programs.
    """
    vars(deepspeed.ops).setdefault("__compatible_ops__", {})["deepspeed_shm_comm"] = False


def import_muon_uncompiled() -> None:
    """Import deepspeed's Muon, which this package does not use, without torch's compiler.

    `deepspeed.initialize` imports it for any optimizer. Its functions are compiled by decorators, and loading the
    compiler for them takes each process more than a second.
    """
    original, compiler.compile = compiler.compile, lambda: compiler.dummy_decorator
    try:
        import deepspeed.runtime.zero.muon.original_muon  # noqa: F401
    finally:
        compiler.compile = original


def limit_new_groups(limit: datetime.timedelta) -> None:
    """Set the timeout of the groups that deepspeed creates.

    Torch's default is half an hour on gloo and ten minutes on NCCL, for connecting as well: if a rank is killed between
    the creation of two groups, its partner would wait that long.
    """
    deepspeed.comm.comm.cdb.new_group = lambda ranks: dist.new_group(ranks, timeout=limit)


def expert_and_data_groups(size: int) -> tuple[str, dist.ProcessGroup, dist.ProcessGroup]:
    """This rank's expert-parallel group (its name, too) and expert-data-parallel group for a size `size`.

    A collective of all ranks, which creates the groups unless they exist.
    """
    groups, name = deepspeed.utils.groups, f"ep_size_{size}"
    groups._create_expert_and_data_parallel(size)
    return name, groups._get_expert_parallel_group(name), groups._get_expert_data_parallel_group(name)


def partition_over(parameter: Any, group: dist.ProcessGroup, name: str) -> None:
    """Have ZeRO partition a parameter over `group` instead of all ranks. Call it before `deepspeed.initialize`.

    All five attributes are needed. With only some of them, gradients are silently too large, or one rank's values
    silently replace the others'.
    """
    parameter.ds_zero_partition_process_group = group
    parameter.ds_zero_placement_family = "autoep_expert"
    parameter.ds_zero_partition_group_name = name
    parameter.group_name = name
    parameter.allreduce = False


def partition_group(parameter: Any) -> dist.ProcessGroup:
    """The group over which ZeRO has partitioned a parameter."""
    group: dist.ProcessGroup = parameter.ds_process_group
    return group


def note_whole_shapes(model: nn.Module) -> None:
    """Note the whole shape of each parameter that ZeRO holds in its attribute `srde_whole_shape`, for model code."""
    parameter: Any
    for parameter in model.parameters():
        if hasattr(parameter, "ds_shape"):
            parameter.srde_whole_shape = tuple(parameter.ds_shape)


def leave_alone(module: nn.Module) -> None:
    """Have deepspeed neither partition nor gather the frozen parameters in `module`, before `deepspeed.initialize`.

    They become plain attributes, which compute in the same way, but which deepspeed does not see. Nor does it move
    them: a buffer of int8 weights from bitsandbytes would lose its scales.
    """
    for part in module.modules():
        for name, parameter in list(part.named_parameters(recurse=False)):
            if not parameter.requires_grad:
                delattr(part, name)
                object.__setattr__(part, name, parameter)


def restore_linear() -> None:
    """Undo deepspeed's replacement of torch's linear function by one that gathered weights need.

    Deepspeed never does. Its function keeps its input for the backward even if the weight is frozen.
    """
    F.linear = _TORCH_LINEAR


@contextmanager
def hooked_as_one(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Within this context, `deepspeed.initialize` hooks each of these modules as a whole, not its submodules.

    Their weights are gathered and released together; deepspeed calls them "leaf modules". A trainable's gradient is
    still reduced as soon as it exists, as elsewhere. Deepspeed itself would reduce when the module's input gets its
    gradient, and would take a gradient that comes later for zero.
    """
    for module in modules:
        deepspeed.utils.set_z3_leaf_module(module, True)
    in_leaf, stage3.z3_leaf_parameter = stage3.z3_leaf_parameter, lambda parameter: False
    try:
        yield
    finally:
        stage3.z3_leaf_parameter = in_leaf


def gather_in_one_order() -> None:
    """Have all ranks gather parameters of several process groups in the same order.

    Deepspeed takes them from a set, whose order differs between processes. On NCCL, two ranks that start the gathers of
    two groups in different orders wait for each other forever.
    """
    name = "_PartitionedParameterCoordinator__all_gather_params_"
    original = getattr(PartitionedParameterCoordinator, name)

    def ordered(coordinator: Any, parameters: Iterable[Any], *arguments: Any, **options: Any) -> None:
        original(coordinator, sorted(parameters, key=lambda parameter: parameter.ds_id), *arguments, **options)

    if original.__name__ != ordered.__name__:  # not yet done
        setattr(PartitionedParameterCoordinator, name, ordered)


def forget(model: nn.Module) -> None:
    """Remove a model from where deepspeed keeps every one that it has trained, so that its memory is freed.

    Those are a list of modules whose first entries are never taken out, and a cache of what to release after a module.
    """
    stack = parameter_offload.FWD_MODULE_STACK
    stack[:] = [module for module in stack if module is not model]
    release = PartitionedParameterCoordinator._PartitionedParameterCoordinator__params_to_release
    for cell in release.__closure__:  # a wrapper without __wrapped__
        cell.cell_contents.cache_clear()


def is_hooked_for_nothing(module: object) -> bool:
    """Whether deepspeed has given a module without parameters its hooks, whose only task is to gather parameters."""
    return isinstance(module, nn.Module) and hasattr(module, "ds_id") and next(module.parameters(), None) is None


@dataclass(frozen=True)
class FlatMaster:
    """A flat fp32 master tensor of this rank; deepspeed calls it a "sub-group".

    Attributes:
        process_group: the group over which its parameters are partitioned.
        parameters: each parameter of which it holds a part, in order, with the number of values in that part,
            padding included.
    """

    tensor: Tensor
    param_group: dict[str, Any]
    process_group: dist.ProcessGroup | None
    parameters: list[tuple[Any, int]]


def flat_masters(engine: Any) -> Iterator[FlatMaster]:
    """The engine's flat masters, in the order of its optimizer calls; the same on every rank."""
    zero = engine.optimizer
    for index, parameters in enumerate(zero.fp16_groups):
        yield FlatMaster(
            zero.fp32_partitioned_groups_flat[index],
            zero.optimizer.param_groups[zero.sub_group_to_group_id[index]],
            zero.sub_group_process_groups[index],
            [(parameter, parameter.partition_numel()) for parameter in parameters],
        )


def publish_masters(engine: Any) -> None:
    """Copy the fp32 masters into the parameters, after something other than a step has changed the masters."""
    zero = engine.optimizer
    zero.checkpoint_event_prologue()  # drops whole copies, which a gather would otherwise take as valid
    for index in range(len(zero.fp16_groups)):
        zero._reassign_or_swap_out_partitioned_parameters(index)
    zero.checkpoint_event_epilogue()  # gathers what stays whole


def step_was_skipped(engine: Any) -> bool:
    """Whether deepspeed skipped the last update because the gradient norm was not finite."""
    return bool(engine.optimizer.overflow)


def release_gathered(engine: Any) -> None:
    """After a backward without the engine, release modules whose input has no gradient (the embedding)."""
    engine.optimizer.parameter_offload.release_backward_leftovers()
