"""The values of the deltas: independent for each expert ("free"), or mixed from atoms that the experts share.

Every parameter carries attributes that the placement of tensors reads: `srde_kind` ("free", "atoms", "importance",
"mixing", "scores", "router"), `srde_expert_axis` (the axis that counts experts; None: all experts share the tensor) and
`srde_shape` (the shape without the padding at the end of the first axis). A bank reads the number of experts from its
parameters, so after its parameters are cut along their expert axis it still works, once `first_expert` is set to the
first expert that it holds.

The letters of the shapes are in the docstring of `srde_ds.model`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from srde_ds.config import AdapterConfig
from srde_ds.config.granularity import entry_weights
from srde_ds.model.seeding import seeded_generator
from srde_ds.model.statistics import add_delta_gradient
from srde_ds.model.supports.learned import GROUP_SIZE, SupportGate

# sigma(2) = 0.88 passes a new atom almost unscaled, so that its learning rate keeps its meaning, while the gate is
# still steep enough (slope 0.1) to close.
INITIAL_IMPORTANCE = 2.0


if TYPE_CHECKING:

    class Trainable(nn.Parameter):
        """For the type checker only; at run time it is a plain parameter with these attributes."""

        srde_kind: str
        srde_expert_axis: int | None
        srde_shape: tuple[int, ...]


def tagged(data: Tensor, kind: str, *, expert_axis: int | None, shape: tuple[int, ...] | None = None) -> Trainable:
    """A parameter with the attributes that the module's docstring lists; `shape` defaults to that of `data`."""
    parameter = nn.Parameter(data)
    shape = tuple(data.shape) if shape is None else shape
    for name, value in (("kind", kind), ("expert_axis", expert_axis), ("shape", shape)):
        setattr(parameter, f"srde_{name}", value)
    return cast("Trainable", parameter)


def without_padding(parameter: Tensor, length: int) -> Tensor:
    """The first `length` rows. Only if there are more, since the backward of a slice fills a tensor with zeros."""
    return parameter if len(parameter) == length else parameter[:length]


@dataclass(frozen=True)
class Storage:
    """How the values of a bank are stored.

    Attributes:
        pad_to: the long first axis of neuron deltas and of atoms is padded with zeros to a multiple of this. The
            padding never gets a gradient.
    """

    dtype: torch.dtype
    device: torch.device
    pad_to: int = 1

    def zeros(self, *shape: int) -> Tensor:
        """Zeros of this dtype, on this device."""
        return torch.zeros(shape, dtype=self.dtype, device=self.device)

    def padded_zeros(self, shape: tuple[int, ...]) -> Tensor:
        """`zeros` with padding at the end of the first axis."""
        return self.zeros(math.ceil(shape[0] / self.pad_to) * self.pad_to, *shape[1:])


