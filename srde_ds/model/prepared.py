"""The router's and experts' arithmetic for decoding, without gradients, on deltas that are prepared once.

What `dispatch.py` does in each call (permuting the deltas, running every expert, building dense matrices) costs little
compared with a training batch, but much compared with a single token. The results are equal within rounding, and if all
deltas of a layer are zero they are the base's, bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from srde_ds.model.block_experts import BlockMatrix
from srde_ds.model.dispatch import Activation
from srde_ds.model.policy import RoutingPolicy
from srde_ds.model.router import Router, Routing, route
from srde_ds.model.supports.blocks import block_places

Projection = Callable[[Tensor], Tensor]


def arithmetic_dtype(values: Tensor) -> torch.dtype:
    """The dtype in which the experts compute, for a base whose values are like `values`.

    On a CPU it is at least float32, since a vector times a bfloat16 matrix takes several times as long.
    """
    return torch.promote_types(values.dtype, torch.float32) if values.device.type == "cpu" else values.dtype


def as_dtype(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """`tensor.to(dtype)`, but quicker if there is nothing to do."""
    return tensor if tensor.dtype == dtype else tensor.to(dtype)


class PreparedDeltas(Protocol):
    """A layer's prepared experts."""

    def __call__(
        self, act: Activation, down: Projection, x_TD: Tensor, gate_TF: Tensor, up_TF: Tensor, routing: Routing
    ) -> Tensor:
        """The block's output with experts, `[T, D]`, from its input and the base's gate and up values."""
        ...


class PreparedNoDeltas:
    """For deltas that are all zero: the base's own output, bit for bit."""

    def __call__(
        self, act: Activation, down: Projection, x_TD: Tensor, gate_TF: Tensor, up_TF: Tensor, routing: Routing
    ) -> Tensor:
        """The base's own output."""
        return down(act(gate_TF) * up_TF)


class PreparedNeurons:
    """The experts' whole neurons, base plus delta, which replace the base's.

    With the base's down matrix W and its delta dW_e, expert e adds p_e h_e (W + dW_e) on its support. The base's
    neurons are subtracted there: wholly on a support that the experts share, since their weights sum to one; otherwise
    p_e h W. That takes fewer operations than computing each neuron's change, and on a CPU the time for a token is
    proportional to their number. It is not used in half precision, where a small delta would vanish in the sum.

    vectors: `[3, E, m, D]`, gate, up and down; with a support for each expert `[4, E, m, D]`, the last -W.

    Args:
        deltas_DE3m: gate, up and down of each expert.
        support: `[m]` or `[E, m]`.
        weights: the base's gate and up, `[F, D]`, and down, `[D, F]`.
    """

    def __init__(self, deltas_DE3m: Tensor, support: Tensor, weights: Sequence[Tensor]) -> None:
        self.support = support.long()
        gate_FD, up_FD, down_DF = weights
        deltas_3EmD = deltas_DE3m.permute(2, 1, 3, 0)
        own = torch.stack([t[self.support] for t in (gate_FD, up_FD, down_DF.T)])
        own = own.view(3, -1, *own.shape[-2:]).to(deltas_3EmD)
        self.vectors = (own + deltas_3EmD).contiguous()
        if support.dim() == 2:
            self.vectors = torch.cat([self.vectors, -own[2:]])
        self.neurons, self.hidden = self.vectors.shape[2:]

    def __call__(
        self, act: Activation, down: Projection, x_TD: Tensor, gate_TF: Tensor, up_TF: Tensor, routing: Routing
    ) -> Tensor:
        """As `PreparedDeltas`."""
        # Views and conversions cost as much as arithmetic here, so there are no unneeded ones.
        vectors, support, tokens = self.vectors, self.support, len(x_TD)
        if tokens == 1:  # reads only the token's experts
            weights_TX, chosen = routing.weights_TK, routing.index_TK.view(-1)
            vectors = vectors.index_select(1, chosen)
            support = support if support.dim() == 1 else support.index_select(0, chosen)
        else:
            weights_TX = routing.weights_TE
        experts = weights_TX.shape[1]
        vectors, inwards = vectors.view(-1, self.hidden), 2 * experts * self.neurons
        gate, up = F.linear(as_dtype(x_TD, vectors.dtype), vectors[:inwards]).chunk(2, dim=1)
        h, hidden_TF = act(gate) * up, act(gate_TF) * up_TF
        if support.dim() == 1:
            hidden_TF.index_fill_(1, support, 0)
        else:
            h = torch.cat([h, as_dtype(hidden_TF.index_select(1, support.view(-1)), h.dtype)], dim=1)
        weights = as_dtype(weights_TX, h.dtype).view(tokens, 1, experts, 1)
        h.view(tokens, -1, experts, self.neurons).mul_(weights)
        output_TD = down(hidden_TF)
        if output_TD.dtype == h.dtype:
            return torch.addmm(output_TD, h, vectors[inwards:])
        return output_TD + (h @ vectors[inwards:]).to(output_TD.dtype)


