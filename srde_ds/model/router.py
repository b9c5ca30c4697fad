"""Which experts a token uses, and the router's losses."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from srde_ds.errors import SRDEError
from srde_ds.model.deltas import Storage, tagged
from srde_ds.model.policy import RoutingPolicy
from srde_ds.model.seeding import seeded_generator
from srde_ds.model.statistics import Softmax, add_routing


@dataclass
class Routing:
    """One layer's routing.

    Attributes:
        index_TK: the chosen experts, best first.
        weights_TK: their weights p_e; 0 for a locked expert.
        logits_TE: the logits; -inf for a locked expert.
        has_locked: whether index_TK may hold locked experts.
    """

    index_TK: Tensor
    weights_TK: Tensor
    logits_TE: Tensor
    has_locked: bool

    @property
    def used_TK(self) -> Tensor | None:
        """bool: whether the chosen expert is unlocked; None: all are."""
        return used_experts(self.logits_TE.detach(), self.index_TK) if self.has_locked else None

    @property
    def choices_TK(self) -> Tensor:
        """index_TK with -1 for a locked expert."""
        used_TK = self.used_TK
        return self.index_TK if used_TK is None else self.index_TK.masked_fill(~used_TK, -1)

    @property
    def weights_TE(self) -> Tensor:
        """p_e; zero for experts that were not chosen."""
        return torch.zeros_like(self.logits_TE).scatter(1, self.index_TK, self.weights_TK)


def used_experts(logits_TE: Tensor, index_TK: Tensor) -> Tensor:
    """`[T, K]` bool: whether a chosen expert is unlocked."""
    return logits_TE.gather(1, index_TK) > float("-inf")


class Router(nn.Module):
    """A linear map without bias, computed in fp32. `route` turns its logits into choices and weights.

    The buffer `selection_bias` `[E]` fp32 is added to the logits only to choose the top K. It has no gradient;
    `training.balancing.update_biases` changes it.
    """

    selection_bias: Tensor

    def __init__(self, hidden: int, experts: int, top_k: int, *, seed: int, layer: int, storage: Storage) -> None:
        super().__init__()
        weight = torch.randn(experts, hidden, generator=seeded_generator(seed, "router", layer)) * 0.02
        self.weight = tagged(weight.to(dtype=storage.dtype, device=storage.device), "router", expert_axis=None)
        self.register_buffer("selection_bias", torch.zeros(experts, dtype=torch.float32, device=storage.device))
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


def route(
    logits_TE: Tensor, bias_E: Tensor | None, top_k: int, policy: RoutingPolicy, layer: Tensor | None = None
) -> Routing:
    """Choose each token's experts by logit plus bias among the allowed ones, unless the policy forces them.

    A token's weights are the softmax over the logits of its K experts, without bias: a bias changes which experts are
    chosen, not how much they count. A bias of zero may be left out, which is quicker.

    Args:
        layer: `[1]`, the layer's number. Then the backward of the weights adds the gradient of the policy's losses and
            records the policy's statistics, see `ExpertWeights`. None: it does neither.
    """
    allowed, forced = policy.allowed_experts, policy.forced_experts
    records = layer is not None and logits_TE.requires_grad
    if forced is not None:
        forced = forced.to(logits_TE.device)
        index_TK = forced.expand(-1, len(logits_TE) // len(forced)).reshape(-1, 1)
        weights_TK = torch.ones_like(index_TK, dtype=logits_TE.dtype)
    else:
        if allowed is not None:
            logits_TE = logits_TE.masked_fill(~allowed.to(logits_TE.device), float("-inf"))
        values_TE = logits_TE.detach() if records else logits_TE
        if bias_E is None:
            chosen_TK, index_TK = values_TE.topk(top_k, dim=1)
        else:
            index_TK = (values_TE.detach() + bias_E).topk(top_k, dim=1).indices
            chosen_TK = values_TE.gather(1, index_TK)
        # A locked expert among the top K has logit -inf and so weight 0, which makes K smaller.
        weights_TK = chosen_TK.softmax(dim=1)
    routing = Routing(index_TK, weights_TK, logits_TE, has_locked=forced is None and allowed is not None)
    if layer is not None and records:
        losses = router_losses(policy, layer, logits_TE)
        row = None if policy.statistics is None else (policy.statistics.sums(logits_TE.device), layer)
        recorded = (policy.real_tokens(logits_TE), losses, row, routing.has_locked)
        routing.weights_TK = ExpertWeights.apply(logits_TE, weights_TK, index_TK, *recorded)
    return routing


class RouterLosses(NamedTuple):
    """Factors of the gradient of a layer's losses, see `ExpertWeights`.

    Attributes:
        excess_E: s_e - q_e; None: no load balancing.
        balancing: E times the weight of load balancing.
        router_z: the weight of router z.
        scale: factor of both.
    """

    excess_E: Tensor | None
    balancing: float
    router_z: float
    scale: float | Tensor


def router_losses(policy: RoutingPolicy, layer: Tensor, logits_TE: Tensor) -> RouterLosses | None:
    """A policy's losses of a layer; None: it has none."""
    weights, share, excess_E = policy.auxiliary_weights, policy.expert_share, None
    if policy.forced_experts is not None:
        return None
    if share is not None and weights.load_balancing:
        excess_E = share.to(logits_TE.device).index_select(0, layer)[0].to(logits_TE)
        if policy.target_share is not None:
            excess_E = excess_E - policy.target_share.to(logits_TE)
    if excess_E is None and not weights.router_z:
        return None
    scale = policy.loss_scale
    scale = scale.to(logits_TE.device) if isinstance(scale, Tensor) else scale
    return RouterLosses(excess_E, logits_TE.shape[1] * weights.load_balancing, weights.router_z, scale)