class DeltaBank(nn.Module):
    """The effective deltas of one layer's experts.

    `forward()` gives `[D, E, 3, m]` (neuron granularity; 0 gate, 1 up, 2 down; gate and up transposed, so that D comes
    first) or `[E, n]` (element granularity, in the order of the support). With `neuron_parts` N, layer i stores D / N
    rows, those of the hidden dimensions from (i mod N) D / N on; the deltas of all others are zero and not stored.

    A bank whose support is being learned also has scores on every rank: `[1, B]`, or `[E, B]` for all experts. The
    effective deltas of candidates that are not kept are zero. See `supports/learned.py`.
    """

    expert_axis: ClassVar[int]  # of the effective deltas
    first_expert: int = 0
    ranks_per_copy: int = 1  # of so many ranks, one has an expert's effective deltas in a backward
    exchange: Callable[[Tensor], Tensor] | None = None  # turns the values that this rank makes into all values
    gate: SupportGate | None = None
    parts: int = 1
    part: int = 0
    # A bank has only some of these; the subclasses give their shapes.
    free: nn.Parameter
    atoms: nn.Parameter
    importance: nn.Parameter
    mixing: nn.Parameter
    scores: nn.Parameter

    def forward(self, *, temperature: float | None = None, step: int = 0, overlap_weight: float = 0.0) -> Tensor:
        """The effective deltas.

        Args:
            temperature: temperature of the noise on the scores of a support that is being learned; None: no noise, and
                no gradient of the scores. A fixed support ignores this and the other arguments.
            step: seeds the noise.
            overlap_weight: see `learned.OverlapLoss`.
        """
        deltas = self.values()
        if self.exchange is not None:
            deltas = self.exchange(deltas)
        if self.gate is None:
            return deltas
        if temperature is None:
            mask = self.gate.mask(self.scores)
        else:
            mask = self.gate.sample(self.scores, temperature=temperature, step=step, overlap_weight=overlap_weight)
        if len(mask) > 1:  # those of the experts held here; padding slots may take any
            last = self.first_expert + deltas.shape[self.expert_axis]
            mask = mask[torch.arange(self.first_expert, last, device=mask.device).clamp(max=len(mask) - 1)]
        if (weights := deltas.shape[-1] // mask.shape[-1]) > 1:  # of a block
            mask = mask.repeat_interleave(weights, dim=1)
        mask = mask.to(deltas.dtype)
        return deltas * (mask[:, None] if deltas.dim() == 4 else mask)

    def values(self) -> Tensor:
        """The deltas of all entries of the support, in the shape of the effective deltas."""
        raise NotImplementedError

    def whole(self) -> Tensor:
        """The effective deltas of whole neurons, also where these have parts."""
        deltas = self()
        if self.parts == 1:
            return deltas
        width = len(deltas)
        whole = deltas.new_zeros(self.parts * width, *deltas.shape[1:])
        whole[self.part * width : (self.part + 1) * width] = deltas
        return whole

    def learn_support(self, gate: SupportGate, experts: int | None, dtype: torch.dtype) -> None:
        """Give each candidate a score of zero: one for each expert, or with None one for all of them."""
        device = next(self.parameters()).device
        scores = torch.zeros(experts or 1, gate.groups, dtype=dtype, device=device)
        self.gate, self.scores = gate, tagged(scores, "scores", expert_axis=None if experts is None else 0)

    def square_norms(self, deltas: Tensor) -> Tensor:
        """`[E]`, at least fp32: squared norm of each expert's part of a tensor in the shape of the effective deltas."""
        inner = tuple(range(self.expert_axis + 1, deltas.dim()))  # those first: they lie together in memory
        precision = torch.promote_types(deltas.dtype, torch.float32)
        squares = torch.linalg.vector_norm(deltas, dim=inner, dtype=precision).square()
        return squares.sum(0, dtype=torch.float64) if self.expert_axis else squares


class DeltaLosses(torch.autograd.Function):
    """Passes effective deltas through. Its backward records their gradient's size, and adds that of their own size.

    The backward runs only once, even if activation checkpointing repeats the forward.
    """

    @staticmethod
    def forward(
        ctx: Any, deltas: Tensor, weights: Tensor | None, bank: DeltaBank, sums: Tensor | None, layer: Tensor
    ) -> Tensor:
        """The deltas themselves, in a new view.

        Args:
            weights: weight of each expert's squared size, to be broadcast against the deltas; None: no such loss.
            sums: sums of the statistics, see `statistics.add_delta_gradient`.
            layer: `[1]`, the layer's number.
        """
        ctx.save_for_backward(weights, None if weights is None else deltas, layer)
        ctx.bank, ctx.sums = bank, sums
        return deltas.view_as(deltas)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        """The gradient of the loss plus that of sum_e weight_e |delta_e|^2; only the former is recorded."""
        weights, deltas, layer = ctx.saved_tensors
        if ctx.sums is not None:
            add_delta_gradient(ctx.sums, layer, ctx.bank.square_norms(gradient), ctx.bank.first_expert)
        if weights is not None:
            gradient = torch.addcmul(gradient, deltas, weights, value=2)
        return gradient, None, None, None, None


class FreeNeuronDeltas(DeltaBank):
    """free `[D, 3*E, m]`, index 3*e + k on the middle axis."""

    expert_axis = 1

    def __init__(self, hidden: int, experts: int, size: int, storage: Storage) -> None:
        super().__init__()
        shape = (hidden, 3 * experts, size)
        self.hidden = hidden
        self.free = tagged(storage.padded_zeros(shape), "free", expert_axis=1, shape=shape)

    def values(self) -> Tensor:
        """`[D, E, 3, m]`: `free` without its padding."""
        return without_padding(self.free, self.hidden).unflatten(1, (-1, 3))


class FreeElementDeltas(DeltaBank):
    """free `[E, n]`."""

    expert_axis = 0

    def __init__(self, experts: int, size: int, storage: Storage) -> None:
        super().__init__()
        self.free = tagged(storage.zeros(experts, size), "free", expert_axis=0)

    def values(self) -> Tensor:
        """`[E, n]`: `free`."""
        return self.free.view_as(self.free)


class AtomDeltas(DeltaBank):
    """delta_e = (c_e . atoms) * sigma(importance_e), with c the mixing matrix `[E, A]` or its softmax over A."""

    long_axis: ClassVar[dict[str, int]]  # axis of D (neuron) or n (element) in atoms, importance and `values()`
    length: int  # length of that axis on this rank, without padding
    atoms: nn.Parameter
    importance: nn.Parameter
    mixing: nn.Parameter
    softmax: bool

    def coefficients(self) -> Tensor:
        """c, `[E, A]`."""
        return self.mixing.softmax(dim=1) if self.softmax else self.mixing

    def init_values(self, atoms: tuple[int, ...], importance: tuple[int, ...], storage: Storage) -> None:
        """Atoms and importance of these shapes; the long axis is the first of the atoms'."""
        self.length = atoms[0]
        self.atoms = tagged(storage.padded_zeros(atoms), "atoms", expert_axis=None, shape=atoms)
        self.importance = tagged(storage.zeros(*importance).fill_(INITIAL_IMPORTANCE), "importance", expert_axis=0)

    def init_mixing(self, config: AdapterConfig, storage: Storage, generator: torch.Generator) -> None:
        """Random, so that experts differ from the first step on. An expert's linear coefficients have norm about 1."""
        self.softmax = config.atom_mixing == "softmax"
        mixing_EA = torch.randn(config.num_experts, config.num_atoms, generator=generator)
        if not self.softmax:
            mixing_EA /= math.sqrt(config.num_atoms)
        self.mixing = tagged(mixing_EA.to(dtype=storage.dtype, device=storage.device), "mixing", expert_axis=0)


class AtomNeuronDeltas(AtomDeltas):
    """atoms `[D, 3*A, m]`, index 3*a + k on the middle axis; importance `[E, 3, D, m]`."""

    expert_axis = 1
    long_axis = {"atoms": 0, "importance": 2, "values": 0}

    def __init__(
        self, config: AdapterConfig, hidden: int, size: int, storage: Storage, generator: torch.Generator
    ) -> None:
        super().__init__()
        self.init_values((hidden, 3 * config.num_atoms, size), (config.num_experts, 3, hidden, size), storage)
        self.init_mixing(config, storage, generator)

    def values(self) -> Tensor:
        """`[D, E, 3, m]`: the mixed atoms, scaled by the importance."""
        atoms = without_padding(self.atoms, self.length).unflatten(1, (-1, 3))
        mixed = (self.coefficients() @ atoms.flatten(2)).unflatten(2, (3, -1))
        return mixed * self.importance.sigmoid().permute(2, 0, 1, 3)


class AtomElementDeltas(AtomDeltas):
    """atoms `[n, 1, A]`, importance `[E, n]`."""

    expert_axis = 0
    long_axis = {"atoms": 0, "importance": 1, "values": 1}

    def __init__(self, config: AdapterConfig, size: int, storage: Storage, generator: torch.Generator) -> None:
        super().__init__()
        self.init_values((size, 1, config.num_atoms), (config.num_experts, size), storage)
        self.init_mixing(config, storage, generator)

    def values(self) -> Tensor:
        """`[E, n]`: the mixed atoms, scaled by the importance."""
        mixed = self.coefficients() @ without_padding(self.atoms, self.length).squeeze(1).T
        return mixed * self.importance.sigmoid()


def build_deltas(
    config: AdapterConfig, *, hidden: int, size: int, seed: int, layer: int, storage: Storage, keep: int | None = None
) -> DeltaBank:
    """The bank that `config` describes, with all effective deltas zero.

    Args:
        hidden: D.
        size: number of entries in a support, see `supports.selection.support_size`.
        seed: with the layer's number, seeds the mixing and the noise of a learned support.
        layer: number of the decoder layer.
        keep: for a support that is being learned, how many of its candidate entries are kept.
    """
    bank = _bank(config, hidden // config.neuron_parts, size, storage, seeded_generator(seed, "mixing", layer))
    bank.parts, bank.part = config.neuron_parts, layer % config.neuron_parts
    if keep is not None:
        gate = SupportGate(entries=size, keep=keep, group=GROUP_SIZE[config.granularity], seed=seed, layer=layer)
        bank.learn_support(gate, config.num_experts if config.support_scope == "per_expert" else None, storage.dtype)
    return bank


def empty_deltas(
    config: AdapterConfig, *, hidden: int, size: int, layer: int = 0, pad_to: int = 1, keep: int | None = None
) -> DeltaBank:
    """The same bank without values, on the meta device, to count values or to load some."""
    storage = Storage(torch.float32, torch.device("meta"), pad_to)
    return build_deltas(config, hidden=hidden, size=size, seed=0, layer=layer, storage=storage, keep=keep)


def _bank(config: AdapterConfig, hidden: int, size: int, storage: Storage, generator: torch.Generator) -> DeltaBank:
    if config.granularity == "neuron":
        if config.num_atoms == 0:
            return FreeNeuronDeltas(hidden, config.num_experts, size, storage)
        return AtomNeuronDeltas(config, hidden, size, storage, generator)
    values = size * entry_weights(config.granularity, hidden)
    if config.num_atoms == 0:
        return FreeElementDeltas(config.num_experts, values, storage)
    return AtomElementDeltas(config, values, storage, generator)
