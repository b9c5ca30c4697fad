"""Routing in training: the losses of the router, and the counts of one optimizer step that balance the next."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from srde_ds.model.layer import SRDEFeedForward
from srde_ds.model.policy import LossWeights, RoutingPolicy
from srde_ds.model.statistics import RoutingStatistics
from srde_ds.peft.config import SRDEConfig


class TrainingSteps:
    """What the forwards of the active adapter's training share.

    The router's losses have no value that is added to the loss: the backward adds their gradients, as in SRDE's own
    training. So a trainer may make its loss of the logits in whatever way. They are those of the mean over the real
    tokens of a forward, divided by `micro_steps`; a trainer that averages gradients over processes averages them, too.
    Factors of the loss do not reach them. So they vanish beside a loss that is scaled for float16.

    Load balancing follows the shares of the previous optimizer step. That a step has passed is seen by the router's
    gradient, which is gone then; each process has the shares of its own tokens. Who calls `finish` after each step has
    those of all processes, and does not depend on what becomes of gradients.

    Attributes:
        micro_steps: backwards of an optimizer step: the number of gradient accumulation steps.
        expert_share: `[L, E]` each expert's share of the assignments in the previous step; None: there was none.
    """

    def __init__(self, layers: list[SRDEFeedForward], config: SRDEConfig, *, micro_steps: int = 1) -> None:
        self.micro_steps = micro_steps
        self.expert_share: Tensor | None = None
        self._router, self._config = layers[0].router, config
        self._statistics = RoutingStatistics(len(layers), config.num_experts)
        self._sees_steps = True

    def policy(self, arguments: dict[str, Any]) -> RoutingPolicy:
        """That of a forward in training.

        Args:
            arguments: of the base's forward, by name.
        """
        if self._sees_steps and self._router.weight.grad is None and not self._statistics.is_empty:
            self._take_shares(self._statistics.pop())
        inputs = arguments.get("input_ids")
        inputs = arguments.get("inputs_embeds") if inputs is None else inputs
        mask, tokens = arguments.get("attention_mask"), 1 if inputs is None else inputs.shape[0] * inputs.shape[1]
        if inputs is not None and isinstance(mask, Tensor) and mask.dim() == 2:
            mask = mask[:, -inputs.shape[1] :].bool()
            tokens = mask.sum().clamp(min=1)
        else:  # a mask of pairs of positions, or none: no padding
            mask = None
        return RoutingPolicy(
            token_mask=mask,
            loss_weights=LossWeights(
                load_balancing=self._config.load_balancing_weight, router_z=self._config.router_z_weight
            ),
            loss_scale=1 / (self.micro_steps * tokens),
            expert_share=self.expert_share,
            statistics=self._statistics,
        )

    def finish(self) -> dict[str, Tensor]:
        """End an optimizer step, on all processes or on none. From the first call on only this ends one.

        Returns:
            The step's routing statistics summed over processes, see `RoutingStatistics`.
        """
        # Contiguous, since a collective may take what lies between the values of a slice for its own.
        device = self._router.weight.device
        sums = {name: own.to(device).contiguous() for name, own in self._statistics.pop().items()}
        if dist.is_initialized():
            for own in sums.values():
                dist.all_reduce(own)
        self._sees_steps = False
        if bool(sums["tokens"].any()):
            self._take_shares(sums)
        return sums

    def _take_shares(self, sums: dict[str, Tensor]) -> None:
        assignments = sums["assignments"]
        share = assignments / assignments.sum(1, keepdim=True).clamp(min=1)
        self.expert_share = share.to(device=self._router.weight.device, dtype=torch.float32)
