"""Router and experts' arithmetic without gradients, as in decoding: on deltas that were laid out for reading once.

What `dispatch.py` does in each call (permuting the deltas, running every expert, building dense matrices) is little
beside a training batch and much beside a single token. Results are equal within rounding, and a delta of zero changes
nothing, bit for bit.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from srde_ds.model.dispatch import Activation
from srde_ds.model.router import Router, Routing, RoutingContext, route


def arithmetic_dtype(values: Tensor) -> torch.dtype:
    """In which the experts compute for a base that gives `values`.

    At least float32 on a CPU: there one row times a bfloat16 matrix takes several times as long.
    """
    return torch.promote_types(values.dtype, torch.float32) if values.device.type == "cpu" else values.dtype


class PreparedDeltas(Protocol):
    """One layer's effective deltas in the form that its experts read."""

    def __call__(
        self, act: Activation, x_TD: Tensor, gate_TF: Tensor, up_TF: Tensor, routing: Routing
    ) -> tuple[Tensor, Tensor]:
        """The hidden values act(gate) * up with the experts' change, `[T, F]`, and extra `[T, D]` as in `dispatch`."""
        ...


class PreparedRouter:
    """`router.Router` and `route` with the weight in the dtype of the logits, and no bias where it is zero."""

    def __init__(self, router: Router, dtype: torch.dtype) -> None:
        self.weight = router.weight.detach().to(torch.promote_types(dtype, torch.float32))
        self.bias = router.selection_bias if bool(router.selection_bias.any()) else None
        self.top_k = router.top_k

    def __call__(self, x_TD: Tensor, layer: int, context: RoutingContext) -> Routing:
        logits_TE = F.linear(x_TD.to(self.weight.dtype), self.weight)
        return route(logits_TE, self.bias, self.top_k, layer, context)


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
        experts, x_TD = len(self.into), x_TD.to(self.into.dtype)
        if routing.index_TK.numel() < experts:
            chosen = self._single_token if self.shared and len(x_TD) == 1 else self._chosen_experts
            return hidden_TF, chosen(act, x_TD, pair_T2F, hidden_TF, routing).to(hidden_TF.dtype)
        base = pair_T2F.index_select(1, self.places).to(x_TD.dtype)
        moved = torch.addmm(base, x_TD, self.into.flatten(0, 2).T)
        h, change = self._hidden(act, base, moved)
        weights_TE1 = routing.weights_TE.to(x_TD.dtype)[:, :, None]
        change = weights_TE1 * change
        if self.shared:
            hidden_TF.index_add_(1, self.neurons[0], change.sum(1).to(hidden_TF.dtype))
        else:
            for index, part in zip(self.neurons, change.to(hidden_TF.dtype).unbind(1), strict=True):
                hidden_TF.index_add_(1, index, part)  # one by one: the sum has one order
        return hidden_TF, ((weights_TE1 * h).flatten(1) @ self.back.flatten(0, 1)).to(hidden_TF.dtype)

    def _chosen_experts(
        self, act: Activation, x_TD: Tensor, pair_T2F: Tensor, hidden_TF: Tensor, routing: Routing
    ) -> Tensor:
        """Each token reads its own experts: fewer bytes than all experts, as long as tokens x top_k < experts."""
        (tokens, top_k), (_, _, neurons, hidden) = routing.index_TK.shape, self.into.shape
        index = routing.index_TK.view(-1)
        if self.shared:
            base = pair_T2F.index_select(1, self.places[: top_k * 2 * neurons]).to(x_TD.dtype)
        else:
            places = self.places.view(-1, 2 * neurons).index_select(0, index).view(tokens, -1)
            base = pair_T2F.gather(1, places).to(x_TD.dtype)
        moved = _times(x_TD, self.into.index_select(0, index).view(tokens, -1, hidden).mT, plus=base)
        h, change = self._hidden(act, base, moved)
        weights_TK = routing.weights_TK.to(x_TD.dtype)
        if self.shared:
            hidden_TF.index_add_(1, self.neurons[0], _times(weights_TK, change).to(hidden_TF.dtype))
        else:
            change = (weights_TK[:, :, None] * change).to(hidden_TF.dtype)
            for number, experts in enumerate(routing.index_TK.unbind(1)):
                hidden_TF.scatter_add_(1, self.neurons.index_select(0, experts), change[:, number])
        weighted = (weights_TK[:, :, None] * h).view(tokens, -1)
        return _times(weighted, self.back.index_select(0, index).view(tokens, -1, hidden))

    def _single_token(
        self, act: Activation, x_1D: Tensor, pair_12F: Tensor, hidden_1F: Tensor, routing: Routing
    ) -> Tensor:
        """`_chosen_experts` in as few operations as it goes, each of which costs more than its arithmetic here."""
        _, _, neurons, hidden = self.into.shape
        index, dtype = routing.index_TK[0], self.into.dtype
        both = torch.empty(2, 1, len(index) * 2 * neurons, dtype=dtype, device=x_1D.device)
        moved, base = both.unbind(0)
        torch.index_select(pair_12F.to(dtype), 1, self.places[: base.numel()], out=base)
        torch.addmm(base, x_1D, self.into.index_select(0, index).view(-1, hidden).T, out=moved)
        gate, up = both.view(2, len(index), 2, neurons).unbind(2)
        h, h_base = (act(gate) * up).unbind(0)  # too few values for several threads, so both are computed alike
        weights_1K = routing.weights_TK.to(dtype)
        hidden_1F.index_add_(1, self.neurons[0], (weights_1K @ (h - h_base)).to(hidden_1F.dtype))
        return (weights_1K.T * h).view(1, -1) @ self.back.index_select(0, index).view(-1, hidden)

    def _hidden(self, act: Activation, base: Tensor, moved: Tensor) -> tuple[Tensor, Tensor]:
        """h_e and h_e - h, `[T, experts, m]`, of gate and up `[T, experts * 2 * m]` without and with the deltas.

        h comes from a tensor laid out as that of h_e, see `dispatch.neuron_experts`.
        """
        shape = (len(base), -1, 2, self.into.shape[2])
        (gate, up), (base_gate, base_up) = moved.view(shape).unbind(2), base.view(shape).unbind(2)
        hidden = act(gate) * up
        return hidden, hidden - act(base_gate) * base_up


