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
    """The deltas of neurons, for parts of neurons and for a base whose weights cannot be read, such as a quantised one.

    On a support that the experts share, their mean takes the place of the base's hidden value, since their weights sum
    to one; a support for each expert takes the changes of its own.

    vectors: `[3, E, m, D / N]`, gate, up and down. support: `[m]` or `[E, m]`.

    Args:
        parts: N, the number of parts of the hidden dimensions.
        own_part: `[1]`, the one that the deltas are for.
    """

    def __init__(self, deltas_DE3m: Tensor, support: Tensor, *, parts: int, own_part: Tensor) -> None:
        self.vectors, self.support = deltas_DE3m.permute(2, 1, 3, 0).contiguous(), support.long()
        self.parts, self.own_part = parts, own_part
        _, self.experts, self.neurons, self.width = self.vectors.shape

    def __call__(
        self, act: Activation, down: Projection, x_TD: Tensor, gate_TF: Tensor, up_TF: Tensor, routing: Routing
    ) -> Tensor:
        """As `PreparedDeltas`."""
        if self.parts > 1:
            x_TD = x_TD.view(len(x_TD), self.parts, self.width).index_select(1, self.own_part).squeeze(1)
        x_TD, hidden_TF = as_dtype(x_TD, self.vectors.dtype), act(gate_TF) * up_TF
        (tokens, top_k), chosen = routing.index_TK.shape, routing.index_TK.view(-1)
        every = len(chosen) >= self.experts  # otherwise a token reads its own experts alone, which takes fewer bytes
        vectors = self.vectors if every else self.vectors.index_select(1, chosen)
        weights_TX = as_dtype(routing.weights_TE if every else routing.weights_TK, x_TD.dtype)
        shape = (tokens, weights_TX.shape[1], self.neurons)
        at_once = every or tokens == 1
        if at_once:
            gate, up = F.linear(x_TD, vectors[:2].view(-1, self.width)).chunk(2, dim=1)
        else:
            vectors = vectors.view(3, tokens, top_k * self.neurons, self.width)
            gate, up = ((matrix @ x_TD[:, :, None]).squeeze(2) for matrix in vectors[:2])
        base_gate, base_up = (self._of_base(values, chosen, shape) for values in (gate_TF, up_TF))
        h = act(gate.view(shape) + base_gate) * (up.view(shape) + base_up)
        weighted = weights_TX[:, :, None] * h
        if self.support.dim() == 1:
            hidden_TF.index_copy_(1, self.support, as_dtype(weighted.sum(1), hidden_TF.dtype))
        else:
            # h of the base is computed from a tensor with the same layout as that of h, see `dispatch.neuron_experts`.
            change = h - act(base_gate) * base_up
            if every:
                change = change.gather(1, routing.index_TK[:, :, None].expand(-1, -1, self.neurons))
            change = as_dtype(as_dtype(routing.weights_TK, h.dtype)[:, :, None] * change, hidden_TF.dtype)
            neurons = self.support.index_select(0, chosen).view(tokens, top_k, self.neurons)
            for own, part in zip(neurons.unbind(1), change.unbind(1), strict=True):
                hidden_TF.scatter_add_(1, own, part)  # no neuron repeats within a support, so the sum has one order
        if at_once:
            extra_TD = weighted.flatten(1) @ vectors[2].reshape(-1, self.width)
        else:
            extra_TD = (weighted.flatten(1)[:, None] @ vectors[2]).squeeze(1)
        output_TD, extra_TD = down(hidden_TF), as_dtype(extra_TD, hidden_TF.dtype)
        if self.parts == 1:
            return output_TD + extra_TD
        by_part = output_TD.view(tokens, self.parts, self.width)
        return by_part.index_add(1, self.own_part, extra_TD[:, None]).view_as(output_TD)

    def _of_base(self, values_TF: Tensor, chosen: Tensor, shape: tuple[int, int, int]) -> Tensor:
        """The base's values of the neurons, `[T, X, m]`, or `[T, 1, m]` if the experts share these."""
        tokens, experts, _ = shape
        if self.support.dim() == 1:
            own = values_TF.index_select(1, self.support)[:, None]
        elif experts == self.experts:
            own = values_TF.index_select(1, self.support.view(-1)).view(shape)
        else:
            neurons = self.support.index_select(0, chosen).view(tokens, experts * self.neurons)
            own = values_TF.gather(1, neurons).view(shape)
        return as_dtype(own, self.vectors.dtype)


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
