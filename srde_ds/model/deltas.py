"""The values of the deltas: free for each expert, or mixed from atoms that the experts share.

Every parameter carries attributes that the placement of tensors reads:
`srde_kind` ("free", "atoms", "importance", "mixing", "router"), `srde_expert_axis` (the axis that counts
experts, None if all experts share the tensor), `srde_shape` (the shape without padding rows) and
`srde_rows` (`srde_shape[0]`). A bank takes the number of experts from its parameters, so a bank whose
parameters were cut along their expert axis works as it is, with `first_expert` set to the first it holds.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, ClassVar, cast

import torch
from torch import Tensor, nn

from srde_ds.config import AdapterConfig
from srde_ds.model.seeding import seeded_generator

# sigma(2) = 0.88: a fresh atom passes almost unscaled, so its learning rate keeps its meaning, and the gate is
# still steep enough (slope 0.1) to close.
INITIAL_IMPORTANCE = 2.0


if TYPE_CHECKING:

    class Trainable(nn.Parameter):
        """For the type checker; at run time a plain parameter with these attributes."""

        srde_kind: str
        srde_expert_axis: int | None
        srde_shape: tuple[int, ...]
        srde_rows: int


def tagged(data: Tensor, kind: str, *, expert_axis: int | None, shape: tuple[int, ...] | None = None) -> Trainable:
    """A parameter with the attributes that the module's docstring lists."""
    parameter = nn.Parameter(data)
    shape = tuple(data.shape) if shape is None else shape
    for name, value in (("kind", kind), ("expert_axis", expert_axis), ("shape", shape), ("rows", shape[0])):
        setattr(parameter, f"srde_{name}", value)
    return cast("Trainable", parameter)


