"""Routing in training: the router's losses, and the counts of one optimizer step that balance the next."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from srde_ds.model.layer import SRDEFeedForward
from srde_ds.model.policy import AuxiliaryWeights, RoutingPolicy
from srde_ds.model.statistics import RoutingStatistics
from srde_ds.peft.config import SRDEConfig


class TrainingSteps:
    """State that the forwards in the training of one adapter share.

    The router's losses are not added to the loss. Instead the backward adds their gradients, as in SRDE's own training,
    so a trainer may compute its loss from the logits in any way. Each router loss is a mean over the real tokens of a
    forward, divided by `micro_steps`. A trainer that averages gradients over processes averages these gradients, too.
    Factors of the trainer's loss do not apply to them, so they vanish beside a loss that is scaled for float16.

    Load balancing uses the experts' shares in the previous optimizer step. By default a step counts as finished when
    the router's gradient is gone, and each process has the shares of its own tokens. If `finish` is called after each
    step, the shares are those of all processes, and the state of the gradients does not matter.

    Attributes:
        micro_steps: backwards per optimizer step, that is, gradient accumulation steps.
        expert_share: `[L, E]` each expert's share of the assignments in the previous step; None before the first.
    """

    def __init__(self, layers: list[SRDEFeedForward], config: SRDEConfig, *, micro_steps: int = 1) -> None:
        self.micro_steps = micro_steps
        self.expert_share: Tensor | None = None
        self._router, self._config = layers[0].router, config
        self._statistics = RoutingStatistics(len(layers), config.num_experts)
        self._sees_steps = True

    def policy(self, arguments: dict[str, Any]) -> RoutingPolicy:
        """The policy for a forward in training.

        Args:
            arguments: the arguments of the base's forward, by name.
        """
        if self._sees_steps and self._router.weight.grad is None and not self._statistics.is_empty:
            self._take_shares(self._statistics.pop())
        inputs = arguments.get("input_ids")
        inputs = arguments.get("inputs_embeds") if inputs is None else inputs
        mask, tokens = arguments.get("attention_mask"), 1 if inputs is None else inputs.shape[0] * inputs.shape[1]
        if inputs is not None and isinstance(mask, Tensor) and mask.dim() == 2:
            mask = mask[:, -inputs.shape[1] :].bool()
            tokens = mask.sum().clamp(min=1)
        else:  # no mask, or one over pairs of positions: no padding
            mask = None
        return RoutingPolicy(
            token_mask=mask,
            auxiliary_weights=AuxiliaryWeights(
                load_balancing=self._config.load_balancing_weight, router_z=self._config.router_z_weight
            ),
            loss_scale=1 / (self.micro_steps * tokens),
            expert_share=self.expert_share,
            statistics=self._statistics,
        )

    def finish(self) -> dict[str, Tensor]:
        """End an optimizer step. Call it on all processes or on none; after the first call, nothing else ends steps.

        Returns:
            The step's routing statistics summed over processes, see `RoutingStatistics`.
        """
        # Contiguous, since a collective may overwrite the memory between the values of a slice.
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
