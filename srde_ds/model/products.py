"""Products of tokens with the matrices of their experts, computed in one of two ways.

If tokens are sorted by expert and multiplied group by group, a token costs only its K experts, but tokens are copied
and products are small. All experts on all tokens are one large product, of which only K / E is needed. So few or narrow
experts are quicker all at once, and many wide ones group by group. Both ways agree within rounding, and no expert is
left out of the graph: without tokens it has a product of zero rows.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable


class ExpertProducts(Protocol):
    """The products of one layer's tokens, for deltas `[D, E, 3, m]` and `[T, K]` chosen experts.

    A token's results are in X slots. If all experts are multiplied at once, `by_expert` is true and slot e belongs to
    expert e (X = E); otherwise slot k belongs to the token's k-th expert (X = K).
    """

    by_expert: bool

    def into(self, x_TD: Tensor) -> Tensor:
        """`[T, X, 2, m]`: each token times dG and dU of its experts."""
        ...

    def back(self, h_TXm: Tensor) -> Tensor:
        """`[T, D]`: the sum of dD_e h over a token's experts; h is zero for experts that it does not use."""
        ...

    def added(self, output_TD: Tensor, h_TXm: Tensor) -> Tensor:
        """The output plus `back`."""
        ...


def expert_products(deltas_DE3m: Tensor, index_TK: Tensor) -> ExpertProducts:
    """The quicker of the two ways, chosen by shapes, dtype and kind of device."""
    hidden, experts, _, neurons = deltas_DE3m.shape
    tokens, top_k = index_TK.shape
    if grouping_pays(deltas_DE3m, tokens=tokens, top_k=top_k, experts=experts, neurons=neurons, width=hidden):
        return GroupedProducts(deltas_DE3m, index_TK)
    return JointProducts(deltas_DE3m, index_TK)


def grouping_pays(like: Tensor, *, tokens: int, top_k: int, experts: int, neurons: int, width: int) -> bool:
    """Whether tokens sorted by expert are quicker than all experts on all tokens, for the dtype and device of `like`.

    Args:
        neurons: of an expert.
        width: of the deltas' vectors, D.
    """
    overhead = GROUPING.get((like.device.type, like.dtype))
    aligned = width * like.element_size() % ALIGNMENT == 0
    return aligned and overhead is not None and overhead.pays(tokens, top_k, experts, neurons)


@dataclass(frozen=True)
class GroupingOverhead:
    """The cost of sorting tokens by expert, in units of the cost of one token with one neuron of one expert.

    Attributes:
        assignment: cost per token and expert of it, for the copies there and back.
        expert: cost per expert, for a small product of its own.
        neuron: cost per neuron of an expert, for laying deltas out expert by expert.
    """

    assignment: int
    expert: int
    neuron: int

    def pays(self, tokens: int, top_k: int, experts: int, neurons: int) -> bool:
        """Whether all experts on all tokens cost more."""
        grouped = tokens * top_k * (neurons + self.assignment) + experts * (self.expert + neurons * self.neuron)
        return tokens * experts * neurons > grouped


ALIGNMENT = 16
"""`grouped_mm` needs each row of a matrix to begin at a multiple of this many bytes"""

GROUPING = {
    # Measured by benchmarks/many_experts.py. `grouped_mm` does not support float64.
    ("cpu", torch.float32): GroupingOverhead(assignment=80, expert=600, neuron=300),
    ("cpu", torch.bfloat16): GroupingOverhead(assignment=215, expert=10_000, neuron=600),
    # From the bandwidth and the matrix throughput of an H100, not measured.
    ("cuda", torch.bfloat16): GroupingOverhead(assignment=450, expert=64, neuron=64),
}


class JointProducts:
    """All experts on all tokens in one product."""

    by_expert = True

    def __init__(self, deltas_DE3m: Tensor, index_TK: Tensor) -> None:
        # split instead of two slices: its backward joins the gradients without filling zeros
        self.into_DE2m, self.back_DE1m = deltas_DE3m.split([2, 1], dim=2)

    def into(self, x_TD: Tensor) -> Tensor:
        """As `ExpertProducts.into`."""
        matrix = self.into_DE2m.reshape(len(self.into_DE2m), -1)
        return (x_TD @ matrix).unflatten(1, self.into_DE2m.shape[1:])

    def back(self, h_TXm: Tensor) -> Tensor:
        """As `ExpertProducts.back`."""
        return h_TXm.flatten(1) @ self._back_matrix()

    def added(self, output_TD: Tensor, h_TXm: Tensor) -> Tensor:
        """As `ExpertProducts.added`."""
        return torch.addmm(output_TD, h_TXm.flatten(1), self._back_matrix())

    def _back_matrix(self) -> Tensor:
        return self.back_DE1m.reshape(len(self.back_DE1m), -1).T