def _times(x_Ta: Tensor, matrices_Tab: Tensor, *, plus: Tensor | None = None) -> Tensor:
    """`[T, b]`: each row times its own matrix, and `plus`."""
    if len(x_Ta) == 1:  # quicker than a batch of one
        matrix = matrices_Tab[0]
        return x_Ta @ matrix if plus is None else torch.addmm(plus, x_Ta, matrix)
    products = torch.bmm(x_Ta[:, None], matrices_Tab).squeeze(1)
    return products if plus is None else products + plus


class PreparedElementDeltas:
    """Each expert's delta as two sparse matrices by rows: `[2F, D]` (gate above up) and `[D, F]` (down)."""

    def __init__(self, deltas_En: Tensor, support: Tensor, *, hidden: int, intermediate: int) -> None:
        size = hidden * intermediate
        self.dtype = deltas_En.dtype
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
        hidden_TF = act(gate_TF) * up_TF
        x, gate, up = (t.to(self.dtype) for t in (x_TD, gate_TF, up_TF))
        if len(x) == 1:  # no rows to pick
            experts, weights = routing.index_TK[0].tolist(), routing.weights_TK.to(self.dtype).unbind(1)
            parts = [self._expert(act, e, x, gate, up, p[:, None]) for e, p in zip(experts, weights, strict=True)]
            changes, extras = zip(*parts, strict=True)
            return hidden_TF + sum(changes).to(hidden_TF.dtype), sum(extras).to(hidden_TF.dtype)
        change, extra = torch.zeros_like(gate), torch.zeros_like(x)
        weights_TE = routing.weights_TE.to(self.dtype)
        for expert in routing.index_TK.unique().tolist():
            rows = weights_TE[:, expert].nonzero().squeeze(1)
            x_rows, gate_rows, up_rows, p = (
                t.index_select(0, rows) for t in (x, gate, up, weights_TE[:, expert, None])
            )
            change_rows, extra_rows = self._expert(act, expert, x_rows, gate_rows, up_rows, p)
            change.index_add_(0, rows, change_rows)
            extra.index_add_(0, rows, extra_rows)
        return hidden_TF + change.to(hidden_TF.dtype), extra.to(hidden_TF.dtype)

    def _expert(
        self, act: Activation, expert: int, x: Tensor, gate: Tensor, up: Tensor, p: Tensor
    ) -> tuple[Tensor, Tensor]:
        """p (h_e - h), `[T, F]`, and p dD_e h_e, `[T, D]`."""
        gate_shift, up_shift = self.into[expert](x).chunk(2, dim=1)
        h = act(gate + gate_shift) * (up + up_shift)
        return p * (h - act(gate) * up), p * self.back[expert](h)


class SparseRows:
    """A matrix whose values are few; called on `[T, columns]` it gives x @ matrix.T, `[T, rows]`.

    By `embedding_bag`, a sum of weighted rows of x transposed: quicker than torch's sparse matrices, even for one row.

    Args:
        index: of the values, sorted, into the matrix's elements row by row.
    """

    def __init__(self, index: Tensor, values: Tensor, *, rows: int, columns: int) -> None:
        starts = torch.arange(rows, device=index.device) * columns
        self.offsets = torch.searchsorted(index, starts, out_int32=True)
        self.columns = (index % columns).int()
        self.values = values.contiguous()

    def __call__(self, x: Tensor) -> Tensor:
        # A copy, not a view: the kernel is half as quick on other strides, even if those of a single column.
        table = x.T.clone(memory_format=torch.contiguous_format)
        out = F.embedding_bag(self.columns, table, self.offsets, mode="sum", per_sample_weights=self.values)
        return out.T.contiguous()


class Prepared(NamedTuple):
    """What a layer reads."""

    router: PreparedRouter
    experts: PreparedDeltas


class Preparation:
    """Keeps what a layer prepared until the tensors change that it was made of.

    A change is noticed by the tensor's version, which torch counts for all operations in place but not for those on
    `.data`. After such, and when another tensor takes a tensor's place in the module, call `drop`.
    """

    def __init__(self) -> None:
        self.drop()

    def drop(self) -> None:
        self._made_of: list[tuple[Tensor, int, int]] = []  # and its place in memory and version
        self._dtype: torch.dtype | None = None
        self._prepared: Prepared | None = None

    def get(self, dtype: torch.dtype) -> Prepared | None:
        """What `put` was given, if `dtype` and what it was made of are the same as then; else None."""
        if dtype != self._dtype:
            return None
        for tensor, place, version in self._made_of:
            if tensor._version != version or tensor.data_ptr() != place:
                return None
        return self._prepared

    def put(self, made_of: Sequence[Tensor], dtype: torch.dtype, prepared: Prepared) -> Prepared:
        self._made_of = [(tensor, tensor.data_ptr(), tensor._version) for tensor in made_of]
        self._dtype, self._prepared = dtype, prepared
        return prepared