class ExpertWeights(torch.autograd.Function):
    """The weights of a token's experts. Their backward adds the gradient of the router's losses and records statistics.

    For each layer and real token t, with the full softmax p over the allowed experts, the experts' shares s of the
    previous step's assignments and the target shares q:

        load balancing = E * sum_e (s_e - q_e) p_te        router z = logsumexp(logits_t)^2

    The reason for the first: (E/2) sum_e (s_e - q_e)^2 is smallest at s = q. Its gradient with respect to s is E (s_e -
    q_e). The shares are counts and have no gradient themselves, so p takes their place. The loss lowers p where an
    expert had more than its target, and vanishes at s = q. For equal q_e the constant drops out, which leaves the usual
    loss E * sum_e s_e p_te. Unlike a ratio s_e / q_e, the difference is bounded where a target is zero.

    Both are sums over tokens with constant shares, so they do not depend on how a batch is divided into ranks and
    micro-batches. The work is done in the backward, which runs once even if activation checkpointing repeats the
    forward. It also gives a router without effect on the output a gradient of zero.
    """

    @staticmethod
    def forward(
        ctx: Any,
        logits_TE: Tensor,
        weights_TK: Tensor,
        index_TK: Tensor,
        mask_T: Tensor,
        losses: RouterLosses | None,
        row: tuple[Tensor, Tensor] | None,
        has_locked: bool,
    ) -> Tensor:
        """The weights themselves, in a new view.

        Args:
            weights_TK: softmax of the chosen logits, or one for a forced expert; without gradient.
            mask_T: True for real tokens.
            row: where the statistics belong: their sums and the layer's number, see `statistics.add_routing`.
            has_locked: see `Routing`.
        """
        ctx.save_for_backward(logits_TE, weights_TK, index_TK, mask_T)
        ctx.losses, ctx.row, ctx.has_locked = losses, row, has_locked  # not as tensors: other layers change the sums
        return weights_TK.view_as(weights_TK)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, of_weights_TK: Tensor) -> tuple[Tensor | None, ...]:
        """The gradient of the logits."""
        logits_TE, weights_TK, index_TK, mask_T = ctx.saved_tensors
        losses: RouterLosses | None = ctx.losses
        of_logits_TE = None
        if losses is not None or ctx.row is not None:
            all_experts = Softmax.of(logits_TE, mask_T)
            if ctx.row is not None:
                sums, layer = ctx.row
                used_TK = used_experts(logits_TE, index_TK) if ctx.has_locked else None
                add_routing(sums, layer, all_experts, index_TK, used_TK, mask_T)
            if losses is not None:
                of_logits_TE = _gradient_of_losses(losses, all_experts)
        if of_logits_TE is None:
            of_logits_TE = torch.zeros_like(logits_TE)
        # Through the softmax; for one expert, forced or not, it is zero.
        of_chosen_TK = torch.ops.aten._softmax_backward_data(of_weights_TK, weights_TK, 1, weights_TK.dtype)
        return of_logits_TE.scatter_add_(1, index_TK, of_chosen_TK), *[None] * 6


def _gradient_of_losses(losses: RouterLosses, all_experts: Softmax) -> Tensor:
    """`[T, E]`: scale * p_te * (balancing * (excess_e - sum_f excess_f p_tf) + 2 * router_z * logsumexp_t)."""
    p_TE, normalizer_T = all_experts
    if losses.excess_E is None:
        factor_TE = normalizer_T[:, None] * (2 * losses.router_z)
    else:
        factor_T = normalizer_T.addmv(p_TE, losses.excess_E, beta=2 * losses.router_z, alpha=-losses.balancing)
        factor_TE = factor_T[:, None].add(losses.excess_E, alpha=losses.balancing)
    return p_TE * factor_TE * losses.scale
