"""The experts' arithmetic without gradients, as in decoding: on deltas that were laid out for reading once.

What `dispatch.py` does in each call (permuting the deltas, running every expert, building dense matrices) is little
beside a training batch and much beside a single token. Results are equal within rounding, and a delta of zero changes
nothing, bit for bit.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from srde_ds.model.dispatch import Activation
from srde_ds.model.router import Routing

# The kernel of `embedding_bag` takes as long for one column as for so many (measured on a CPU with AVX-512).
BAG_COLUMNS = 8


class PreparedDeltas(Protocol):
    """One layer's effective deltas in the form that its experts read."""

    def __call__(
        self, act: Activation, x_TD: Tensor, gate_TF: Tensor, up_TF: Tensor, routing: Routing
    ) -> tuple[Tensor, Tensor]:
        """The hidden values act(gate) * up with the experts' change, `[T, F]`, and extra `[T, D]` as in `dispatch`."""
        ...


class PreparedNeuronDeltas:
    """Rows of D values: into `[E, 2, m, D]` (gate, up), back `[E, m, D]` (the columns of down).

    neurons `[E, m]`; places `[E * 2 * m]`: where gate and up of these neurons are when up stands behind gate.
    """

    def __init__(self, deltas_DE3m: Tensor, support: Tensor, *, intermediate: int) -> None:
        experts = deltas_DE3m.shape[1]
        self.into = deltas_DE3m[:, :, :2].permute(1, 2, 3, 0).contiguous()
        self.back = deltas_DE3m[:, :, 2].permute(1, 2, 0).contiguous()
        self.shared = support.dim() == 1
        self.neurons = support.long().expand(experts, -1).contiguous()
        self.places = torch.stack([self.neurons, self.neurons + intermediate], dim=1).flatten()

    def __call__(
        self, act: Activation, x_TD: Tensor, gate_TF: Tensor, up_TF: Tensor, routing: Routing
    ) -> tuple[Tensor, Tensor]:
        hidden_TF, pair_T2F = act(gate_TF) * up_TF, torch.cat([gate_TF, up_TF], dim=1)
        if routing.index_TK.numel() < len(self.into):
            return hidden_TF, self._chosen_experts(act, x_TD, pair_T2F, hidden_TF, routing)
        tokens, (experts, _, neurons, hidden) = len(x_TD), self.into.shape
        base = pair_T2F.index_select(1, self.places)
        shift = F.linear(x_TD, self.into.view(-1, hidden))
        weights_TE1 = routing.weights_TE.to(gate_TF.dtype)[:, :, None]
        change, weighted = _apply(act, base, shift, (tokens, experts, 2, neurons), weights_TE1)
        if self.shared:
            hidden_TF.index_add_(1, self.neurons[0], change.sum(1))
        else:
            for expert, index in enumerate(self.neurons):  # one by one: the sum has one order
                hidden_TF.index_add_(1, index, change[:, expert])
        return hidden_TF, weighted.flatten(1) @ self.back.view(-1, hidden)

    def _chosen_experts(
        self, act: Activation, x_TD: Tensor, pair_T2F: Tensor, hidden_TF: Tensor, routing: Routing
    ) -> Tensor:
        """Each token reads its own experts: fewer bytes than all experts, as long as tokens x top_k < experts."""
        (tokens, top_k), (_, _, neurons, hidden) = routing.index_TK.shape, self.into.shape
        index = routing.index_TK.view(-1)
        if self.shared:
            base = pair_T2F.index_select(1, self.places[: top_k * 2 * neurons])
        else:
            base = pair_T2F.gather(1, self.places.view(-1, 2 * neurons).index_select(0, index).view(tokens, -1))
        shift = _times(x_TD, self.into.index_select(0, index).view(tokens, -1, hidden).mT)
        weights_TK1 = routing.weights_TK.to(hidden_TF.dtype)[:, :, None]
        change, weighted = _apply(act, base, shift, (tokens, top_k, 2, neurons), weights_TK1)
        if self.shared:
            hidden_TF.index_add_(1, self.neurons[0], change.sum(1))
        else:
            for number, experts in enumerate(routing.index_TK.unbind(1)):
                hidden_TF.scatter_add_(1, self.neurons.index_select(0, experts), change[:, number])
        back = self.back.index_select(0, index).view(tokens, -1, hidden)
        return _times(weighted.view(tokens, -1), back)


def _times(x_Ta: Tensor, matrices_Tab: Tensor) -> Tensor:
    """`[T, b]`: each row times its own matrix."""
    if len(x_Ta) == 1:  # quicker than a batch of one, most of all in bfloat16 on a CPU
        return x_Ta @ matrices_Tab[0]
    return torch.bmm(x_Ta[:, None], matrices_Tab).squeeze(1)


