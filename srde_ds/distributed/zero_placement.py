"""Knows which part of which trainable this rank owns.

ZeRO stage 3 flattens each parameter (row-major), cuts it into equal parts over its process group, and concatenates the
parts of several parameters into one flat fp32 master tensor, a "sub-group".
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from math import prod
from typing import Any

import torch.distributed as dist
from torch import Tensor

from srde_ds.checkpoint.tensor_slice import TensorSlice
from srde_ds.distributed import deepspeed_internals as internals
from srde_ds.distributed.expert_parallel import ExpertGroups, TensorCut
from srde_ds.errors import SRDEError
from srde_ds.model.adapter import SRDEModel
from srde_ds.optim.gram_muon import GramMuonAdamW
from srde_ds.optim.shards import MatrixShard, UpdatedBlock


@dataclass(frozen=True)
class Partition:
    """This rank's part of one trainable.

    Attributes:
        name: the tensor's stable name, as in files (docs/design.md, "Files").
        kind: its `srde_kind`.
        shape: shape of the rank's tensor, without padding.
        cut: place of the rank's tensor in the global one; None: the rank's tensor is the global one.
        expert_axis: axis along which each expert has entries of its own; None: all experts share all values.
        start: flat index of the part's first value in the rank's tensor.
        numel: number of values in the part, padding included.
        offset: start of the part in the sub-group's flat master.
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
        """Part number `index` of a parameter that is cut into parts of `numel` values, at `offset` in the master."""
        # All ranks hold the whole router, in which each expert has its own vector.
        axis = 0 if parameter.srde_kind == "router" else parameter.srde_expert_axis
        cut = getattr(parameter, "srde_cut", None)
        return cls(name, parameter.srde_kind, parameter.srde_shape, cut, axis, index * numel, numel, offset)

    def slice(self, kind: str, flat: Tensor) -> TensorSlice | None:
        """The part's values in a sub-group's flat tensor, as checkpoints name them; None if they are all padding."""
        # A tensor is padded at its end, a cut at the end of its axis.
        real = max(0, min(self.numel, prod(self.shape) - self.start))
        data = flat[self.offset : self.offset + real]
        if self.cut is None:
            return TensorSlice(self.name, kind, self.shape, self.start, data) if real else None
        shape, axis = self.cut.global_shape, self.cut.axis
        inner = prod(shape[axis + 1 :])
        first, run = self.cut.first * inner, self.cut.entries * inner
        if axis == 0:
            real = max(0, min(real, run - self.start))
            return TensorSlice(self.name, kind, shape, first + self.start, data[:real]) if real else None
        if not real or not run:
            return None
        # The part consists of whole lines of the tensor as a matrix. This holds for GramMuon's tensors, for AdamW's,
        # which are padded for it, and for tensors that one rank holds alone.
        line, global_line = self.shape[axis] * inner, shape[axis] * inner
        block = data.view(-1, line)[:, :run]
        offset = self.start // line * global_line + first
        return TensorSlice(self.name, kind, shape, offset, block, stride=global_line)

    def blocks(self, active: Callable[[int], bool], num_experts: int) -> list[UpdatedBlock]:
        """The values of active experts in this part, as blocks of the sub-group's flat tensor."""
        if self.expert_axis is None:
            return [UpdatedBlock(self.offset, 1, self.numel, 0, self.numel)]
        whole = self.shape if self.cut is None else self.cut.global_shape
        each = whole[self.expert_axis] // num_experts
        inner = each * prod(self.shape[self.expert_axis + 1 :])
        slots = self.shape[self.expert_axis] // each
        cut_by_expert = self.cut is not None and self.cut.axis == self.expert_axis
        first = self.cut.first // each if self.cut is not None and cut_by_expert else 0
        runs = _runs([active(first + slot) for slot in range(slots)])
        if self.expert_axis == 0:  # the slots' values are contiguous, but the part may begin and end within a slot
            ends = [(max(a * inner, self.start), min(b * inner, self.start + self.numel)) for a, b in runs]
            return [UpdatedBlock(self.offset + a - self.start, 1, b - a, 0, b - a) for a, b in ends if a < b]
        line = slots * inner
        return [UpdatedBlock(self.offset, self.numel // line, line, a * inner, b * inner) for a, b in runs]


def _runs(flags: list[bool]) -> list[tuple[int, int]]:
    """Start and end of each run of True."""
    edges = [i for i in range(len(flags) + 1) if (i > 0 and flags[i - 1]) != (i < len(flags) and flags[i])]
    return list(zip(edges[::2], edges[1::2], strict=True))


@dataclass(frozen=True)
class SubGroup:
    """A flat fp32 master with the partitions in it."""

    master: Tensor
    param_group: dict[str, Any]
    process_group: dist.ProcessGroup | None
    partitions: list[Partition]


def mark_placement(model: SRDEModel) -> None:
    """Have ZeRO partition parameters that are part of a tensor over their own group, before `deepspeed.initialize`."""
    for _, parameter in _trainables(model):
        groups: ExpertGroups | None = getattr(parameter, "srde_groups", None)
        if groups is not None:
            internals.partition_over(parameter, groups.expert_data_parallel, groups.name)


def sub_groups(engine: Any, model: SRDEModel) -> Iterator[SubGroup]:
    """The engine's sub-groups, in the order of its optimizer calls; the same on every rank."""
    names = {id(parameter): name for name, parameter in _trainables(model)}
    for flat in internals.flat_masters(engine):
        rank = dist.get_rank(flat.process_group)
        partitions, offset = [], 0
        for parameter, numel in flat.parameters:
            partitions.append(Partition.of(names[id(parameter)], parameter, rank, numel, offset))
            offset += numel
        yield SubGroup(flat.tensor, flat.param_group, flat.process_group, partitions)


def verify_placement(engine: Any, model: SRDEModel) -> None:
    """Check on every rank that each trainable is partitioned over the group that its gradient is averaged over.

    With a wrong group, gradients are silently too large, or one rank's values replace the others'.

    Raises:
        SRDEError: a placement is wrong; the message names parameter, rank and both values.
    """
    rank, everyone = dist.get_rank(), list(range(dist.get_world_size()))
    owned = {part.name: part for sub_group in sub_groups(engine, model) for part in sub_group.partitions}
    for name, parameter in _trainables(model):
        if name not in owned:
            raise SRDEError(f"placement: rank {rank}: '{name}' is trainable but has no fp32 master.")
        groups: ExpertGroups | None = getattr(parameter, "srde_groups", None)
        expected = dist.get_process_group_ranks(groups.expert_data_parallel) if groups else everyone
        ranks = dist.get_process_group_ranks(internals.partition_group(parameter))
        if ranks != expected:
            raise SRDEError(f"placement: rank {rank}: '{name}' is cut over ranks {ranks}, expected {expected}.")
        values = -(-prod(parameter.srde_whole_shape) // len(expected))
        if owned[name].numel != values:
            raise SRDEError(f"placement: rank {rank}: '{name}' holds {owned[name].numel} values, expected {values}.")


def restrict_updates(
    engine: Any, model: SRDEModel, optimizer: GramMuonAdamW, trained: frozenset[str], locked: frozenset[int]
) -> None:
    """Tell the optimizer what it may change: trainables of the kinds in `trained`, but nothing of `locked` experts.

    All others keep their values and optimizer state. GramMuon learns here how each of its flat partitions divides into
    matrices, so call this once before the first step.

    Raises:
        SRDEError: a Muon partition does not consist of whole lines of its matrices.
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
                pieces += _matrix_shards(part, blocks)
            else:
                windows += blocks
        if muon:
            # The atoms' shards are on all ranks, although each rank is alone in its group.
            sharded = any(part.kind == "atoms" and part.cut is not None for part in sub_group.partitions)
            group = dist.group.WORLD if sharded else sub_group.process_group
            optimizer.register_layout(sub_group.master, pieces, group)
        else:
            unrestricted = not locked and all(part.kind in trained for part in sub_group.partitions)
            optimizer.restrict(sub_group.master, None if unrestricted else windows)


def _matrix_shards(part: Partition, blocks: list[UpdatedBlock]) -> list[MatrixShard]:
    whole_height, batch, cols = part.shape if part.cut is None else (part.cut.global_shape[0], *part.shape[1:])
    if part.numel % (batch * cols):
        raise SRDEError(
            f"'{part.name}': {part.numel} values per rank are not whole rows of {batch} x {cols}. "
            "Pad its rows to a multiple of the world size (pad_to of its Sharding)."
        )
    height = part.numel // (batch * cols)
    if part.expert_axis is None:
        ranges = [(0, batch)] if blocks else []
    else:
        ranges = [(block.first // cols, block.stop // cols) for block in blocks]
    # A tensor that is not updated gets an empty range, which still tells its name and place.
    return [MatrixShard(part.name, part.offset, height, batch, cols, whole_height, a, b) for a, b in ranges or [(0, 0)]]


def state_slices(engine: Any, model: SRDEModel, optimizer: GramMuonAdamW) -> list[TensorSlice]:
    """Views of this rank's masters and optimizer states, for the checkpoint to write and fill.

    No value is on two ranks, since ZeRO partitions every trainable.
    """
    slices = []
    for sub_group in sub_groups(engine, model):
        optimizer.allocate_state(sub_group.master, sub_group.param_group["rule"])
        kinds = {"master": sub_group.master.data} | dict(optimizer.state[sub_group.master])
        for kind, flat in kinds.items():
            slices += [part.slice(kind, flat) for part in sub_group.partitions]
    return [found for found in slices if found is not None]


def _trainables(model: SRDEModel) -> Iterator[tuple[str, Any]]:
    """Names and parameters; Any, because we and deepspeed add attributes to them."""
    yield from model.trainable_parameters()
