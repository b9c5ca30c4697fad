"""A feed-forward block with routed experts:

    y = FFN(x; W) + sum_{e in topK(x)} p_e [FFN(x; W + delta_e) - FFN(x; W)]          (docs/design.md)

computed as down(h + sum_e p_e (h_e - h)) + sum_e p_e dD_e h_e: one dense pass of the base for all experts.
"""

from __future__ import annotations

from functools import partial
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from srde_ds.model.base import FeedForward
from srde_ds.model.deltas import DeltaBank
from srde_ds.model.dispatch import Activation, ExpertDispatch, LocalDispatch
from srde_ds.model.prepared import (
    Preparation,
    Prepared,
    PreparedDeltas,
    PreparedElementDeltas,
    PreparedNeuronDeltas,
    PreparedNeurons,
    PreparedNoDeltas,
    PreparedRouter,
    arithmetic_dtype,
)
from srde_ds.model.router import Router, RouterLosses, Routing, RoutingContext, route


class SRDEFeedForward(nn.Module):
    """Stands where the base's block stood.

    The base's projections are called as modules and their weights not read, so that hooks which gather sharded weights
    and quantised kernels keep working. Only what is laid out for decoding reads them, where they are plain.

    Children: `block` (the base's own), `deltas`, `router`. Buffer `support`, int32, see `supports.py`.
    `dispatch` may be replaced by one that reaches experts on other ranks.
    """

    support: Tensor

    def __init__(
        self,
        feed_forward: FeedForward,
        deltas: DeltaBank,
        router: Router,
        support: Tensor,
        *,
        granularity: str,
        layer: int,
        context: RoutingContext,
    ) -> None:
        super().__init__()
        self.block = feed_forward.block
        self.deltas = deltas
        self.router = router
        self.register_buffer("support", support)
        self.roles = feed_forward.roles
        self.hidden, self.intermediate = feed_forward.hidden, feed_forward.intermediate
        self.granularity = granularity
        self.layer = layer
        self.context = context
        self.dispatch: ExpertDispatch = LocalDispatch()
        # In the experts' arithmetic hooks on the activation, a module without parameters, would do nothing but split
        # what torch.compile sees and have it compiled anew for each layer.
        self.skip_activation_hooks = False
        self.preparation = Preparation()
        for module in (self, deltas, router):  # with assign=True, their tensors become others
            module.register_load_state_dict_post_hook(self._after_loading)

    def forward(self, x: Tensor) -> Tensor:
        """`[..., D]` -> `[..., D]`."""
        if not self.context.active:
            return self.block(x)
        x_TD, block, roles, router = x.flatten(0, -2), self.block, self.roles, self.router
        act, down = getattr(block, roles["act"]), getattr(block, roles["down"])
        gate_TF, up_TF = getattr(block, roles["gate"])(x_TD), getattr(block, roles["up"])(x_TD)
        prepared = self._prepared(gate_TF)
        if prepared is None:
            routing = route(router(x_TD), router.selection_bias, router.top_k, self.layer, self.context)
            hidden_TF, extra_TD = self._dispatched(act, x_TD, gate_TF, up_TF, routing)
            output_TD = down(hidden_TF) + extra_TD
        else:
            routing = prepared.router(x_TD, self.layer, self.context)
            output_TD = prepared.experts(act, down, x_TD, gate_TF, up_TF, routing)
        return self._with_losses(output_TD, routing).view_as(x)

    def _after_loading(self, *_: object) -> None:
        self.preparation.drop()

    def _dispatched(
        self, act: Activation, x_TD: Tensor, gate_TF: Tensor, up_TF: Tensor, routing: Routing
    ) -> tuple[Tensor, Tensor]:
        """The hidden values with the experts' change, `[T, F]`, and extra `[T, D]`, see `dispatch.py`."""
        hidden_TF = act(gate_TF) * up_TF
        if self.skip_activation_hooks:
            act = cast("Activation", act.forward)  # type: ignore[attr-defined]
        weights_TE, deltas = routing.weights_TE.to(gate_TF.dtype), self._effective_deltas().to(gate_TF.dtype)
        if self.granularity == "element":
            change_TF, extra_TD = self.dispatch.element(act, x_TD, gate_TF, up_TF, weights_TE, deltas, self.support)
            return hidden_TF + change_TF, extra_TD
        neurons = self.support.view(-1, self.support.shape[-1])  # [S, m], S = 1 or E
        gate_TSm, up_TSm = (t.index_select(1, neurons.flatten()).unflatten(1, neurons.shape) for t in (gate_TF, up_TF))
        change_TSm, extra_TD = self.dispatch.neuron(act, x_TD, gate_TSm, up_TSm, weights_TE, deltas)
        for row, index in enumerate(neurons):  # within a row no neuron repeats, so the sum has one order
            hidden_TF.index_add_(1, index, change_TSm[:, row])
        return hidden_TF, extra_TD

    def train(self, mode: bool = True) -> SRDEFeedForward:
        if mode:
            self.preparation.drop()
        return super().train(mode)

    def delta_square_norms(self) -> Tensor:
        """`[E]`: squared norm of each expert's effective delta. The bank's parameters must be readable."""
        with torch.no_grad():
            return self.deltas.square_norms(self.deltas())

    def _effective_deltas(self) -> Tensor:
        deltas: Tensor = self.deltas(
            temperature=self.context.support_temperature if self.training else None,
            step=self.context.support_noise,
            overlap_weight=self.context.support_overlap_weight,
        )
        # Both: under torch.compile a slice of all rows keeps requires_grad without gradients, too.
        if torch.is_grad_enabled() and deltas.requires_grad:
            # Runs in the backward, hence once a micro-batch also when checkpointing repeats the forward.
            deltas.register_hook(partial(_record_gradient, self.context, self.layer, self.deltas))
            if self.context.delta_size_weight:  # after the other hook: statistics are of the loss's own gradient
                deltas.register_hook(partial(_add_size_gradient, deltas.detach(), self._size_weights(deltas)))
        return deltas

    def _prepared(self, gate_TF: Tensor) -> Prepared | None:
        """Router and effective deltas laid out for reading, in eval mode without gradients; None: use `dispatch`.

        Not where other ranks hold a part of them, nor under autocast, nor inside torch.compile, which cannot see what
        makes them stale.
        """
        if self.training or torch.is_grad_enabled() or torch.compiler.is_compiling():
            return None
        if torch.is_autocast_enabled(gate_TF.device.type):
            return None
        if self.router._forward_hooks or self.router._forward_pre_hooks:  # somebody wants it called
            return None
        prepared = self.preparation.get(gate_TF.dtype)
        if prepared is not None:
            return prepared
        parameters = cast("list[Tensor]", list(self.deltas._parameters.values()))
        base = self._readable_weights(gate_TF)
        made_of = [*parameters, self.support, self.router.weight, self.router.selection_bias, *base]
        held_elsewhere = not isinstance(self.dispatch, LocalDispatch) or any(
            hasattr(t, "srde_whole_shape") for t in made_of
        )
        if held_elsewhere or any(t.is_inference() for t in made_of):  # inference tensors do not tell of changes
            return None
        deltas = self.deltas().to(arithmetic_dtype(gate_TF))
        experts: PreparedDeltas
        if not bool(deltas.any()):
            experts = PreparedNoDeltas()
        elif self.granularity == "element":
            experts = PreparedElementDeltas(deltas, self.support, hidden=self.hidden, intermediate=self.intermediate)
        elif base:
            experts = PreparedNeurons(deltas, self.support, base)
        else:
            experts = PreparedNeuronDeltas(deltas, self.support, intermediate=self.intermediate)
        prepared = Prepared(PreparedRouter(self.router, gate_TF.dtype), experts)
        return self.preparation.put(made_of, gate_TF.dtype, prepared)

    def _readable_weights(self, gate_TF: Tensor) -> list[Tensor]:
        """Of gate, up and down, if `PreparedNeurons` can stand for the base's neurons, else none.

        They must be what the base computes with: not quantised, wrapped, hooked or on another device.
        """
        if self.granularity == "element" or arithmetic_dtype(gate_TF).itemsize < 4:
            return []
        modules = [getattr(self.block, self.roles[role]) for role in ("gate", "up", "down")]
        for module in modules:
            plain = type(module) is nn.Linear and module.bias is None
            if not plain or module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module):
                return []
        weights = [module.weight for module in modules]
        return weights if all(t.device == gate_TF.device and t.is_floating_point() for t in weights) else []

    def _size_weights(self, deltas: Tensor) -> Tensor:
        """Weight of each expert's squared size, to broadcast against the effective deltas.

        Zero for locked experts, which must not change, and for the padding slots of a rank, which are no experts.
        Gradients are averaged over all ranks: one that few ranks have counts for the others.
        """
        allowed, first = self.context.allowed_experts, self.deltas.first_expert
        everyone = torch.ones_like(self.router.selection_bias)
        counted_E = (everyone if allowed is None else allowed).to(deltas)
        slots = deltas.shape[self.deltas.expert_axis]
        own = counted_E[first : first + slots]
        weight = self.context.delta_size_weight * self.deltas.ranks_per_copy
        weights = weight * F.pad(own, (0, slots - len(own)))
        shape = [1] * deltas.dim()
        shape[self.deltas.expert_axis] = slots
        return weights.view(shape)

    def _with_losses(self, output: Tensor, routing: Routing) -> Tensor:
        logits_TE, in_training = routing.logits_TE, routing.logits_TE.requires_grad
        if not in_training and (self.training or not self.context.collect_statistics):
            return output
        chosen_TE, mask = routing.chosen_TE, self.context.token_mask
        mask_T = torch.ones_like(chosen_TE[:, 0]) if mask is None else mask.reshape(-1)
        if in_training:
            return RouterLosses.apply(output, logits_TE, chosen_TE, mask_T, self.context, self.layer)
        self.context.statistics.add_routing(self.layer, logits_TE, chosen_TE, mask_T)
        return output


def _add_size_gradient(deltas: Tensor, weights: Tensor, gradient: Tensor) -> Tensor:
    """The gradient of the loss and of sum_e weight_e |delta_e|^2."""
    return torch.addcmul(gradient, deltas, weights, value=2)


def _record_gradient(context: RoutingContext, layer: int, bank: DeltaBank, gradient: Tensor) -> None:
    squares = bank.square_norms(gradient)
    context.statistics.add("delta_gradient_square", layer, squares, first_expert=bank.first_expert)
