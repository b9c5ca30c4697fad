"""Statistics of the routing that forwards record."""

from __future__ import annotations

import torch
from torch import Tensor


class RoutingStatistics:
    """Float64 sums over the real tokens of all forwards that it was passed to, on the device of the layers.

    assignments `[L, E]`: tokens that chose an expert; probability_sum `[L, E]`: full softmax probabilities;
    entropy_sum, z_sum, tokens `[L]`: entropy (nats) and squared logsumexp of the router's logits;
    delta_gradient_square `[L, E]`: squared norm of the gradient of an expert's effective delta, summed over
    micro-batches.

    All are columns of one tensor. A layer adds to it with tensor operations only, so torch.compile can include them,
    and since a layer's number is a tensor as well, it need not compile again for each layer.
    """

    def __init__(self, num_layers: int, num_experts: int) -> None:
        self.num_layers, self.num_experts = num_layers, num_experts
        self._sums: Tensor | None = None
        self._empty_version = 0  # torch counts the changes of a tensor

    @property
    def is_empty(self) -> bool:
        """Whether nothing has been added since the last `pop`."""
        return self._sums is None or self._sums._version == self._empty_version

    def sums(self, device: torch.device) -> Tensor:
        """`[L, 3 * E + 3]`: assignments, probability_sum, entropy_sum, z_sum, tokens, delta_gradient_square."""
        if self._sums is None:
            self._sums = torch.zeros(self.num_layers, 3 * self.num_experts + 3, dtype=torch.float64, device=device)
        return self._sums

    def pop(self) -> dict[str, Tensor]:
        """Return all sums, and reset them to zero."""
        sums = torch.zeros(self.num_layers, 3 * self.num_experts + 3, dtype=torch.float64)
        if self._sums is not None:
            sums = self._sums.clone()
            self._sums.zero_()  # in place, since a later backward may still add to it
            self._empty_version = self._sums._version
        experts = self.num_experts
        parts = sums.split([experts, experts, 1, 1, 1, experts], dim=1)
        names = ("assignments", "probability_sum", "entropy_sum", "z_sum", "tokens", "delta_gradient_square")
        return {
            name: part.squeeze(1) if name in ("entropy_sum", "z_sum", "tokens") else part
            for name, part in zip(names, parts, strict=True)
        }


def add_routing(sums: Tensor, layer: Tensor, logits_TE: Tensor, choices_TK: Tensor, mask_T: Tensor) -> None:
    """Add one forward's routing to `RoutingStatistics.sums`.

    Args:
        layer: `[1]` int64, the layer's number.
        choices_TK: chosen experts, -1 for a locked one.
        mask_T: True for real tokens.
    """
    probabilities_TE, experts = logits_TE.softmax(dim=1), logits_TE.shape[1]
    entropy_T = torch.special.entr(probabilities_TE).sum(1)
    mask = mask_T.to(logits_TE.dtype)
    by_expert = mask @ probabilities_TE
    scalars = torch.stack([entropy_T, logits_TE.logsumexp(1).square(), torch.ones_like(mask)]) @ mask
    counted_TK = mask_T[:, None].expand_as(choices_TK).to(sums.dtype)
    slots_TK = choices_TK.remainder(experts + 1)  # locked ones are counted in an extra column
    assignments = sums.new_zeros(experts + 1).index_add_(0, slots_TK.flatten(), counted_TK.flatten())
    row = torch.cat([assignments[:experts], by_expert.to(sums.dtype), scalars.to(sums.dtype)])
    sums[:, : 2 * experts + 3].index_add_(0, layer, row[None])


def add_delta_gradient(sums: Tensor, layer: Tensor, squares: Tensor, first_expert: int) -> None:
    """Add the squared gradient norms, `[E]` from `first_expert` on, of a layer's effective deltas."""
    experts = (sums.shape[1] - 3) // 3
    first = 2 * experts + 3 + first_expert
    own = sums[:, first : first + len(squares)]  # slots after the last expert are padding
    own.index_add_(0, layer, squares[None, : own.shape[1]].to(sums.dtype))
