"""Which experts a token uses, the router's losses, and what is counted about both."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from srde_ds.errors import SRDEError
from srde_ds.model.deltas import tagged
from srde_ds.model.seeding import seeded_generator


class RoutingStatistics:
    """Sums over real tokens since the last `pop`, float64, on the device of the layers.

    assignments `[L, E]`: tokens that chose an expert; probability_sum `[L, E]`: full softmax probabilities;
    entropy_sum, z_sum, tokens `[L]`: entropy (nats) and squared logsumexp of the router's logits;
    delta_gradient_square `[L, E]`: squared norm of the gradient of an expert's effective delta, summed over
    micro-batches.
    """

    def __init__(self, num_layers: int, num_experts: int) -> None:
        self._shapes = {
            "assignments": (num_layers, num_experts),
            "probability_sum": (num_layers, num_experts),
            "entropy_sum": (num_layers,),
            "z_sum": (num_layers,),
            "tokens": (num_layers,),
            "delta_gradient_square": (num_layers, num_experts),
        }
        self._sums: dict[str, Tensor] = {}

    def add(self, name: str, layer: int, value: Tensor, *, first_expert: int = 0) -> None:
        """Add `value` to layer `layer` of one sum, without waiting for the device."""
        if name not in self._sums:
            self._sums[name] = torch.zeros(self._shapes[name], dtype=torch.float64, device=value.device)
        target = self._sums[name][layer]
        if value.dim():
            target = target[first_expert : first_expert + value.numel()]
            value = value[: target.numel()]  # slots behind the last expert are padding
        target += value.detach().double()

    def add_routing(self, layer: int, logits_TE: Tensor, chosen_TE: Tensor, mask_T: Tensor) -> None:
        """Add one forward's routing; `mask_T` is True for real tokens."""
        probabilities_TE = logits_TE.softmax(dim=1)
        mask = mask_T.to(logits_TE.dtype)
        self.add("assignments", layer, (chosen_TE & mask_T[:, None]).sum(0))
        self.add("probability_sum", layer, mask @ probabilities_TE)
        self.add("entropy_sum", layer, mask @ torch.special.entr(probabilities_TE).sum(1))
        self.add("z_sum", layer, mask @ logits_TE.logsumexp(1).square())
        self.add("tokens", layer, mask_T.sum())

    def pop(self) -> dict[str, Tensor]:
        """All sums; they start again at zero."""
        sums, self._sums = self._sums, {}
        return {name: sums.get(name, torch.zeros(shape, dtype=torch.float64)) for name, shape in self._shapes.items()}


@dataclass
class RoutingContext:
    """What all layers read; the caller sets it before a forward and leaves it alone until the backward is done.

    Attributes:
        token_mask: `[B, S]` bool, True for real tokens; None: all are. Padding is in no statistic and no loss.
        loss_scale: factor of the auxiliary losses, which are sums over tokens. For a mean over the tokens of an
            optimizer step under data-parallel averaging: world size / tokens of the global step.
        expert_share: `[L, E]` each expert's share of the assignments of the previous optimizer step; None: not known
            yet, no load balancing.
        target_share: `[E]` the shares that load balancing aims at, see `training.balancing`; None: equal ones.
        delta_size_weight: factor of the squared size of the effective deltas of unlocked experts in one backward, which
            adds its gradient whole: a step's weight times `training.balancing.delta_size_factor`.
        support_temperature: of a support that is being learned; None: it is fixed. In eval mode there is no noise.
        support_noise: the optimizer step, which draws the noise.
        support_overlap_weight: factor of the overlap of the experts' learned supports in one backward, which adds its
            gradient whole: a step's weight / micro-steps.
        collect_statistics: record forwards in eval mode. A training step always records, in its backward.
        record_choices: keep the last forward's choices in `choices`.
        allowed_experts: `[E]` bool, False for locked experts: they get no tokens; with fewer allowed than top_k
            a token uses only those. None: all are allowed.
        forced_experts: `[B, S]` int64: each token goes to this expert alone with weight 1; the router and its
            losses are left out.
        active: False gives the base's own output.
        choices: layer -> `[T, K]` int64, best first, -1 where fewer than top_k experts are allowed.
    """

    statistics: RoutingStatistics
    token_mask: Tensor | None = None
    loss_scale: float = 0.0
    load_balancing_weight: float = 0.0
    router_z_weight: float = 0.0
    expert_share: Tensor | None = None
    target_share: Tensor | None = None
    delta_size_weight: float = 0.0
    support_temperature: float | None = None
    support_noise: int = 0
    support_overlap_weight: float = 0.0
    collect_statistics: bool = False
    record_choices: bool = False
    allowed_experts: Tensor | None = None
    forced_experts: Tensor | None = None
    active: bool = True
    choices: dict[int, Tensor] = field(default_factory=dict)


@dataclass
class Routing:
    """One layer's routing: index_TK best first, weights_TK (0 for a locked expert), logits_TE (-inf where locked).

    forced: index_TK does not come from the logits, and holds no locked expert."""

    index_TK: Tensor
    weights_TK: Tensor
    logits_TE: Tensor
    forced: bool

    @property
    def used_TK(self) -> Tensor:
        """bool: not locked."""
        if self.forced:
            return torch.ones_like(self.index_TK, dtype=torch.bool)
        return self.logits_TE.detach().gather(1, self.index_TK) > float("-inf")

    @property
    def weights_TE(self) -> Tensor:
        """Zero where not chosen."""
        return torch.zeros_like(self.logits_TE).scatter(1, self.index_TK, self.weights_TK)

    @property
    def chosen_TE(self) -> Tensor:
        """bool."""
        return torch.zeros_like(self.logits_TE, dtype=torch.bool).scatter(1, self.index_TK, self.used_TK)


