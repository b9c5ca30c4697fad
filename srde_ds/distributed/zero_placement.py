"""Which part of which trainable this rank owns. The only file that knows DeepSpeed's private attributes.

ZeRO stage 3 cuts each parameter, flattened row-major, into equal pieces over its process group and
concatenates the pieces of several parameters to one flat fp32 master tensor, a "sub-group".
Verified on deepspeed 0.19.8.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from math import prod
from typing import Any

import torch.distributed as dist
from torch import Tensor

from srde_ds.distributed.expert_parallel import ExpertGroups, TensorCut
from srde_ds.distributed.tensor_shard import TensorPiece
from srde_ds.errors import SRDEError
from srde_ds.model.adapter import SRDEModel
from srde_ds.optim.gram_muon import GramMuonAdamW
from srde_ds.optim.shards import MatrixShard, UpdatedBlock


@dataclass(frozen=True)
class Partition:
    """This rank's piece of one trainable.

    Attributes:
        name: the tensor's global name (DESIGN §6).
        kind: its `srde_kind`.
        shape: of the rank's tensor, without row padding.
        cut: where the rank's tensor lies in the global one; None: the rank's tensor is the global one.
        expert_axis: axis of the experts' own entries; None: all experts share all values.
        start: flat index of the piece's first value in the rank's tensor.
        numel: values in the piece, padding included.
        offset: where the piece starts in the sub-group's flat master.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    cut: TensorCut | None
    expert_axis: int | None
    start: int
    numel: int
    offset: int

    @classmethod
    def of(cls, name: str, parameter: Any, index: int, numel: int, offset: int) -> Partition:
        """Piece number `index` of a parameter that is cut into pieces of `numel` values."""
        # All ranks hold the whole router, but each of its rows belongs to an expert.
        axis = 0 if parameter.srde_kind == "router" else parameter.srde_expert_axis
        cut = getattr(parameter, "srde_cut", None)
        return cls(name, parameter.srde_kind, parameter.srde_shape, cut, axis, index * numel, numel, offset)

    def piece(self, kind: str, flat: Tensor) -> TensorPiece | None:
        """The part of a sub-group's flat tensor that is no padding, as checkpoints name it; None if there is none."""
        # Padding rows stand at the end of a tensor, padding of a cut at the end of the cut's axis.
        real = max(0, min(self.numel, prod(self.shape) - self.start))
        data = flat[self.offset : self.offset + real]
        if self.cut is None:
            return TensorPiece(self.name, kind, self.shape, self.start, data) if real else None
        shape, axis = self.cut.global_shape, self.cut.axis
        inner = prod(shape[axis + 1 :])
        first, columns = self.cut.first * inner, self.cut.entries * inner
        if axis == 0:
            real = max(0, min(real, columns - self.start))
            return TensorPiece(self.name, kind, shape, first + self.start, data[:real]) if real else None
        if not real or not columns:
            return None
        # Pieces are whole rows: GramMuon's, those of AdamW's row-padded tensors, and tensors that one rank holds.
        row, global_row = self.shape[axis] * inner, shape[axis] * inner
        block = data.view(-1, row)[:, :columns]
        offset = self.start // row * global_row + first
        return TensorPiece(self.name, kind, shape, offset, block, stride=global_row)

    def blocks(self, active: Callable[[int], bool], num_experts: int) -> list[UpdatedBlock]:
        """The piece's values that belong to active experts, as blocks of the sub-group's flat tensor."""
        if self.expert_axis is None:
            return [UpdatedBlock(self.offset, 1, self.numel, 0, self.numel)]
        whole = self.shape if self.cut is None else self.cut.global_shape
        each = whole[self.expert_axis] // num_experts
        inner = each * prod(self.shape[self.expert_axis + 1 :])
        slots = self.shape[self.expert_axis] // each
        cut_by_expert = self.cut is not None and self.cut.axis == self.expert_axis
        first = self.cut.first // each if self.cut is not None and cut_by_expert else 0
        runs = _runs([active(first + slot) for slot in range(slots)])
        if self.expert_axis == 0:  # a run of slots is contiguous, but the piece may begin and end within one
            ends = [(max(a * inner, self.start), min(b * inner, self.start + self.numel)) for a, b in runs]
            return [UpdatedBlock(self.offset + a - self.start, 1, b - a, 0, b - a) for a, b in ends if a < b]
        row = slots * inner
        return [UpdatedBlock(self.offset, self.numel // row, row, a * inner, b * inner) for a, b in runs]


def _runs(flags: list[bool]) -> list[tuple[int, int]]:
    """First and end of each run of True."""
    edges = [i for i in range(len(flags) + 1) if (i > 0 and flags[i - 1]) != (i < len(flags) and flags[i])]
    return list(zip(edges[::2], edges[1::2], strict=True))


@dataclass(frozen=True)
class SubGroup:
    """One flat fp32 master with the partitions in it."""

    master: Tensor
    param_group: dict[str, Any]
    process_group: dist.ProcessGroup | None
    partitions: list[Partition]


def mark_placement(model: SRDEModel) -> None:
    """Have ZeRO cut parameters that hold a part of a tensor over their own group; before `deepspeed.initialize`.

    All five attributes are needed: with only some of them, gradients are silently too large or values are silently
    broadcast (DESIGN §3).
    """
    for _, parameter in _trainables(model):
        groups: ExpertGroups | None = getattr(parameter, "srde_groups", None)
        if groups is not None:
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
            partitions.append(Partition.of(names[id(parameter)], parameter, rank, numel, offset))
            offset += numel
        group = zero.optimizer.param_groups[zero.sub_group_to_group_id[index]]
        yield SubGroup(zero.fp32_partitioned_groups_flat[index], group, process_group, partitions)


def verify_placement(engine: Any, model: SRDEModel) -> None:
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
        groups: ExpertGroups | None = getattr(parameter, "srde_groups", None)
        expected = dist.get_process_group_ranks(groups.expert_data_parallel) if groups else everyone
        ranks = dist.get_process_group_ranks(parameter.ds_process_group)
        if ranks != expected:
            raise SRDEError(f"placement: rank {rank}: '{name}' is cut over ranks {ranks}, expected {expected}.")
        values = -(-prod(parameter.ds_shape) // len(expected))
        if owned[name].numel != values:
            raise SRDEError(f"placement: rank {rank}: '{name}' holds {owned[name].numel} values, expected {values}.")


def restrict_updates(
    engine: Any, model: SRDEModel, optimizer: GramMuonAdamW, trained: frozenset[str], locked: frozenset[int]
) -> None:
    """Tell the optimizer what it may change: trainables of the kinds in `trained`, but nothing of `locked` experts.

    What is left out keeps its values and its optimizer state. GramMuon learns here how each of its flat partitions is
    cut into blocks of rows; call it once before the first step.

    Raises:
        SRDEError: a Muon partition does not fall on row boundaries.
    """
    experts = model.config.num_experts

    def active(expert: int) -> bool:
        return expert not in locked

    for sub_group in sub_groups(engine, model):
        muon = sub_group.param_group["rule"] == "muon"
        pieces: list[MatrixShard] = []
        windows: list[UpdatedBlock] = []
        for part in sub_group.partitions:
            blocks = part.blocks(active, experts) if part.kind in trained else []
            if muon:
                pieces += _muon_pieces(part, blocks)
            else:
                windows += blocks
        if muon:
            # Atoms cut by rows: the other rows are on all ranks, each alone in its group.
            cut_by_rows = any(part.kind == "atoms" and part.cut is not None for part in sub_group.partitions)
            group = dist.group.WORLD if cut_by_rows else sub_group.process_group
            optimizer.register_layout(sub_group.master, pieces, group)
        else:
            unrestricted = not locked and all(part.kind in trained for part in sub_group.partitions)
            optimizer.restrict(sub_group.master, None if unrestricted else windows)


def _muon_pieces(part: Partition, blocks: list[UpdatedBlock]) -> list[MatrixShard]:
    full_rows, batch, cols = part.shape if part.cut is None else (part.cut.global_shape[0], *part.shape[1:])
    if part.numel % (batch * cols):
        raise SRDEError(
            f"'{part.name}': {part.numel} values a rank are no whole rows of {batch} x {cols}. "
            "Pad its rows to a multiple of the world size (pad_to of its Sharding)."
        )
    rows = part.numel // (batch * cols)
    if part.expert_axis is None:
        ranges = [(0, batch)] if blocks else []
    else:
        ranges = [(block.first // cols, block.stop // cols) for block in blocks]
    # A tensor of which nothing is updated is an empty range: its name and place are still known.
    return [MatrixShard(part.name, part.offset, rows, batch, cols, full_rows, a, b) for a, b in ranges or [(0, 0)]]


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
    """Copy the fp32 masters into the parameters, after something else than a step has changed them."""
    zero = engine.optimizer
    zero.checkpoint_event_prologue()  # drops whole copies, which a gather would otherwise take for valid
    for index in range(len(zero.fp16_groups)):
        zero._reassign_or_swap_out_partitioned_parameters(index)
    zero.checkpoint_event_epilogue()  # gathers what stays whole


def step_was_skipped(engine: Any) -> bool:
    """True when DeepSpeed skipped the last update because the gradient norm was not finite."""
    return bool(engine.optimizer.overflow)


def _trainables(model: SRDEModel) -> Iterator[tuple[str, Any]]:
    """Names and parameters; Any, for the attributes that DeepSpeed and the other floors hang on them."""
    yield from model.trainable_parameters()