def _apply(
    act: Activation, base: Tensor, shift: Tensor, shape: tuple[int, ...], weights: Tensor
) -> tuple[Tensor, Tensor]:
    """p (h_e - h) and p h_e, `[T, experts, m]`, of gate and up as `shape` = `[T, experts, 2, m]`.

    h comes from a tensor laid out as that of h_e, see `dispatch.neuron_experts`.
    """
    base = base.view(shape)
    (gate, up), (base_gate, base_up) = (base + shift.view(shape)).unbind(2), base.unbind(2)
    hidden = act(gate) * up
    return weights * (hidden - act(base_gate) * base_up), weights * hidden


class PreparedElementDeltas:
    """Each expert's delta as two sparse matrices by rows: `[2F, D]` (gate above up) and `[D, F]` (down)."""

    def __init__(self, deltas_En: Tensor, support: Tensor, *, hidden: int, intermediate: int) -> None:
        size = hidden * intermediate
        self.into, self.back = [], []
        for expert, values in enumerate(deltas_En):
            index, order = (support if support.dim() == 1 else support[expert]).long().sort()
            values, first_down = values[order], int(torch.searchsorted(index, 2 * size))
            above, below = index[:first_down], index[first_down:] - 2 * size
            self.into.append(SparseRows(above, values[:first_down], rows=2 * intermediate, columns=hidden))
            self.back.append(SparseRows(below, values[first_down:], rows=hidden, columns=intermediate))

    def __call__(
        self, act: Activation, x_TD: Tensor, gate_TF: Tensor, up_TF: Tensor, routing: Routing
    ) -> tuple[Tensor, Tensor]:
        hidden, extra = act(gate_TF) * up_TF, torch.zeros_like(x_TD)
        weights_TE = routing.weights_TE.to(gate_TF.dtype)
        for expert in routing.index_TK.unique().tolist():
            rows = weights_TE[:, expert].nonzero().squeeze(1)
            x, gate, up = (t.index_select(0, rows) for t in (x_TD, gate_TF, up_TF))
            gate_shift, up_shift = self.into[expert](x).chunk(2, dim=1)
            h = act(gate + gate_shift) * (up + up_shift)
            p = weights_TE[:, expert].index_select(0, rows)[:, None]
            hidden.index_add_(0, rows, p * (h - act(gate) * up))
            extra.index_add_(0, rows, p * self.back[expert](h))
        return hidden, extra


class SparseRows:
    """A matrix whose values are few; called on `[T, columns]` it gives x @ matrix.T, `[T, rows]`.

    By `embedding_bag`, a sum of weighted rows of x transposed: unlike torch's sparse matrices it takes every dtype.

    Args:
        index: of the values, sorted, into the matrix's elements row by row.
    """

    def __init__(self, index: Tensor, values: Tensor, *, rows: int, columns: int) -> None:
        starts = torch.arange(rows, device=index.device) * columns
        self.offsets = torch.searchsorted(index, starts, out_int32=True)
        self.columns = (index % columns).int()
        self.values = values.contiguous()

    def __call__(self, x: Tensor) -> Tensor:
        tokens = len(x)
        table = F.pad(x.T, (0, -tokens % BAG_COLUMNS))
        out = F.embedding_bag(self.columns, table, self.offsets, mode="sum", per_sample_weights=self.values)
        return out[:, :tokens].T.contiguous()


class Preparation:
    """Keeps a layer's prepared deltas until what they were made of changes.

    A change is noticed by the tensor's version, which torch counts for all operations in place but not for those on
    `.data`: after such, call `drop`.
    """

    def __init__(self) -> None:
        self.drop()

    def drop(self) -> None:
        self._made_of: list[tuple[Tensor, int]] = []
        self._dtype: torch.dtype | None = None
        self._deltas: PreparedDeltas | None = None

    def get(self, made_of: Sequence[Tensor], dtype: torch.dtype) -> PreparedDeltas | None:
        """What `put` was given, if `made_of` and `dtype` are the same as then; else None."""
        if self._deltas is None or dtype != self._dtype or len(made_of) != len(self._made_of):
            return None
        for tensor, (before, version) in zip(made_of, self._made_of, strict=True):
            if tensor.data_ptr() != before.data_ptr() or tensor._version != version:
                return None
        return self._deltas

    def put(self, made_of: Sequence[Tensor], dtype: torch.dtype, deltas: PreparedDeltas) -> PreparedDeltas:
        # The references keep the memory of these tensors from being given to others, which would look the same.
        self._made_of = [(tensor.detach(), tensor._version) for tensor in made_of]
        self._dtype, self._deltas = dtype, deltas
        return deltas
