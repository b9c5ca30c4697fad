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

import torch.distributed as dist
from torch import Tensor

from srde_ds.errors import SRDEError
from srde_ds.model.adapter import SRDEModel
from srde_ds.optim.gram_muon import GramMuonAdamW, Piece
from srde_ds.parallel.expert_parallel import ExpertCut, ExpertGroups
from srde_ds.parallel.pieces import TensorPiece


@dataclass(frozen=True)
class Partition:
    """This rank's piece of one trainable.

    Attributes:
        name: the tensor's global name (DESIGN §6).
        shape: of the rank's slots, without row padding.
        cut: where the rank's slots lie in the global tensor; None: the rank's tensor is the global one.
        start: flat index of the piece's first value in the rank's tensor.
        numel: values in the piece, padding included.
        offset: where the piece starts in the sub-group's flat master.
    """

    name: str
    shape: tuple[int, ...]
    cut: ExpertCut | None
    start: int
    numel: int
    offset: int

    def piece(self, kind: str, flat: Tensor) -> TensorPiece | None:
        """The part of a sub-group's flat tensor that is no padding, as checkpoints name it; None if there is none."""
        # Padding rows stand at the end of a tensor, padding experts at the end of its expert axis.
        real = max(0, min(self.numel, prod(self.shape) - self.start))
        data = flat[self.offset : self.offset + real]
        if self.cut is None:
            return TensorPiece(self.name, kind, self.shape, self.start, data) if real else None
        shape, first = self.cut.global_shape, self.cut.first
        inner = prod(shape[self.cut.axis + 1 :])
        if self.cut.axis == 0:
            real = max(0, min(real, self.cut.entries * inner - self.start))
            return TensorPiece(self.name, kind, shape, first * inner + self.start, data[:real]) if real else None
        row, global_row = self.shape[1] * inner, shape[1] * inner
        columns = self.cut.entries * inner
        if not real or not columns:
            return None
        # GramMuon's rows, or AdamW's on row-padded tensors: pieces are whole rows.
        block = data.view(-1, row)[:, :columns]
        offset = self.start // row * global_row + first * inner
        return TensorPiece(self.name, kind, shape, offset, block, stride=global_row)


@dataclass(frozen=True)
class SubGroup:
    """One flat fp32 master with the partitions in it."""

    master: Tensor
    param_group: dict[str, Any]
    process_group: dist.ProcessGroup | None
    partitions: list[Partition]


def mark_expert_placement(model: SRDEModel, groups: ExpertGroups) -> None:
    """Have ZeRO cut the experts' parameters over their own group; before `deepspeed.initialize`.

    All five attributes are needed: with only some of them, gradients are silently P times too large or deltas are
    silently broadcast (DESIGN §3).
    """
    for _, parameter in _trainables(model):
        if getattr(parameter, "srde_cut", None) is not None:
            parameter.ds_zero_partition_process_group = groups.expert_data_parallel
            parameter.ds_zero_placement_family = "autoep_expert"
            parameter.ds_zero_partition_group_name = groups.name
            parameter.group_name = groups.name
            parameter.allreduce = False


def sub_groups(engine: Any, model: SRDEModel) -> Iterator[SubGroup]:
    """The engine's flat masters, in the order of its optimizer calls; the same order on every rank."""
    zero = engine.optimizer
    names = {id(parameter): name for name, parameter in _trainables(model)}
    for index, parameters in enumerate(zero.fp16_groups):
        process_group = zero.sub_group_process_groups[index]
        rank = dist.get_rank(process_group)
        partitions, offset = [], 0
        for parameter in parameters:
            numel = parameter.partition_numel()
            cut = getattr(parameter, "srde_cut", None)
            partitions.append(Partition(names[id(parameter)], parameter.srde_shape, cut, rank * numel, numel, offset))
            offset += numel
        group = zero.optimizer.param_groups[zero.sub_group_to_group_id[index]]
        yield SubGroup(zero.fp32_partitioned_groups_flat[index], group, process_group, partitions)


def verify_placement(engine: Any, model: SRDEModel, groups: ExpertGroups | None = None) -> None:
    """Check on every rank that each trainable is cut over the group that its gradient is averaged over.

    A wrong group makes gradients silently too large or broadcasts one rank's values.

    Raises:
        SRDEError: names parameter, rank and both values.
    """
    rank, everyone = dist.get_rank(), list(range(dist.get_world_size()))
    owned = {part.name: part for sub_group in sub_groups(engine, model) for part in sub_group.partitions}
    for name, parameter in _trainables(model):
        if name not in owned:
            raise SRDEError(f"placement: rank {rank}: '{name}' is trainable but has no fp32 master.")
        cut = groups is not None and getattr(parameter, "srde_cut", None) is not None
        expected = dist.get_process_group_ranks(groups.expert_data_parallel) if groups and cut else everyone
        ranks = dist.get_process_group_ranks(parameter.ds_process_group)
        if ranks != expected:
            raise SRDEError(f"placement: rank {rank}: '{name}' is cut over ranks {ranks}, expected {expected}.")
        values = -(-prod(parameter.ds_shape) // len(expected))
        if owned[name].numel != values:
            raise SRDEError(f"placement: rank {rank}: '{name}' holds {owned[name].numel} values, expected {values}.")


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
            full_rows, batch, cols = part.shape
            if part.numel % (batch * cols):
                raise SRDEError(
                    f"'{part.name}': {part.numel} values a rank are no whole rows of {batch} x {cols}. "
                    "Pad its rows to a multiple of the world size (row_multiple of add_experts)."
                )
            rows = part.numel // (batch * cols)
            pieces.append(Piece(part.name, part.offset, rows, batch, cols, full_rows))
        optimizer.register_layout(sub_group.master, pieces, sub_group.process_group)


def state_pieces(engine: Any, model: SRDEModel, optimizer: GramMuonAdamW) -> list[TensorPiece]:
    """Views of this rank's masters and optimizer states, as the checkpoint writes and fills them.

    Of ranks that hold the same values, one gives them: replicas never exist, ZeRO cuts every trainable.
    """
    pieces = []
    for sub_group in sub_groups(engine, model):
        optimizer.allocate_state(sub_group.master, sub_group.param_group["rule"])
        kinds = {"master": sub_group.master.data} | dict(optimizer.state[sub_group.master])
        for kind, flat in kinds.items():
            pieces += [piece for part in sub_group.partitions if (piece := part.piece(kind, flat)) is not None]
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


def _trainables(model: SRDEModel) -> Iterator[tuple[str, Any]]:
    """Names and parameters; Any, for the attributes that DeepSpeed and the other floors hang on them."""
    yield from model.trainable_parameters()
