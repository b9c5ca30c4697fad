"""What balancing the experts' load needs once per optimizer step: a target, selection biases, loss weights."""

from __future__ import annotations

import torch
from torch import Tensor

from srde_ds.config import LossConfig
from srde_ds.model.adapter import SRDEModel
from srde_ds.model.policy import AuxiliaryWeights


def domain_target(domain_tokens: Tensor, num_experts: int, top_k: int, allowed: Tensor | None = None) -> Tensor:
    """`[E]` fp32: the share of the assignments that each expert should get, given the domains of a step's tokens.

    Domain d belongs to expert d. An expert without a domain counts for 1 / E, and the domains share the rest in
    proportion to their tokens; tokens of a domain without an expert are left out. Locked experts get zero, and the
    others are scaled up. A token uses an expert at most once, so no share can exceed 1 / K; the excess goes to the
    others in proportion.

    Args:
        domain_tokens: number of real tokens of each domain in the step, summed over ranks.
        top_k: K, the number of experts that a token uses.
        allowed: `[E]` bool, False for locked experts.
    """
    domains = min(num_experts, len(domain_tokens))
    share = torch.full((num_experts,), 1 / num_experts, dtype=torch.float64)
    tokens = domain_tokens[:domains].double().cpu()
    if float(tokens.sum()):
        share[:domains] = tokens / tokens.sum() * domains / num_experts
    unlocked = torch.ones(num_experts, dtype=torch.bool) if allowed is None else allowed.cpu()
    return _capped(share, unlocked, 1 / min(top_k, int(unlocked.sum()))).float()


def _capped(share: Tensor, unlocked: Tensor, cap: float) -> Tensor:
    """Shares that add up to 1: zero for locked experts, at most `cap`, and below it in proportion to `share`."""
    result = torch.zeros_like(share)
    free, rest = unlocked.clone(), 1.0
    while bool(free.any()):
        part = torch.where(free, share, 0)
        # What the others cannot take is shared equally by experts whose domains had no tokens.
        part = part / part.sum() if float(part.sum()) else free / free.sum()
        result = torch.where(free, rest * part, result)
        full = free & (result > cap * (1 + 1e-9))
        if not bool(full.any()):
            break
        result[full] = cap
        free &= ~full
        rest = 1 - float(result[~free].sum())
    return result


def update_biases(
    model: SRDEModel, assignments: Tensor, rate: float, *, allowed: Tensor | None = None, target: Tensor | None = None
) -> None:
    """Balance without a loss (arXiv 2408.15664): raise the selection bias of experts below their target by `rate`,
    and lower it for experts above it.

    Call it once after an optimizer step whose tokens were routed, on every rank with the same counts.

    Args:
        assignments: `[L, E]` counts of the step, summed over ranks.
        rate: how much a bias changes in one step, in units of the router's logits.
        allowed: `[E]` bool; the biases of locked experts do not change.
        target: `[E]` shares, see `domain_target`; None: equal shares for the unlocked experts.
    """
    unlocked = torch.ones(assignments.shape[1], dtype=torch.bool) if allowed is None else allowed.cpu()
    target = unlocked / unlocked.sum() if target is None else target.cpu()
    for layer, counts in zip(model.layers, assignments.double().cpu(), strict=True):
        missing = target.double() * counts.sum() - counts
        missing[~unlocked | (missing.abs() < 0.5)] = 0  # within one assignment counts as on target
        layer.router.selection_bias += rate * missing.sign().to(layer.router.selection_bias)


def auxiliary_weights(losses: LossConfig, micro_steps: int) -> AuxiliaryWeights:
    """Weights of the auxiliary losses in each backward of an optimizer step.

    DeepSpeed averages gradients over micro-steps by scaling the loss. Gradients that arise within the backward escape
    this scaling and add up, so the weights are divided by the number of micro-steps.
    """
    return AuxiliaryWeights(
        load_balancing=losses.load_balancing_weight,
        router_z=losses.router_z_weight,
        delta_size=losses.delta_size_weight / micro_steps,
        support_overlap=losses.support_overlap_weight / micro_steps,
    )
