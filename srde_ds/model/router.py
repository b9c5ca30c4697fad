"""Which experts a token uses, and the router's losses."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from srde_ds.errors import SRDEError
from srde_ds.model.deltas import tagged
from srde_ds.model.policy import RoutingPolicy
from srde_ds.model.seeding import seeded_generator
from srde_ds.model.statistics import add_routing


@dataclass
class Routing:
    """One layer's routing.

    Attributes:
        index_TK: the chosen experts, best first.
        weights_TK: their weights p_e; 0 for a locked expert.
        logits_TE: the logits; -inf for a locked expert.
        forced: whether index_TK does not come from the logits; it then holds no locked expert.
    """

    index_TK: Tensor
    weights_TK: Tensor
    logits_TE: Tensor
    forced: bool

    @property
    def used_TK(self) -> Tensor:
        """bool: whether the chosen expert is unlocked."""
        if self.forced:
            return torch.ones_like(self.index_TK, dtype=torch.bool)
        return self.logits_TE.detach().gather(1, self.index_TK) > float("-inf")

    @property
    def choices_TK(self) -> Tensor:
        """index_TK with -1 for a locked expert."""
        return self.index_TK.masked_fill(~self.used_TK, -1)

    @property
    def weights_TE(self) -> Tensor:
        """p_e; zero for experts that were not chosen."""
        return torch.zeros_like(self.logits_TE).scatter(1, self.index_TK, self.weights_TK)


class Router(nn.Module):
    """A linear map without bias, computed in fp32. `route` turns its logits into choices and weights.

    The buffer `selection_bias` `[E]` fp32 is added to the logits only to choose the top K. It has no gradient;
    `training.balancing.update_biases` changes it.
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
        """The logits `[T, E]`, as a bare tensor, since ZeRO-3 attaches its backward hooks to nothing else."""
        if torch.is_autocast_enabled(x_TD.device.type):  # the context would cost more than the product
            with torch.autocast(x_TD.device.type, enabled=False):
                return self._logits(x_TD)
        return self._logits(x_TD)

    def _logits(self, x_TD: Tensor) -> Tensor:
        precision = torch.promote_types(x_TD.dtype, torch.float32)
        return F.linear(x_TD.to(precision), self.weight.to(precision))

    def load_selection_bias(self, bias_E: Tensor | None) -> None:
        """Set the bias to stored values, or with None to zero.

        Raises:
            SRDEError: the values are for another number of experts, or not finite.
        """
        if bias_E is None:
            self.selection_bias.zero_()
            return
        if bias_E.shape != self.selection_bias.shape or not bool(bias_E.isfinite().all()):
            raise SRDEError(
                f"router_bias of shape {list(bias_E.shape)}: it must have {self.selection_bias.numel()} finite values, "
                "one for each expert; export the weights again."
            )
        self.selection_bias.copy_(bias_E)


def route(logits_TE: Tensor, bias_E: Tensor | None, top_k: int, policy: RoutingPolicy) -> Routing:
    """Choose each token's experts by logit plus bias among the allowed ones, unless the policy forces them.

    A token's weights are the softmax over the logits of its K experts, without bias: a bias changes which experts are
    chosen, not how much they count. A bias of zero may be left out, which is quicker.
    """
    if policy.forced_experts is not None:
        forced = policy.forced_experts
        index_TK = forced.expand(-1, len(logits_TE) // len(forced)).reshape(-1, 1)
        weights_TK = torch.ones_like(index_TK, dtype=logits_TE.dtype)
    else:
        if policy.allowed_experts is not None:
            logits_TE = logits_TE.masked_fill(~policy.allowed_experts.to(logits_TE.device), float("-inf"))
        if bias_E is None:
            chosen_TK, index_TK = logits_TE.topk(top_k, dim=1)
        else:
            index_TK = (logits_TE.detach() + bias_E).topk(top_k, dim=1).indices
            chosen_TK = logits_TE.gather(1, index_TK)
        # A locked expert among the top K has logit -inf and so weight 0, which makes K smaller.
        weights_TK = chosen_TK.softmax(dim=1)
    return Routing(index_TK, weights_TK, logits_TE, forced=policy.forced_experts is not None)


class RouterLosses(torch.autograd.Function):
    """Passes a layer's output through. Its backward adds the gradient of the router's losses and records statistics.

    For each layer and real token t, with the full softmax p over the allowed experts, the experts' shares s of the
    previous step's assignments and the target shares q:

        load balancing = E * sum_e (s_e - q_e) p_te        router z = logsumexp(logits_t)^2

    The reason for the first: (E/2) sum_e (s_e - q_e)^2 is smallest at s = q. Its gradient with respect to s is E (s_e -
    q_e). The shares are counts and have no gradient themselves, so p takes their place. The loss lowers p where an
    expert had more than its target, and vanishes at s = q. For equal q_e the constant drops out, which leaves the usual
    loss E * sum_e s_e p_te. Unlike a ratio s_e / q_e, the difference is bounded where a target is zero.

    Both are sums over tokens with constant shares, so they do not depend on how a batch is divided into ranks and
    micro-batches. The work is done in the backward, which runs once even if activation checkpointing repeats the
    forward.
    """

    @staticmethod
    def forward(
        ctx: Any,
        output: Tensor,
        logits_TE: Tensor,
        choices_TK: Tensor,
        mask_T: Tensor,
        terms: tuple[Tensor | None, float | Tensor],
        sums: Tensor | None,
        layer: Tensor,
    ) -> Tensor:
        """The output itself, in a new view.

        Args:
            mask_T: True for real tokens.
            terms: the result of `router_loss_terms`.
            sums: sums of the statistics, see `statistics.add_routing`.
            layer: `[1]`, the layer's number.
        """
        ctx.save_for_backward(logits_TE, choices_TK, mask_T, layer)
        ctx.terms, ctx.sums = terms, sums  # not saved as tensors, since other layers change the sums
        return output.view_as(output)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        """The output's gradient, unchanged, and the losses' gradient of the logits."""
        logits_TE, choices_TK, mask_T, layer = ctx.saved_tensors
        excess_E, z = ctx.terms
        if ctx.sums is not None:
            add_routing(ctx.sums, layer, logits_TE, choices_TK, mask_T)
        p_TE = logits_TE.softmax(dim=1)
        factor_TE = z * 2 * logits_TE.logsumexp(1, keepdim=True)
        if excess_E is not None:
            factor_TE = factor_TE + excess_E - (p_TE @ excess_E)[:, None]
        return grad_output, factor_TE * p_TE * mask_T[:, None], None, None, None, None, None


def router_loss_terms(policy: RoutingPolicy, layer: Tensor, logits_TE: Tensor) -> tuple[Tensor | None, float | Tensor]:
    """A policy's terms for `RouterLosses`: `[E]`, the weight of load balancing times E (s_e - q_e); the weight of z."""
    if policy.forced_experts is not None:
        return None, 0.0
    weights, excess_E = policy.loss_weights, None
    if policy.expert_share is not None:
        excess_E = policy.expert_share.index_select(0, layer)[0].to(logits_TE)
        if policy.target_share is not None:
            excess_E = excess_E - policy.target_share.to(logits_TE)
        excess_E = policy.loss_scale * weights.load_balancing * logits_TE.shape[1] * excess_E
    return excess_E, policy.loss_scale * weights.router_z