class PreparedRouter:
    """`router.Router` and `route`, with the weight in the dtype of the logits; a bias of zero is left out."""

    def __init__(self, router: Router, dtype: torch.dtype) -> None:
        self.weight = router.weight.detach().to(torch.promote_types(dtype, torch.float32))
        self.bias = router.selection_bias if bool(router.selection_bias.any()) else None
        self.top_k = router.top_k

    def __call__(self, x_TD: Tensor, policy: RoutingPolicy) -> Routing:
        """The layer's routing of x_TD."""
        logits_TE = F.linear(as_dtype(x_TD, self.weight.dtype), self.weight)
        return route(logits_TE, self.bias, self.top_k, policy)


class PreparedNeuronDeltas:
    """The deltas of neurons, for a base whose weights cannot be read, such as a quantised one.

    vectors: `[3, E, m, D]`, gate, up and down. neurons: `[E, m]`. places: `[2 * E * m]`, the positions of these
    neurons' gate and up values in `[T, 2 * F]`, gate first.

    Args:
        top_k: the most experts of a token.
    """

    def __init__(self, deltas_DE3m: Tensor, support: Tensor, *, intermediate: int, top_k: int) -> None:
        self.vectors = deltas_DE3m.permute(2, 1, 3, 0).contiguous()
        _, experts, _, self.hidden = self.vectors.shape
        self.shared, self.intermediate = support.dim() == 1, intermediate
        self.neurons = support.long().expand(experts, -1).contiguous()
        self.places = self._places(self.neurons)
        # By number of experts, for a shared support. All at once, since a CUDA graph overwrites what it has made.
        self.repeated = {count: self._places(self.neurons[:count]) for count in range(1, top_k + 1)}

    def __call__(
        self, act: Activation, down: Projection, x_TD: Tensor, gate_TF: Tensor, up_TF: Tensor, routing: Routing
    ) -> Tensor:
        """As `PreparedDeltas`."""
        hidden_TF, pair_T2F = act(gate_TF) * up_TF, torch.cat([gate_TF, up_TF], dim=1)
        x_TD = x_TD.to(self.vectors.dtype)
        if routing.index_TK.numel() >= len(self.neurons):
            extra_TD = self._all_experts(act, x_TD, pair_T2F, hidden_TF, routing)
        else:
            extra_TD = self._chosen_experts(act, x_TD, pair_T2F, hidden_TF, routing)
        return down(hidden_TF) + extra_TD.to(hidden_TF.dtype)

    def _all_experts(
        self, act: Activation, x_TD: Tensor, pair_T2F: Tensor, hidden_TF: Tensor, routing: Routing
    ) -> Tensor:
        base = pair_T2F.index_select(1, self.places).to(x_TD.dtype)
        moved = torch.addmm(base, x_TD, self.vectors[:2].flatten(0, 2).T)
        h, change = self._hidden(act, base, moved)
        weighted_h = routing.weights_TE.to(x_TD.dtype)[:, :, None] * h
        if self.shared:
            change = (routing.weights_TE.to(x_TD.dtype)[:, :, None] * change).sum(1)
            hidden_TF.index_add_(1, self.neurons[0], change.to(hidden_TF.dtype))
        else:
            index_TKm = routing.index_TK[:, :, None].expand(-1, -1, change.shape[2])
            change = routing.weights_TK.to(x_TD.dtype)[:, :, None] * change.gather(1, index_TKm)
            self._add(hidden_TF, change, self.neurons[routing.index_TK])
        return weighted_h.flatten(1) @ self.vectors[2].flatten(0, 1)

    def _chosen_experts(
        self, act: Activation, x_TD: Tensor, pair_T2F: Tensor, hidden_TF: Tensor, routing: Routing
    ) -> Tensor:
        """Each token reads its own experts, which takes fewer bytes than all experts if T * K < E."""
        tokens, top_k = routing.index_TK.shape
        index = routing.index_TK.view(-1)
        vectors = self.vectors.index_select(1, index).view(3, tokens, -1, self.hidden)
        neurons_TKm = self.neurons.index_select(0, index).view(tokens, top_k, -1)
        if self.shared:
            base = pair_T2F.index_select(1, self.repeated[top_k]).to(x_TD.dtype)
        else:
            flat = neurons_TKm.flatten(1)
            base = pair_T2F.gather(1, torch.cat([flat, flat + self.intermediate], dim=1)).to(x_TD.dtype)
        moved = base + torch.cat([(matrix @ x_TD[:, :, None]).squeeze(2) for matrix in vectors[:2]], dim=1)
        h, change = self._hidden(act, base, moved)
        weights_TK1 = routing.weights_TK.to(x_TD.dtype)[:, :, None]
        change = weights_TK1 * change
        if self.shared:
            hidden_TF.index_add_(1, self.neurons[0], change.sum(1).to(hidden_TF.dtype))
        else:
            self._add(hidden_TF, change, neurons_TKm)
        return ((weights_TK1 * h).view(tokens, 1, -1) @ vectors[2]).squeeze(1)

    def _add(self, hidden_TF: Tensor, change_TKm: Tensor, neurons_TKm: Tensor) -> None:
        for own, part in zip(neurons_TKm.unbind(1), change_TKm.to(hidden_TF.dtype).unbind(1), strict=True):
            hidden_TF.scatter_add_(1, own, part)  # no neuron repeats within a support, so the order of the sum is fixed

    def _hidden(self, act: Activation, base: Tensor, moved: Tensor) -> tuple[Tensor, Tensor]:
        """h_e and h_e - h, `[T, X, m]`, from gate and up values, `[T, 2 * X * m]`, without and with the deltas.

        h is computed from a tensor with the same layout as that of h_e, see `dispatch.neuron_experts`.
        """
        shape = (len(base), 2, -1, self.neurons.shape[1])
        (gate, up), (base_gate, base_up) = moved.view(shape).unbind(1), base.view(shape).unbind(1)
        hidden = act(gate) * up
        return hidden, hidden - act(base_gate) * base_up

    def _places(self, neurons: Tensor) -> Tensor:
        return torch.cat([neurons.flatten(), neurons.flatten() + self.intermediate])