def padded_zeros(shape: tuple[int, ...], row_multiple: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    rows = math.ceil(shape[0] / row_multiple) * row_multiple
    return torch.zeros(rows, *shape[1:], dtype=dtype, device=device)


class DeltaBank(nn.Module):
    """The effective deltas of one layer's experts.

    `forward()` gives `[D, E, 3, m]` (neuron granularity; 0 gate, 1 up, 2 down; gate and up rows transposed so
    that D comes first) or `[E, n]` (element granularity, in the order of the support).
    """

    expert_axis: ClassVar[int]  # of the effective deltas
    first_expert: int = 0

    def square_norms(self, deltas: Tensor) -> Tensor:
        """`[E]`, at least fp32: squared norm of each expert's part of a tensor shaped like the effective deltas."""
        dims = [d for d in range(deltas.dim()) if d != self.expert_axis]
        precision = torch.promote_types(deltas.dtype, torch.float32)
        return torch.linalg.vector_norm(deltas, dim=dims, dtype=precision).square()


class FreeNeuronDeltas(DeltaBank):
    """free `[D, 3*E, m]`, index 3*e + k on the middle axis."""

    expert_axis = 1

    def __init__(
        self, hidden: int, experts: int, size: int, row_multiple: int, dtype: torch.dtype, device: torch.device
    ):
        super().__init__()
        shape = (hidden, 3 * experts, size)
        self.hidden = hidden
        self.free = tagged(padded_zeros(shape, row_multiple, dtype, device), "free", expert_axis=1, shape=shape)

    def forward(self) -> Tensor:
        return self.free[: self.hidden].unflatten(1, (-1, 3))


class FreeElementDeltas(DeltaBank):
    """free `[E, n]`."""

    expert_axis = 0

    def __init__(self, experts: int, size: int, dtype: torch.dtype, device: torch.device):
        super().__init__()
        self.free = tagged(torch.zeros(experts, size, dtype=dtype, device=device), "free", expert_axis=0)

    def forward(self) -> Tensor:
        return self.free.view_as(self.free)


class AtomDeltas(DeltaBank):
    """delta_e = (c_e . atoms) * sigma(importance_e), with c the mixing matrix `[E, A]` or its row softmax."""

    mixing: nn.Parameter
    softmax: bool

    def coefficients(self) -> Tensor:
        """c, `[E, A]`."""
        return self.mixing.softmax(dim=1) if self.softmax else self.mixing

    def init_mixing(
        self, config: AdapterConfig, dtype: torch.dtype, device: torch.device, generator: torch.Generator
    ) -> None:
        """Random rows, so that experts differ from the first step on; linear rows have norm about 1."""
        self.softmax = config.atom_mixing == "softmax"
        rows = torch.randn(config.num_experts, config.num_atoms, generator=generator)
        if not self.softmax:
            rows /= math.sqrt(config.num_atoms)
        self.mixing = tagged(rows.to(dtype=dtype, device=device), "mixing", expert_axis=0)


class AtomNeuronDeltas(AtomDeltas):
    """atoms `[D, 3*A, m]`, index 3*a + k on the middle axis; importance `[E, 3, D, m]`."""

    expert_axis = 1

    def __init__(
        self,
        config: AdapterConfig,
        hidden: int,
        size: int,
        row_multiple: int,
        dtype: torch.dtype,
        device: torch.device,
        generator: torch.Generator,
    ):
        super().__init__()
        shape = (hidden, 3 * config.num_atoms, size)
        importance = torch.full((config.num_experts, 3, hidden, size), INITIAL_IMPORTANCE, dtype=dtype, device=device)
        self.hidden = hidden
        self.atoms = tagged(padded_zeros(shape, row_multiple, dtype, device), "atoms", expert_axis=None, shape=shape)
        self.importance = tagged(importance, "importance", expert_axis=0)
        self.init_mixing(config, dtype, device, generator)

    def forward(self) -> Tensor:
        atoms = self.atoms[: self.hidden].unflatten(1, (-1, 3))
        mixed = (self.coefficients() @ atoms.flatten(2)).unflatten(2, (3, -1))
        return mixed * self.importance.sigmoid().permute(2, 0, 1, 3)


class AtomElementDeltas(AtomDeltas):
    """atoms `[n, 1, A]`, importance `[E, n]`."""

    expert_axis = 0

    def __init__(
        self,
        config: AdapterConfig,
        size: int,
        row_multiple: int,
        dtype: torch.dtype,
        device: torch.device,
        generator: torch.Generator,
    ):
        super().__init__()
        shape = (size, 1, config.num_atoms)
        importance = torch.full((config.num_experts, size), INITIAL_IMPORTANCE, dtype=dtype, device=device)
        self.size = size
        self.atoms = tagged(padded_zeros(shape, row_multiple, dtype, device), "atoms", expert_axis=None, shape=shape)
        self.importance = tagged(importance, "importance", expert_axis=0)
        self.init_mixing(config, dtype, device, generator)

    def forward(self) -> Tensor:
        mixed = self.coefficients() @ self.atoms[: self.size].squeeze(1).T
        return mixed * self.importance.sigmoid()


def build_deltas(
    config: AdapterConfig,
    *,
    hidden: int,
    size: int,
    seed: int,
    layer: int,
    dtype: torch.dtype,
    device: torch.device,
    row_multiple: int = 1,
) -> DeltaBank:
    """The bank that `config` asks for, with all effective deltas zero.

    Args:
        size: m or n, see `supports.support_size`.
        row_multiple: pad the long first axis of neuron deltas and of atoms with zero rows to a multiple of this;
            the padding never gets a gradient.
    """
    if config.num_atoms == 0:
        if config.granularity == "neuron":
            return FreeNeuronDeltas(hidden, config.num_experts, size, row_multiple, dtype, device)
        return FreeElementDeltas(config.num_experts, size, dtype, device)
    generator = seeded_generator(seed, "mixing", layer)
    if config.granularity == "neuron":
        return AtomNeuronDeltas(config, hidden, size, row_multiple, dtype, device, generator)
    return AtomElementDeltas(config, size, row_multiple, dtype, device, generator)