class TakenSlots(torch.autograd.Function):
    """`[T, E, ...]` -> `[T, K, ...]`: the slots of a token's experts. Autograd's `gather` would keep all slots."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, index_TK: Tensor) -> Tensor:
        """The slots `index_TK`."""
        ctx.save_for_backward(index_TK)
        ctx.slots = values.shape[1]
        return values.gather(1, _expanded(index_TK, values))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        """The gradient of all slots."""
        (index_TK,) = ctx.saved_tensors
        return filled_slots(gradient, index_TK, ctx.slots), None


def filled_slots(values: Tensor, index_TK: Tensor, slots: int) -> Tensor:
    """`[T, K, ...]` -> `[T, E, ...]`, with E = `slots`; zero for experts that a token does not use."""
    empty = values.new_zeros(len(values), slots, *values.shape[2:])
    return empty.scatter(1, _expanded(index_TK, values), values)


def _expanded(index_TK: Tensor, values: Tensor) -> Tensor:
    """`[T, K, ...]`: the same index for all values of a slot."""
    return index_TK.view(*index_TK.shape, *[1] * (values.dim() - 2)).expand(-1, -1, *values.shape[2:])


class GroupedProducts:
    """Tokens sorted by expert; each group is multiplied by its expert's matrix."""

    by_expert = False

    def __init__(self, deltas_DE3m: Tensor, index_TK: Tensor) -> None:
        experts, self.neurons = deltas_DE3m.shape[1], deltas_DE3m.shape[3]
        self.order = ByExpert(index_TK)
        numbers = torch.arange(experts, device=index_TK.device)
        self.ends_E = torch.searchsorted(self.order.experts_R, numbers, right=True).int()
        self.padding = -self.neurons % (ALIGNMENT // deltas_DE3m.element_size())
        by_expert = F.pad(deltas_DE3m, (0, self.padding)).permute(1, 2, 3, 0).contiguous()
        self.into_E2mD, self.back_E1mD = by_expert.split([2, 1], dim=1)

    def into(self, x_TD: Tensor) -> Tensor:
        """As `ExpertProducts.into`."""
        x_RD = self.order.sorted(x_TD.to(self.into_E2mD.dtype))  # autocast does not know `grouped_mm`
        shift_RX = self._product(x_RD, self.into_E2mD.flatten(1, 2).transpose(1, 2))
        return self.order.unsorted(shift_RX).unflatten(2, (2, -1))[..., : self.neurons]

    def back(self, h_TXm: Tensor) -> Tensor:
        """As `ExpertProducts.back`."""
        h_Rm = self.order.sorted(F.pad(h_TXm.to(self.back_E1mD.dtype), (0, self.padding)))
        return self.order.unsorted(self._product(h_Rm, self.back_E1mD.squeeze(1))).sum(1)

    def added(self, output_TD: Tensor, h_TXm: Tensor) -> Tensor:
        """As `ExpertProducts.added`."""
        return output_TD + self.back(h_TXm)

    def _product(self, rows_RX: Tensor, matrices: Tensor) -> Tensor:
        return F.grouped_mm(rows_RX, matrices, offs=self.ends_E)


class ByExpert:
    """R = T * K assignments of tokens to experts, sorted by expert.

    Attributes:
        experts_R: the expert of each assignment, ascending.
    """

    def __init__(self, index_TK: Tensor) -> None:
        self.shape = index_TK.shape
        self.experts_R, self.order_R = index_TK.flatten().sort(stable=True)
        numbers_R = torch.arange(len(self.order_R), device=index_TK.device)
        self.inverse_R = torch.empty_like(self.order_R).scatter_(0, self.order_R, numbers_R)

    def sorted(self, values: Tensor) -> Tensor:
        """`[R, width]`, from values of tokens, `[T, width]`, or of assignments, `[T, K, width]`."""
        repeats = self.shape[1] if values.dim() == 2 else 1
        sorted_: Tensor = Reordered.apply(values.flatten(0, -2), self.order_R, self.inverse_R, repeats)
        return sorted_

    def unsorted(self, values_R: Tensor) -> Tensor:
        """`[R, width]` -> `[T, K, width]`."""
        unsorted: Tensor = Reordered.apply(values_R, self.inverse_R, self.order_R, 1)
        return unsorted.unflatten(0, self.shape)


class Reordered(torch.autograd.Function):
    """Row i of the result is row order[i] // repeats: each row is taken `repeats` times.

    The backward sums a row's gradients in a fixed order, unlike that of `index_select` on a GPU.
    """

    @staticmethod
    def forward(ctx: Any, values: Tensor, order_R: Tensor, inverse_R: Tensor, repeats: int) -> Tensor:
        """`[R / repeats, width]` -> `[R, width]`; `inverse_R` undoes `order_R`."""
        ctx.save_for_backward(inverse_R)
        ctx.repeats = repeats
        return values.index_select(0, order_R // repeats if repeats > 1 else order_R)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        """The gradient of the values."""
        (inverse_R,) = ctx.saved_tensors
        rows = gradient.index_select(0, inverse_R)
        return (
            (rows.unflatten(0, (len(rows) // ctx.repeats, ctx.repeats)).sum(1) if ctx.repeats > 1 else rows),
            None,
            None,
            None,
        )