class PreparedSparseDeltas:
    """Each expert's delta as two matrices with few values: `[2 * F, D]` (gate above up) and `[D, F]` (down)."""

    def __init__(self, dtype: torch.dtype, into: Sequence[Projection], back: Sequence[Projection]) -> None:
        self.dtype, self.into, self.back = dtype, into, back

    def __call__(
        self, act: Activation, down: Projection, x_TD: Tensor, gate_TF: Tensor, up_TF: Tensor, routing: Routing
    ) -> Tensor:
        """As `PreparedDeltas`."""
        hidden_TF = act(gate_TF) * up_TF
        x, gate, up = (t.to(self.dtype) for t in (x_TD, gate_TF, up_TF))
        if len(x) == 1:  # no selection of tokens needed
            experts, weights = routing.index_TK[0].tolist(), routing.weights_TK.to(self.dtype).unbind(1)
            parts = [self._expert(act, e, x, gate, up, p[:, None]) for e, p in zip(experts, weights, strict=True)]
            changes, extras = zip(*parts, strict=True)
            return down(hidden_TF + sum(changes).to(hidden_TF.dtype)) + sum(extras).to(hidden_TF.dtype)
        change, extra = torch.zeros_like(gate), torch.zeros_like(x)
        weights_TE = routing.weights_TE.to(self.dtype)
        for expert in routing.index_TK.unique().tolist():
            tokens = weights_TE[:, expert].nonzero().squeeze(1)
            if len(tokens) == 0:  # chosen with weight zero; with several threads embedding_bag fails on an empty batch
                continue
            own_x, own_gate, own_up, p = (t.index_select(0, tokens) for t in (x, gate, up, weights_TE[:, expert, None]))
            own_change, own_extra = self._expert(act, expert, own_x, own_gate, own_up, p)
            change.index_add_(0, tokens, own_change)
            extra.index_add_(0, tokens, own_extra)
        return down(hidden_TF + change.to(hidden_TF.dtype)) + extra.to(hidden_TF.dtype)

    def _expert(
        self, act: Activation, expert: int, x: Tensor, gate: Tensor, up: Tensor, p: Tensor
    ) -> tuple[Tensor, Tensor]:
        """p (h_e - h), `[T, F]`, and p dD_e h_e, `[T, D]`."""
        gate_shift, up_shift = self.into[expert](x).chunk(2, dim=1)
        h = act(gate + gate_shift) * (up + up_shift)
        return p * (h - act(gate) * up), p * self.back[expert](h)


