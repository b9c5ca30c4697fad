"""A feed-forward block with routed experts:

    y = FFN(x; W) + sum_{e in topK(x)} p_e [FFN(x; W + delta_e) - FFN(x; W)]

computed as down(h + sum_e p_e (h_e - h)) + sum_e p_e dD_e h_e: one dense pass of the base for all experts. W includes
the delta of a shared expert, if there is one (`shared_expert.py`). See docs/design.md, "The layer".
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NoReturn, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from srde_ds.config.granularity import Granularity
from srde_ds.errors import SRDEError
from srde_ds.model.deltas import DeltaBank, DeltaLosses
from srde_ds.model.dispatch import Activation, ExpertDispatch, LocalDispatch
from srde_ds.model.feed_forward import FeedForward
from srde_ds.model.fused import FusedExperts, fused_activation
from srde_ds.model.policy import PolicyControl, RoutingPolicy
from srde_ds.model.prepared import (
    Preparation,
    Prepared,
    PreparedBlocks,
    PreparedDeltas,
    PreparedNeuronDeltas,
    PreparedNeurons,
    PreparedNoDeltas,
    PreparedRouter,
    PreparedWeights,
    arithmetic_dtype,
)
from srde_ds.model.products import grouping_pays
from srde_ds.model.router import Router, Routing, route
from srde_ds.model.shared_expert import SharedExpert, move
from srde_ds.model.statistics import Softmax, add_routing
from srde_ds.model.supports.blocks import SupportBlocks
from srde_ds.weights.schema import NEURONS


class TakeNeurons(torch.autograd.Function):
    """`values` and `values[:, neurons]`. The backward adds the gradient of the second to that of the first, in place.

    Autograd alone would fill a tensor with zeros for the gradient of the second, and add all of it.
    """

    @staticmethod
    def forward(ctx: Any, values_TF: Tensor, neurons: Tensor) -> tuple[Tensor, Tensor]:
        """`[T, F]` -> the same and `[T, n]`; neurons `[n]`, or `[T, n]` of each token."""
        ctx.save_for_backward(neurons)
        taken = values_TF.index_select(1, neurons) if neurons.dim() == 1 else values_TF.gather(1, neurons)
        return values_TF.view_as(values_TF), taken

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, of_all_TF: Tensor, of_taken: Tensor) -> tuple[Tensor, None]:
        """The gradient of the values."""
        (neurons,) = ctx.saved_tensors
        # In place: the block's product of the two factors has just made the gradient, and nobody else reads it.
        add_ = of_all_TF.index_add_ if neurons.dim() == 1 else of_all_TF.scatter_add_
        return add_(1, neurons, of_taken), None


class SRDEFeedForward(nn.Module):
    """Replaces the base's block.

    It calls the base's projections as modules without reading their weights, so that quantised kernels and hooks which
    gather sharded weights keep working. Only the form prepared for decoding reads weights, if they are plain.

    Children: `block` (the base's own), `deltas`, `router`, and `shared_expert` or None. Buffers: `support`, int32, see
    `supports/selection.py`; `number` `[1]`, the layer's number, which is a tensor so that torch.compile does not
    compile each layer separately. `dispatch` may be replaced by one that reaches experts on other ranks.

    Args:
        granularity: "neuron", "block" or "element".
        layer: number of the decoder layer, from 0 at the bottom.
        control: gives all layers of the model their policy.
    """

    support: Tensor
    number: Tensor
    own_part: Tensor

    def __init__(
        self,
        feed_forward: FeedForward,
        deltas: DeltaBank,
        router: Router,
        support: Tensor,
        *,
        granularity: Granularity,
        layer: int,
        control: PolicyControl,
        shared_expert: SharedExpert | None = None,
    ) -> None:
        super().__init__()
        self.block = feed_forward.block
        self.deltas = deltas
        self.router = router
        self.shared_expert = shared_expert
        self.register_buffer("support", support)
        self.register_buffer("number", torch.tensor([layer], device=support.device), persistent=False)
        # A tensor, since torch.compile would make a graph for each number.
        self.register_buffer("own_part", torch.tensor([deltas.part], device=support.device), persistent=False)
        self.roles = feed_forward.roles
        self.hidden, self.intermediate = feed_forward.hidden, feed_forward.intermediate
        self.granularity = granularity
        self.layer = layer
        self.control = control
        self.dispatch: ExpertDispatch = LocalDispatch()
        # In the experts' arithmetic, hooks on the activation, which has no parameters, would only split what
        # torch.compile sees and have it compiled again for each layer.
        self.skip_activation_hooks = False
        self.preparation = Preparation()
        self._located: tuple[Tensor, int, SupportBlocks] | None = None
        for module in (self, deltas, router):  # load_state_dict(assign=True) replaces their tensors
            module.register_load_state_dict_post_hook(self._after_loading)

    def _replicate_for_data_parallel(self) -> NoReturn:
        """Refuse the copies of torch.nn.DataParallel, which only SRDECallback would notice before training."""
        raise SRDEError(
            "torch.nn.DataParallel copies the model to all GPUs of one process, and the experts' routing and losses "
            "would be lost with the copies. Start a process for each GPU with torchrun or accelerate launch, or set "
            "CUDA_VISIBLE_DEVICES=0."
        )

    def forward(self, x: Tensor) -> Tensor:
        """`[..., D]` -> `[..., D]`, as the current policy says."""
        policy = self.control.policy
        if not policy.active:
            return self.block(x)
        x_TD, block, roles, router = x.flatten(0, -2), self.block, self.roles, self.router
        if not policy.apply_experts:
            if policy.choices is not None:
                chosen = route(router(x_TD), router.selection_bias, router.top_k, policy)
                policy.choices[self.layer] = chosen.choices_TK
            return block(x)
        act, down = getattr(block, roles["act"]), getattr(block, roles["down"])
        gate_TF, up_TF = getattr(block, roles["gate"])(x_TD), getattr(block, roles["up"])(x_TD)
        shared = None
        if self.shared_expert is not None:
            delta, neurons = self.shared_expert(), self.shared_expert.neurons
            shared = move(self._for_experts(act), x_TD, gate_TF, up_TF, delta, neurons)
            gate_TF, up_TF = shared.gate_TF, shared.up_TF
        prepared = self._prepared(gate_TF)
        if prepared is None:
            routing = route(router(x_TD), router.selection_bias, router.top_k, policy, self.number)
            deltas = self._effective_deltas(policy).to(gate_TF.dtype)
            values = (x_TD, gate_TF, up_TF, routing, deltas)
            output_TD = self._on_kernels(act, down, *values)
            if output_TD is None:
                hidden_TF, extra_TD = self._dispatched(act, *values)
                output_TD = self._plus(down(hidden_TF), extra_TD)
        else:
            routing = prepared.router(x_TD, policy)
            output_TD = prepared.experts(act, down, x_TD, gate_TF, up_TF, routing)
        if shared is not None:
            output_TD = output_TD + shared.extra_TD.to(output_TD.dtype)
        if policy.choices is not None:
            policy.choices[self.layer] = routing.choices_TK
        if policy.choice_weights is not None:
            policy.choice_weights[self.layer] = routing.weights_TK.detach()
        self._record(routing, policy)
        return output_TD.view_as(x)

    def _after_loading(self, *_: object) -> None:
        self.preparation.drop()

    def _on_kernels(
        self,
        act: Activation,
        down: nn.Module,
        x_TD: Tensor,
        gate_TF: Tensor,
        up_TF: Tensor,
        routing: Routing,
        deltas: Tensor,
    ) -> Tensor | None:
        """The output, `[T, D]`, with the experts' elementwise work done by `FusedExperts`; None: it cannot be used."""
        kind = self._fused_activation(act, gate_TF)
        products = None if kind is None else self.dispatch.products(routing.index_TK, deltas)
        if kind is None or products is None:
            return None
        shift, options = products.into(self._part(x_TD)).to(gate_TF.dtype), (kind, products.by_expert)
        chosen = (routing.weights_TK, routing.index_TK, self.support)
        hidden_TF, weighted = FusedExperts.apply(gate_TF, up_TF, shift, *chosen, options)
        if self.deltas.parts > 1:
            return self._plus(down(hidden_TF), products.back(weighted))
        return products.added(down(hidden_TF), weighted)

    def _part(self, x_TD: Tensor) -> Tensor:
        """Those hidden dimensions that the experts' neurons read."""
        return x_TD if self.deltas.parts == 1 else self._by_part(x_TD).index_select(1, self.own_part).squeeze(1)

    def _plus(self, output_TD: Tensor, extra_TD: Tensor) -> Tensor:
        """The output with `extra`, which is for those hidden dimensions alone."""
        if self.deltas.parts == 1:
            return output_TD + extra_TD
        extra_TD = extra_TD.to(output_TD.dtype)
        return self._by_part(output_TD).index_add(1, self.own_part, extra_TD[:, None]).view_as(output_TD)

    def _by_part(self, values_TD: Tensor) -> Tensor:
        """A view `[T, N, D / N]` by parts of the hidden dimensions."""
        return values_TD.unflatten(1, (self.deltas.parts, -1))

    def _support_blocks(self) -> SupportBlocks:
        """Where the support's blocks are. It is found anew only for another support, because a GPU is waited for."""
        support = self.support
        if support.is_inference():  # such a tensor does not record changes
            return SupportBlocks.of(support, self.hidden, self.intermediate)
        if self._located is None or self._located[0] is not support or self._located[1] != support._version:
            with torch.inference_mode(False):  # a backward may save what is kept
                blocks = SupportBlocks.of(support, self.hidden, self.intermediate)
            self._located = support, support._version, blocks
        return self._located[2]

    def _dispatched(
        self, act: Activation, x_TD: Tensor, gate_TF: Tensor, up_TF: Tensor, routing: Routing, deltas: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The hidden values with the experts' change, `[T, F]`, and extra `[T, D]`, see `dispatch.py`."""
        index_TK, weights_TK = routing.index_TK, routing.weights_TK.to(gate_TF.dtype)
        chosen = (index_TK, weights_TK, deltas)
        if self.granularity == "element":
            hidden_TF, act = act(gate_TF) * up_TF, self._for_experts(act)
            change_TF, extra_TD = self.dispatch.element(act, x_TD, gate_TF, up_TF, *chosen, self.support)
            return hidden_TF + change_TF, extra_TD
        if self.granularity == "block":
            blocks = self._support_blocks()
            (gate_TF, gate), (up_TF, up) = (TakeNeurons.apply(t, blocks.neurons) for t in (gate_TF, up_TF))
            hidden_TF, act = act(gate_TF) * up_TF, self._for_experts(act)
            change_TU, extra_TD = self.dispatch.element(act, x_TD, gate, up, *chosen, blocks)
            return hidden_TF.index_add_(1, blocks.neurons, change_TU), extra_TD
        shared = self.support.dim() == 1
        shape = (len(x_TD), 1 if shared else index_TK.shape[1], self.support.shape[-1])
        neurons = self.support if shared else self.support[index_TK].long().flatten(1)
        (gate_TF, gate), (up_TF, up) = (TakeNeurons.apply(t, neurons) for t in (gate_TF, up_TF))
        hidden_TF, act = act(gate_TF) * up_TF, self._for_experts(act)
        change_TXm, extra_TD = self.dispatch.neuron(act, self._part(x_TD), gate.view(shape), up.view(shape), *chosen)
        if shared:
            return hidden_TF.index_add_(1, neurons, change_TXm.squeeze(1)), extra_TD
        for own, change in zip(neurons.view(shape).unbind(1), change_TXm.unbind(1), strict=True):
            hidden_TF.scatter_add_(1, own, change)  # no neuron repeats within a support, so the sum has one order
        return hidden_TF, extra_TD

    def _for_experts(self, act: Any) -> Activation:
        return cast("Activation", act.forward if self.skip_activation_hooks else act)

    def _fused_activation(self, act: Any, gate_TF: Tensor) -> int | None:
        """The number of the activation for `FusedExperts`; None: it cannot be used."""
        hooked = isinstance(act, nn.Module) and (act._forward_hooks or act._forward_pre_hooks)
        if (hooked and not self.skip_activation_hooks) or self.granularity != "neuron":
            return None
        return fused_activation(act, gate_TF, self.support.shape[-1])

    def train(self, mode: bool = True) -> SRDEFeedForward:
        """As in torch. Training outdates what was prepared for decoding."""
        if mode:
            self.preparation.drop()
        return super().train(mode)

    def common_tensors(self) -> dict[str, Tensor]:
        """What every rank holds whole, by names in files: the support, the shared expert's neurons, and a copy of the
        selection bias unless it is zero."""
        found, bias = {"support": self.support}, self.router.selection_bias
        if self.shared_expert is not None:
            found[NEURONS] = self.shared_expert.neurons
        return found | ({"router_bias": bias.clone()} if bool(bias.any()) else {})

    def delta_square_norms(self) -> Tensor:
        """`[E]` fp32: squared norm of each expert's effective delta. The bank's parameters must be whole here."""
        with torch.no_grad():
            return self.deltas.square_norms(self.deltas()).float()

    def _effective_deltas(self, policy: RoutingPolicy) -> Tensor:
        deltas: Tensor = self.deltas(
            temperature=policy.support_temperature if self.training else None,
            step=policy.noise_step,
            overlap_weight=policy.auxiliary_weights.support_overlap,
        )
        # Both are needed: under torch.compile a slice keeps requires_grad even if gradients are off.
        if not (torch.is_grad_enabled() and deltas.requires_grad):
            return deltas
        sums = None if policy.statistics is None else policy.statistics.sums(deltas.device)
        weights = self._size_weights(deltas, policy) if policy.auxiliary_weights.delta_size else None
        if sums is not None or weights is not None:
            deltas = DeltaLosses.apply(deltas, weights, self.deltas, sums, self.number)
        return deltas

    def _prepared(self, gate_TF: Tensor) -> Prepared | None:
        """Router and effective deltas prepared for decoding (eval mode, no gradients); None: use `dispatch`.

        None if other ranks hold a part of them, under autocast, and for prompts so long that it pays to sort their
        tokens by expert. Compiled code would not notice when they are out of date, so there it is what is held, see
        `hold_prepared`.
        """
        if self.training or torch.is_grad_enabled():
            return None
        if torch.compiler.is_compiling():
            return self.preparation.held
        if torch.is_autocast_enabled(gate_TF.device.type):
            return None
        if self.router._forward_hooks or self.router._forward_pre_hooks:  # hooks expect the router to be called
            return None
        if self.granularity == "neuron" and grouping_pays(
            gate_TF,
            tokens=len(gate_TF),
            top_k=self.router.top_k,
            experts=len(self.router.selection_bias),
            neurons=self.support.shape[-1],
            width=self.hidden // self.deltas.parts,
        ):
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
        if held_elsewhere or any(t.is_inference() for t in made_of):  # inference tensors do not record changes
            return None
        deltas = self.deltas().to(arithmetic_dtype(gate_TF))
        experts: PreparedDeltas
        if not bool(deltas.any()):
            experts = PreparedNoDeltas()
        elif self.granularity != "neuron":
            kind = PreparedBlocks if self.granularity == "block" else PreparedWeights
            experts = kind(deltas, self.support, hidden=self.hidden, intermediate=self.intermediate)
        elif base and self.deltas.parts == 1:
            experts = PreparedNeurons(deltas, self.support, base)
        else:
            experts = PreparedNeuronDeltas(deltas, self.support, parts=self.deltas.parts, own_part=self.own_part)
        prepared = Prepared(PreparedRouter(self.router, gate_TF.dtype), experts)
        return self.preparation.put(made_of, gate_TF.dtype, prepared)

    @contextmanager
    def hold_prepared(self, dtype: torch.dtype) -> Iterator[None]:
        """A context in which nothing changes the weights, so that compiled code may use what is prepared.

        Args:
            dtype: of the base's values.
        """
        before = self.preparation.held
        with torch.no_grad():
            self.preparation.held = self._prepared(torch.empty(0, dtype=dtype, device=self.support.device))
        try:
            yield
        finally:
            self.preparation.held = before

    def _readable_weights(self, gate_TF: Tensor) -> list[Tensor]:
        """The weights of gate, up and down, if `PreparedNeurons` may replace the base's neurons; else empty.

        The base must compute with just these weights: not quantised, wrapped, hooked or on another device.
        """
        if self.granularity != "neuron" or arithmetic_dtype(gate_TF).itemsize < 4:
            return []
        modules = [getattr(self.block, self.roles[role]) for role in ("gate", "up", "down")]
        for module in modules:
            plain = type(module) is nn.Linear and module.bias is None
            if not plain or module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module):
                return []
        weights = [module.weight for module in modules]
        return weights if all(t.device == gate_TF.device and t.is_floating_point() for t in weights) else []

    def _size_weights(self, deltas: Tensor, policy: RoutingPolicy) -> Tensor:
        """Weight of each expert's squared size, shaped to broadcast against the effective deltas.

        Zero for locked experts, which must not change, and for a rank's padding slots. Gradients are averaged over all
        ranks, so a gradient that only some ranks have must make up for the others.
        """
        allowed, first = policy.allowed_experts, self.deltas.first_expert
        everyone = torch.ones_like(self.router.selection_bias)
        counted_E = (everyone if allowed is None else allowed).to(deltas)
        slots = deltas.shape[self.deltas.expert_axis]
        own = counted_E[first : first + slots]
        weight = policy.auxiliary_weights.delta_size * self.deltas.ranks_per_copy
        weights = weight * F.pad(own, (0, slots - len(own)))
        shape = [1] * deltas.dim()
        shape[self.deltas.expert_axis] = slots
        return weights.view(shape)

    def _record(self, routing: Routing, policy: RoutingPolicy) -> None:
        """Add to the policy's statistics what no backward will add."""
        logits_TE = routing.logits_TE
        # In train mode, a forward without gradients is the first of two: activations will be recomputed.
        if policy.statistics is None or self.training or logits_TE.requires_grad:
            return
        mask_T, sums = policy.real_tokens(logits_TE), policy.statistics.sums(logits_TE.device)
        add_routing(sums, self.number, Softmax.of(logits_TE, mask_T), routing.index_TK, routing.used_TK, mask_T)
