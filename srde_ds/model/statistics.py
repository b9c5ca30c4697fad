"""What forwards record about their routing."""

from __future__ import annotations

import torch
from torch import Tensor


class RoutingStatistics:
    """Sums over the real tokens of the forwards that it was handed to, float64, on the device of the layers.

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

    @property
    def is_empty(self) -> bool:
        """Nothing was added since the last `pop`."""
        return not self._sums

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
        """All sums, which start again at zero."""
        sums, self._sums = self._sums, {}
        return {name: sums.get(name, torch.zeros(shape, dtype=torch.float64)) for name, shape in self._shapes.items()}
