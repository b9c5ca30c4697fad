"""One step's numbers, summed over ranks, and a check for experts that do not learn."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from srde_ds.distributed.processes import all_reduce_sum
from srde_ds.errors import SRDEError
from srde_ds.model.targets import on_device

# An expert may by chance get only a few tokens, all without loss, such as the ends of prompts. So the run is stopped
# only if the gradient is missing over this many assignments.
SILENT_ASSIGNMENTS = 10_000


class ExpertWatch:
    """Stops a run in which an expert gets tokens but no gradient."""

    def __init__(self, expert_names: list[str]) -> None:
        self.expert_names = expert_names
        self.silent = [0.0] * len(expert_names)

    def check(self, step: int, assignments: list[float], gradient_norms: list[float]) -> None:
        """Raise an SRDEError that names an expert whose gradient has stayed exactly zero."""
        for index, (count, norm) in enumerate(zip(assignments, gradient_norms, strict=True)):
            self.silent[index] = 0.0 if norm > 0 else self.silent[index] + count
            if self.silent[index] >= SILENT_ASSIGNMENTS:
                raise SRDEError(
                    f"step {step}: expert '{self.expert_names[index]}' got {self.silent[index]:.0f} token assignments "
                    "but its gradient is zero: its delta is cut off from the loss."
                )


def sum_over_ranks(tensors: dict[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    """The sums of several tensors over all ranks, in one collective, as float64 on the device."""
    flat = torch.cat([on_device(tensor.detach(), device).double().flatten() for tensor in tensors.values()])
    return _split_like(all_reduce_sum(flat), tensors)


def to_host(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Copy float64 tensors to the CPU, waiting for the device only once."""
    return _split_like(torch.cat([tensor.flatten() for tensor in tensors.values()]).cpu(), tensors)


def _split_like(flat: Tensor, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    parts = flat.split([tensor.numel() for tensor in tensors.values()])
    return {name: part.view(tensor.shape) for (name, tensor), part in zip(tensors.items(), parts, strict=True)}


def expert_metrics(sums: dict[str, Tensor]) -> dict[str, Any]:
    """Per-expert and router numbers of a step from the routing statistics of all ranks and layers.

    `tokens_per_expert` is the number of tokens routed to each expert, averaged over layers. `expert_gradient_norm` is
    the norm of the loss's gradient with respect to an expert's deltas in all layers: the root of the squares' sum over
    micro-batches. `router_entropy` is in nats, averaged over tokens and layers.
    """
    assignments, layers = sums["assignments"], sums["assignments"].shape[0]
    tokens = sums["tokens"].sum()
    probability = sums["probability_sum"] / (sums["tokens"].unsqueeze(1).clamp(min=1))
    share = assignments / assignments.sum(dim=1, keepdim=True).clamp(min=1)
    experts = assignments.shape[1]
    return {
        "tokens_per_expert": (assignments.sum(0) / layers).tolist(),
        "expert_gradient_norm": sums["delta_gradient_square"].sum(0).sqrt().tolist(),
        "router_entropy": float(sums["entropy_sum"].sum() / tokens),
        "load_balancing_loss": float(experts * (share * probability).sum(dim=1).mean()),
        "router_z_loss": float(sums["z_sum"].sum() / tokens),
    }
