"""Shrinks supports: chooses the entries that stay, and reduces a layer's tensors to these.

This works on stored tensors ("deltas.free", "deltas.atoms" and others, see `deltas.py`) and on anything of the same
shape, such as optimizer state.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from srde_ds.config import AdapterConfig
from srde_ds.config.granularity import BLOCK_SIDE
from srde_ds.model.deltas import empty_deltas
from srde_ds.model.supports.learned import GROUP_SIZE, kept_entries
from srde_ds.model.supports.selection import ranking


def kept_positions(config: AdapterConfig, values: Mapping[str, Tensor], size: int, keep: int) -> Tensor:
    """Positions in the support that stay, `[S, keep]` int64, ascending; S = E if each expert keeps its own, else 1.

    Learned scores decide, if there are any. Otherwise the size of the effective delta does: the norm of a neuron's
    gate, up and down values or of a block's values, or a single weight's absolute value; among equal ones the lower
    position stays. Experts that share a support keep the same positions, by the root of the sum of squares over the
    experts. So do experts with their own supports but shared atoms, since an atom has one value for each position.

    Args:
        values: the layer's tensors without padding, by the last part of their names: "free", or "atoms", "importance"
            and "mixing"; "scores" if the support was learned.
        size: number of entries in the support.
        keep: number of entries that stay.
    """
    if "scores" in values:
        kept = kept_entries(values["scores"], entries=size, keep=keep, group=GROUP_SIZE[config.granularity])
        return kept.nonzero()[:, 1].view(-1, keep)
    strength_Em = _strength(config, values, size)
    if config.support_scope == "shared" or config.num_atoms:
        strength_Em = torch.linalg.vector_norm(strength_Em, dim=0, keepdim=True)
    return torch.stack([ranking(strength, keep).sort().values for strength in strength_Em])


def at_positions(config: AdapterConfig, name: str, tensor: Tensor, positions: Tensor) -> Tensor:
    """The entries of a stored tensor that stay. A tensor without entries of the support (router, mixing) stays whole.

    Args:
        name: such as "layers.{i}.support" or "layers.{i}.deltas.free".
        positions: the result of `kept_positions`.
    """
    kind = name.rpartition(".")[2]
    if config.granularity == "block" and kind in ("free", "importance", "atoms"):
        inside = torch.arange(BLOCK_SIDE**2)
        positions = (BLOCK_SIDE**2 * positions[:, :, None] + inside).flatten(1)
    if kind == "support":
        supports_Sm = tensor.view(-1, tensor.shape[-1])
        return supports_Sm.gather(1, positions.expand(len(supports_Sm), -1)).view(*tensor.shape[:-1], -1)
    if kind == "free":  # [D, 3*E, m] or [E, n]
        if len(positions) == 1:
            return tensor.index_select(-1, positions[0])
        index = positions.repeat_interleave(tensor.shape[-2] // len(positions), dim=0)
        return tensor.gather(-1, index.expand(*tensor.shape[:-1], -1))
    if kind == "importance":
        return tensor.index_select(-1, positions[0])
    if kind == "atoms":
        return tensor.index_select(-1 if config.granularity == "neuron" else 0, positions[0])
    return tensor


def _strength(config: AdapterConfig, values: Mapping[str, Tensor], size: int) -> Tensor:
    """`[E, m]` or `[E, n]` float64: the norm of each entry's effective delta."""
    neuron, kind = config.granularity == "neuron", "free" if config.num_atoms == 0 else "atoms"
    hidden = values[kind].shape[0] if neuron else 0
    # Stored rows are those of one part already: without parts the bank expects just these.
    bank = empty_deltas(replace(config, neuron_parts=1), hidden=hidden, size=size)
    bank.load_state_dict({name: values[name] for name in bank.state_dict()}, assign=True)
    with torch.no_grad():
        deltas = bank()
        if neuron:
            return torch.linalg.vector_norm(deltas, dim=(0, 2), dtype=torch.float64)
        by_entry = deltas.unflatten(1, (size, -1))
        return torch.linalg.vector_norm(by_entry, dim=2, dtype=torch.float64)
