"""Which part of which trainable this rank owns. The only file that knows DeepSpeed's private attributes.

ZeRO stage 3 cuts each parameter, flattened row-major, into equal pieces over its process group and
concatenates the pieces of several parameters to one flat fp32 master tensor, a "sub-group".
Verified on deepspeed 0.19.8.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from srde_ds.errors import SRDEError
from srde_ds.model.adapter import SRDEModel
from srde_ds.optim.gram_muon import GramMuonAdamW, Piece
from srde_ds.parallel.pieces import TensorPiece


@dataclass(frozen=True)
class Partition:
    """This rank's piece of one trainable.

    Attributes:
        name: the tensor's global name (DESIGN §6).
        parameter: the partitioned parameter; its full, row-padded shape is `ds_shape`.
        global_shape: the shape without row padding.
        start: flat index of the piece's first value in the parameter.
        numel: values in the piece, padding included.
        offset: where the piece starts in the sub-group's flat master.
    """

    name: str
    parameter: nn.Parameter
    global_shape: tuple[int, ...]
    start: int
    numel: int
    offset: int

    @property
    def real_numel(self) -> int:
        """Values in the piece that are not padding; padding only ever stands at the end of a tensor."""
        return max(0, min(self.numel, prod(self.global_shape) - self.start))


@dataclass(frozen=True)
class SubGroup:
    """One flat fp32 master with the partitions in it."""

    master: torch.Tensor
    param_group: dict[str, Any]
    process_group: dist.ProcessGroup | None
    partitions: list[Partition]


def sub_groups(engine: Any, model: SRDEModel) -> Iterator[SubGroup]:
    """The engine's flat masters, in the order of its optimizer calls; the same order on every rank."""
    zero = engine.optimizer
    names = {id(parameter): name for name, parameter in model.trainable_parameters()}
    for index, parameters in enumerate(zero.fp16_groups):
        process_group = zero.sub_group_process_groups[index]
        rank = dist.get_rank(process_group)
        partitions, offset = [], 0
        for parameter in parameters:
            numel = parameter.partition_numel()
            shape = (parameter.srde_rows, *parameter.ds_shape[1:])
            partitions.append(Partition(names[id(parameter)], parameter, shape, rank * numel, numel, offset))
            offset += numel
        group = zero.optimizer.param_groups[zero.sub_group_to_group_id[index]]
        yield SubGroup(zero.fp32_partitioned_groups_flat[index], group, process_group, partitions)


def verify_placement(engine: Any, model: SRDEModel, world_size: int) -> None:
    """Check on every rank that each trainable is cut over the group that its gradient is averaged over.

    A wrong group makes gradients silently too large or broadcasts one rank's values.

    Raises:
        SRDEError: names parameter, rank and both values.
    """
    rank = dist.get_rank()
    owned = {}
    for sub_group in sub_groups(engine, model):
        for part in sub_group.partitions:
            owned[part.name] = part
    parameters: dict[str, Any] = dict(model.trainable_parameters())  # with what ZeRO-3 adds to them
    for name, parameter in parameters.items():
        if name not in owned:
            raise SRDEError(f"placement: rank {rank}: '{name}' is trainable but has no fp32 master.")
        size = dist.get_world_size(parameter.ds_process_group)
        if size != world_size:
            raise SRDEError(f"placement: rank {rank}: '{name}' is cut over {size} ranks, expected {world_size}.")
        expected = -(-prod(parameter.ds_shape) // world_size)
        if owned[name].numel != expected:
            raise SRDEError(f"placement: rank {rank}: '{name}' holds {owned[name].numel} values, expected {expected}.")


def register_muon_layouts(engine: Any, model: SRDEModel, optimizer: GramMuonAdamW) -> None:
    """Tell GramMuon how each of its flat partitions is cut into blocks of rows.

    Raises:
        SRDEError: a partition does not fall on row boundaries.
    """
    for sub_group in sub_groups(engine, model):
        if sub_group.param_group["rule"] != "muon":
            continue
        pieces = []
        for part in sub_group.partitions:
            full_rows, batch, cols = part.global_shape
            if part.numel % (batch * cols):
                raise SRDEError(
                    f"'{part.name}': {part.numel} values a rank are no whole rows of {batch} x {cols}. "
                    "Pad its rows to a multiple of the world size (row_multiple of add_experts)."
                )
            rows = part.numel // (batch * cols)
            pieces.append(Piece(part.name, part.offset, rows, batch, cols, full_rows))
        optimizer.register_layout(sub_group.master, pieces, sub_group.process_group)


def state_pieces(engine: Any, model: SRDEModel, optimizer: GramMuonAdamW) -> list[TensorPiece]:
    """Views of this rank's masters and optimizer states, as the checkpoint writes and fills them."""
    pieces = []
    for sub_group in sub_groups(engine, model):
        optimizer.allocate_state(sub_group.master, sub_group.param_group["rule"])
        kinds = {"master": sub_group.master.data} | dict(optimizer.state[sub_group.master])
        for kind, flat in kinds.items():
            for part in sub_group.partitions:
                if part.real_numel:
                    data = flat[part.offset : part.offset + part.real_numel]
                    pieces.append(TensorPiece(part.name, kind, part.global_shape, part.start, data))
    return pieces


def publish_masters(engine: Any) -> None:
    """Copy the fp32 masters into the parameters, after a checkpoint has filled them."""
    zero = engine.optimizer
    for index in range(len(zero.fp16_groups)):
        zero._reassign_or_swap_out_partitioned_parameters(index)
    if zero.persistent_parameters:
        zero.persistent_parameters[0].all_gather(zero.persistent_parameters)


def step_was_skipped(engine: Any) -> bool:
    """True when DeepSpeed skipped the last update because the gradient norm was not finite."""
    return bool(engine.optimizer.overflow)