class Router(nn.Module):
    """One linear map without bias, computed in fp32. `route` takes the top K, then softmax over the chosen logits.

    Buffer `selection_bias` `[E]` fp32: added to the logits for the choice of the top K alone. It has no gradient;
    `training.balancing.update_biases` moves it.
    """

    selection_bias: Tensor

    def __init__(
        self, hidden: int, experts: int, top_k: int, *, seed: int, layer: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        super().__init__()
        weight = torch.randn(experts, hidden, generator=seeded_generator(seed, "router", layer)) * 0.02
        self.weight = tagged(weight.to(dtype=dtype, device=device), "router", expert_axis=None)
        self.register_buffer("selection_bias", torch.zeros(experts, dtype=torch.float32, device=device))
        self.top_k = top_k

    def forward(self, x_TD: Tensor) -> Tensor:
        """logits `[T, E]`. A bare tensor: ZeRO-3 finds no backward hook's place in other kinds of output."""
        if torch.is_autocast_enabled(x_TD.device.type):  # asked first: the context costs more than the product
            with torch.autocast(x_TD.device.type, enabled=False):
                return self._logits(x_TD)
        return self._logits(x_TD)

    def _logits(self, x_TD: Tensor) -> Tensor:
        precision = torch.promote_types(x_TD.dtype, torch.float32)
        return F.linear(x_TD.to(precision), self.weight.to(precision))

    def load_selection_bias(self, bias_E: Tensor | None) -> None:
        """Set the bias to stored values, or to zero.

        Raises:
            SRDEError: another number of experts, or values that are not finite.
        """
        if bias_E is None:
            self.selection_bias.zero_()
            return
        if bias_E.shape != self.selection_bias.shape or not bool(bias_E.isfinite().all()):
            raise SRDEError(
                f"router_bias of shape {list(bias_E.shape)}: it must hold {self.selection_bias.numel()} finite values, "
                "one for each expert; export the weights again."
            )
        self.selection_bias.copy_(bias_E)


def route(logits_TE: Tensor, bias_E: Tensor | None, top_k: int, layer: int, context: RoutingContext) -> Routing:
    """Choose each token's experts by logit plus bias, among the allowed, or as forced by the context.

    The weights are those of the logits without bias: a bias changes who is asked, not how an answer counts. A bias of
    zero may be left out, which is quicker.
    """
    if context.forced_experts is not None:
        index_TK = context.forced_experts.reshape(-1, 1)
        weights_TK = torch.ones_like(index_TK, dtype=logits_TE.dtype)
    else:
        if context.allowed_experts is not None:
            logits_TE = logits_TE.masked_fill(~context.allowed_experts.to(logits_TE.device), float("-inf"))
        if bias_E is None:
            chosen_TK, index_TK = logits_TE.topk(top_k, dim=1)
        else:
            index_TK = (logits_TE.detach() + bias_E).topk(top_k, dim=1).indices
            chosen_TK = logits_TE.gather(1, index_TK)
        # A locked expert among the top K has logit -inf, hence weight 0: K shrinks by itself.
        weights_TK = chosen_TK.softmax(dim=1)
    routing = Routing(index_TK, weights_TK, logits_TE, forced=context.forced_experts is not None)
    if context.record_choices:
        context.choices[layer] = index_TK.masked_fill(~routing.used_TK, -1)
    return routing


class RouterLosses(torch.autograd.Function):
    """Passes a layer's output through; its backward adds the auxiliary losses' gradient and records statistics.

    Per layer and real token t, with p the full softmax over the allowed experts, s the previous step's shares and q
    the shares that are aimed at:

        load balancing = E * sum_e (s_e - q_e) p_te        router z = logsumexp(logits_t)^2

    (E/2) sum_e (s_e - q_e)^2 is smallest at s = q. Its gradient with respect to s, taken to the router through p in
    place of the counts, which have no gradient, is the first loss: it lowers p where an expert had more than its
    target and vanishes at s = q. For equal q_e the constant drops out: E * sum_e s_e p_te, the usual loss.
    Unlike s_e / q_e, the difference is bounded where a target is zero.

    Both are sums over tokens with constant shares, so the cut of a batch into ranks and micro-batches does not
    change them. Work in the backward is done once, however often activation checkpointing repeats the forward.
    """

    @staticmethod
    def forward(
        ctx: Any,
        output: Tensor,
        logits_TE: Tensor,
        chosen_TE: Tensor,
        mask_T: Tensor,
        context: RoutingContext,
        layer: int,
    ) -> Tensor:
        ctx.save_for_backward(logits_TE, chosen_TE, mask_T)
        ctx.statistics, ctx.layer = context.statistics, layer
        trains_router = 0.0 if context.forced_experts is not None else context.loss_scale
        ctx.balancing = trains_router * context.load_balancing_weight
        ctx.z = trains_router * context.router_z_weight
        ctx.excess = None if context.expert_share is None else context.expert_share[layer].to(logits_TE)
        if ctx.excess is not None and context.target_share is not None:
            ctx.excess = ctx.excess - context.target_share.to(logits_TE)
        return output.view_as(output)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        logits_TE, chosen_TE, mask_T = ctx.saved_tensors
        ctx.statistics.add_routing(ctx.layer, logits_TE, chosen_TE, mask_T)
        experts = logits_TE.shape[1]
        p_TE = logits_TE.softmax(dim=1)
        grad_TE = ctx.z * 2 * logits_TE.logsumexp(1, keepdim=True) * p_TE
        if ctx.excess is not None:
            grad_TE += ctx.balancing * experts * p_TE * (ctx.excess - (p_TE @ ctx.excess)[:, None])
        return grad_output, grad_TE * mask_T[:, None], None, None, None, None