class PreparedWeights(PreparedSparseDeltas):
    """The deltas of single weights."""

    def __init__(self, deltas_En: Tensor, support: Tensor, *, hidden: int, intermediate: int) -> None:
        size = hidden * intermediate
        into, back = [], []
        for expert, values in enumerate(deltas_En):
            index, order = (support if support.dim() == 1 else support[expert]).long().sort()
            values, first_down = values[order], int(torch.searchsorted(index, 2 * size))
            above, below = index[:first_down], index[first_down:] - 2 * size
            into.append(SparseMatrix(above, values[:first_down], rows=2 * intermediate, columns=hidden))
            back.append(SparseMatrix(below, values[first_down:], rows=hidden, columns=intermediate))
        super().__init__(deltas_En.dtype, into, back)


class PreparedBlocks(PreparedSparseDeltas):
    """The deltas of blocks."""

    def __init__(self, deltas_En: Tensor, support: Tensor, *, hidden: int, intermediate: int) -> None:
        places = [block_places(own, hidden, intermediate) for own in support.view(-1, support.shape[-1])]
        places = places * len(deltas_En) if len(places) == 1 else places
        into = [BlockMatrix(own, values) for (own, _), values in zip(places, deltas_En, strict=True)]
        back = [BlockMatrix(own, values) for (_, own), values in zip(places, deltas_En, strict=True)]
        super().__init__(deltas_En.dtype, into, back)


class SparseMatrix:
    """A matrix with few nonzero values. Called on x `[T, columns]` it gives x @ matrix.T, `[T, rows]`.

    It uses `embedding_bag`, which sums weighted rows of the transposed x. That is quicker than torch's sparse matrices,
    even for a single token.

    Args:
        index: the values' indices into the flattened matrix, ascending.
    """

    def __init__(self, index: Tensor, values: Tensor, *, rows: int, columns: int) -> None:
        starts = torch.arange(rows, device=index.device) * columns
        self.offsets = torch.searchsorted(index, starts, out_int32=True)
        self.columns = (index % columns).int()
        self.values = values.contiguous()

    def __call__(self, x: Tensor) -> Tensor:
        """x @ matrix.T."""
        # A copy, since the kernel takes twice as long on a view with other strides, even for a single column.
        table = x.T.clone(memory_format=torch.contiguous_format)
        out = F.embedding_bag(self.columns, table, self.offsets, mode="sum", per_sample_weights=self.values)
        return out.T.contiguous()


class Prepared(NamedTuple):
    """The prepared router and experts of a layer."""

    router: PreparedRouter
    experts: PreparedDeltas


class Preparation:
    """Keeps what a layer has prepared until the tensors that it was made of change.

    torch counts in-place operations on a tensor as its version, except those on `.data`. After such an operation, and
    after a tensor of the module has been replaced, call `drop`.
    """

    held: Prepared | None = None
    """What compiled code may use. It cannot ask `get`; `layer.hold_prepared` is for when nothing changes."""

    def __init__(self) -> None:
        self.drop()

    def drop(self) -> None:
        """Forget what was prepared."""
        self._made_of: list[tuple[Tensor, int, int]] = []  # with its address and version
        self._dtype: torch.dtype | None = None
        self._prepared: Prepared | None = None

    def get(self, dtype: torch.dtype) -> Prepared | None:
        """What `put` has kept, if `dtype` and the tensors that it was made of are unchanged; else None."""
        if dtype != self._dtype:
            return None
        for tensor, place, version in self._made_of:
            if tensor._version != version or tensor.data_ptr() != place:
                return None
        return self._prepared

    def put(self, made_of: Sequence[Tensor], dtype: torch.dtype, prepared: Prepared) -> Prepared:
        """Keep and return `prepared`, and note the tensors that it was made of."""
        self._made_of = [(tensor, tensor.data_ptr(), tensor._version) for tensor in made_of]
        self._dtype, self._prepared = dtype, prepared
        return prepared
