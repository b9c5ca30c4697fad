"""Uses experts on other ranks: brings their deltas here, or sends the tokens there, with the same result.

The reasons are in docs/design.md, "Placement".

A transport takes the place of `LocalDispatch` in a layer. The layer passes it the deltas of the experts that this rank
holds: E_l of them, E_l · P ≥ E slots in total. Slots from E on are padding that no token chooses.

Collectives run in the same order on every rank, forward and backward: whatever the routing, a layer's graph has the
same nodes everywhere, and an expert without tokens computes on an empty batch.

A token routed to an expert is an assignment. R of them leave a rank, `top_k` for each of its T tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from srde_ds.model.dispatch import Activation, element_experts, neuron_experts
from srde_ds.model.supports.blocks import SupportBlocks

RunExperts = Callable[[Tensor, Tensor], Tensor]
"""From the inputs `[R, width]` of assignments and their slots `[R, 1]` to the results"""


class DeltaTransport:
    """All-gathers the layer's effective deltas in the expert-parallel group; the tokens stay."""

    def __init__(self, group: dist.ProcessGroup, num_experts: int) -> None:
        self.group, self.num_experts = group, num_experts

    def neuron(
        self,
        act: Activation,
        x_TD: Tensor,
        gate_TXm: Tensor,
        up_TXm: Tensor,
        index_TK: Tensor,
        weights_TK: Tensor,
        deltas_DE3m: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """See `ExpertDispatch`: `neuron_experts` with the deltas of all ranks."""
        return neuron_experts(act, x_TD, gate_TXm, up_TXm, index_TK, weights_TK, self._gathered(deltas_DE3m))

    def products(self, index_TK: Tensor, deltas_DE3m: Tensor) -> None:
        """See `ExpertDispatch`: none, since the kernels need all experts in one process."""

    def _gathered(self, deltas_DE3m: Tensor) -> Tensor:
        by_expert: Tensor = GatherParts.apply(deltas_DE3m.transpose(0, 1), self.group)
        return by_expert[: self.num_experts].transpose(0, 1)

    def element(
        self,
        act: Activation,
        x_TD: Tensor,
        gate_TF: Tensor,
        up_TF: Tensor,
        index_TK: Tensor,
        weights_TK: Tensor,
        deltas_En: Tensor,
        support: Tensor | SupportBlocks,
    ) -> tuple[Tensor, Tensor]:
        """See `ExpertDispatch`: `element_experts` with the deltas of all ranks."""
        gathered = GatherParts.apply(deltas_En, self.group)[: self.num_experts]
        return element_experts(act, x_TD, gate_TF, up_TF, index_TK, weights_TK, gathered, support)


class TokenTransport:
    """Sends each routed token to its expert's rank, computes there, and sends the result back; the deltas stay."""

    def __init__(self, group: dist.ProcessGroup, num_experts: int) -> None:
        self.group, self.num_experts = group, num_experts

    def products(self, index_TK: Tensor, deltas_DE3m: Tensor) -> None:
        """See `ExpertDispatch`: none here, since a token's products are computed on its experts' ranks."""

    def neuron(
        self,
        act: Activation,
        x_TD: Tensor,
        gate_TXm: Tensor,
        up_TXm: Tensor,
        index_TK: Tensor,
        weights_TK: Tensor,
        deltas_DE3m: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """See `ExpertDispatch`: each routed token is computed where its expert's deltas are."""
        sent = _Assignments(index_TK, weights_TK)
        column_R = torch.zeros_like(sent.column_R) if gate_TXm.shape[1] == 1 else sent.column_R
        neurons = gate_TXm.shape[2]
        own_gate, own_up = (t[sent.token_R, column_R] for t in (gate_TXm, up_TXm))
        inputs = torch.cat([x_TD[sent.token_R], own_gate, own_up], dim=1)

        def run_experts(inputs: Tensor, slot_R1: Tensor) -> Tensor:
            x, gate, up = inputs.split([inputs.shape[1] - 2 * neurons, neurons, neurons], dim=1)
            ones_R1 = torch.ones_like(slot_R1, dtype=inputs.dtype)
            change, extra = neuron_experts(act, x, gate[:, None], up[:, None], slot_R1, ones_R1, deltas_DE3m)
            return torch.cat([change[:, 0], extra], dim=1)

        results = self._at_owners(inputs, sent.expert_R, deltas_DE3m.shape[1], run_experts)
        change, extra = (sent.p_R1 * results).split([neurons, x_TD.shape[1]], dim=1)
        change_TXm = torch.zeros_like(gate_TXm).index_put((sent.token_R, column_R), change, accumulate=True)
        return change_TXm, torch.zeros_like(x_TD).index_add(0, sent.token_R, extra)

    def element(
        self,
        act: Activation,
        x_TD: Tensor,
        gate_TF: Tensor,
        up_TF: Tensor,
        index_TK: Tensor,
        weights_TK: Tensor,
        deltas_En: Tensor,
        support: Tensor | SupportBlocks,
    ) -> tuple[Tensor, Tensor]:
        """See `ExpertDispatch`: each routed token is computed where its expert's deltas are."""
        sent = _Assignments(index_TK, weights_TK)
        width = gate_TF.shape[1]
        # Supports of the slots here; a padding slot gets no tokens, so any support will do.
        first = dist.get_rank(self.group) * len(deltas_En)
        slots = torch.arange(first, first + len(deltas_En)).clamp(max=self.num_experts - 1)
        if isinstance(support, SupportBlocks):
            support = support.of_experts(slots.tolist())
        elif support.dim() == 2:
            support = support[slots.to(support.device)]
        inputs = torch.cat([t[sent.token_R] for t in (x_TD, gate_TF, up_TF)], dim=1)

        def run_experts(inputs: Tensor, slot_R1: Tensor) -> Tensor:
            x, gate, up = inputs.split([inputs.shape[1] - 2 * width, width, width], dim=1)
            ones_R1 = torch.ones_like(slot_R1, dtype=inputs.dtype)
            return torch.cat(element_experts(act, x, gate, up, slot_R1, ones_R1, deltas_En, support), dim=1)

        results = self._at_owners(inputs, sent.expert_R, len(deltas_En), run_experts)
        change, extra = (sent.p_R1 * results).split([width, x_TD.shape[1]], dim=1)
        change_TF = torch.zeros_like(gate_TF).index_add(0, sent.token_R, change)
        return change_TF, torch.zeros_like(x_TD).index_add(0, sent.token_R, extra)

    def _at_owners(self, inputs_R: Tensor, expert_R: Tensor, slots: int, run_experts: RunExperts) -> Tensor:
        """The result of each assignment, computed on its expert's rank, in the order of the assignments.

        Args:
            inputs_R: `[R, width]`, sorted by expert, so that those for one rank, and one of its slots, are contiguous.
            expert_R: `[R]`, the expert of each assignment.
            slots: number of experts that each rank holds.
        """
        size = dist.get_world_size(self.group)
        sent = torch.bincount(expert_R, minlength=size * slots)
        received = torch.empty_like(sent)
        dist.all_to_all_single(received, sent, group=self.group)
        sent_PS, received_PS = sent.view(size, slots).tolist(), received.view(size, slots).tolist()
        send_splits, receive_splits = [sum(s) for s in sent_PS], [sum(r) for r in received_PS]
        arrived = ExchangeTokens.apply(inputs_R, send_splits, receive_splits, self.group)
        # They are ordered by sender, then slot.
        slot_S = torch.arange(size * slots, device=received.device) % slots
        results = run_experts(arrived, slot_S.repeat_interleave(received, output_size=len(arrived))[:, None])
        return ExchangeTokens.apply(results, receive_splits, send_splits, self.group)


class _Assignments:
    """This rank's assignments whose weight is not zero, sorted by expert.

    Attributes:
        expert_R, token_R, column_R: the expert, the token, and which of the token's K experts it is.
        p_R1: the assignment's weight.
    """

    def __init__(self, index_TK: Tensor, weights_TK: Tensor) -> None:
        token, column = (weights_TK != 0).nonzero(as_tuple=True)  # a locked expert has weight zero
        order = index_TK[token, column].argsort(stable=True)
        self.token_R, self.column_R = token[order], column[order]
        self.expert_R = index_TK[self.token_R, self.column_R]
        self.p_R1 = weights_TK[self.token_R, self.column_R][:, None]


class GatherParts(torch.autograd.Function):
    """Concatenates the ranks' tensors along their first axis; backwards, sums the gradients and keeps the own part.

    The sum is taken in fp32, as DeepSpeed's gradient reduction is here.
    """

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, group: dist.ProcessGroup | None) -> Tensor:
        """`[P, ...]` on each of R ranks becomes `[R*P, ...]`, in the order of the ranks."""
        ctx.group, ctx.dtype = group, tensor.dtype
        size = dist.get_world_size(group)
        gathered = tensor.new_empty(size * tensor.shape[0], *tensor.shape[1:])
        dist.all_gather_into_tensor(gathered, tensor.contiguous(), group=group)
        return gathered

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        """`[R*P, ...]` becomes `[P, ...]`, summed in fp32."""
        size = dist.get_world_size(ctx.group)
        own = gradient.new_empty(gradient.shape[0] // size, *gradient.shape[1:], dtype=torch.float32)
        dist.reduce_scatter_tensor(own, gradient.float().contiguous(), group=ctx.group)
        return own.to(ctx.dtype), None


class ExchangeTokens(torch.autograd.Function):
    """All-to-all of values of tokens, `[R, width]`; backwards, the gradients return the same way."""

    @staticmethod
    def forward(
        ctx: Any, values: Tensor, send_splits: list[int], receive_splits: list[int], group: dist.ProcessGroup
    ) -> Tensor:
        """The values that the ranks sent to this one, in the order of the ranks."""
        ctx.send_splits, ctx.receive_splits, ctx.group = send_splits, receive_splits, group
        return _exchange(values, send_splits, receive_splits, group)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        """The gradients of the values that this rank sent."""
        return _exchange(gradient, ctx.receive_splits, ctx.send_splits, ctx.group), None, None, None


def _exchange(values: Tensor, send_splits: list[int], receive_splits: list[int], group: dist.ProcessGroup) -> Tensor:
    arrived = values.new_empty(sum(receive_splits), values.shape[1])
    dist.all_to_all_single(arrived, values.contiguous(), receive_splits, send_splits, group=group)
    return arrived
