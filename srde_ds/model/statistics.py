"""Statistics of the routing that forwards record."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class RoutingStatistics:
    """Float64 sums over the real tokens of all forwards that it was passed to, on the devices of the layers.

    assignments `[L, E]`: tokens that chose an expert; probability_sum `[L, E]`: full softmax probabilities;
    entropy_sum, z_sum, tokens `[L]`: entropy (nats) and squared logsumexp of the router's logits;
    delta_gradient_square `[L, E]`: squared norm of the gradient of an expert's effective delta, summed over
    micro-batches.

    All are columns of one tensor for each device, to which the layers there add with tensor operations only, so
    torch.compile can include them, and since a layer's number is a tensor as well, it need not compile again for each
    layer.
    """

    def __init__(self, num_layers: int, num_experts: int) -> None:
        self.num_layers, self.num_experts = num_layers, num_experts
        self._sums: dict[torch.device, Tensor] = {}
        self._empty_versions: dict[torch.device, int] = {}  # torch counts the changes of a tensor

    @property
    def is_empty(self) -> bool:
        """Whether nothing has been added since the last `pop`."""
        return all(own._version == self._empty_versions.get(device, 0) for device, own in self._sums.items())

    def sums(self, device: torch.device) -> Tensor:
        """`[L, 4 * E + 2]`: assignments, probability_sum, entropy_sum with a term for each expert, z_sum, tokens,
        delta_gradient_square."""
        if device not in self._sums:
            self._sums[device] = self._zeros(device)
        return self._sums[device]

    def pop(self) -> dict[str, Tensor]:
        """Return all sums, on the newest device, and reset them to zero."""
        sums: Tensor | None = None
        for device, own in reversed(self._sums.items()):  # a model that was moved is on the last one
            sums = own.clone() if sums is None else sums + own.to(sums.device)
            own.zero_()  # in place, since a later backward may still add to it
            self._empty_versions[device] = own._version
        if sums is None:
            sums = self._zeros()
        experts = self.num_experts
        parts = sums.split([experts, experts, experts, 1, 1, experts], dim=1)
        return {
            "assignments": parts[0],
            "probability_sum": parts[1],
            "entropy_sum": parts[2].sum(1),
            "z_sum": parts[3].squeeze(1),
            "tokens": parts[4].squeeze(1),
            "delta_gradient_square": parts[5],
        }

    def _zeros(self, device: torch.device | None = None) -> Tensor:
        return torch.zeros(self.num_layers, 4 * self.num_experts + 2, dtype=torch.float64, device=device)


class Softmax(NamedTuple):
    """Full softmax probabilities of real tokens: p `[T, E]`, zero for padding, and the logarithm of their divisor."""

    p_TE: Tensor
    normalizer_T: Tensor

    @classmethod
    def of(cls, logits_TE: Tensor, mask_T: Tensor) -> Softmax:
        """Of the logits of all tokens; the mask is True for real ones."""
        return cls(logits_TE.softmax(dim=1) * mask_T[:, None], logits_TE.logsumexp(1))


def add_routing(
    sums: Tensor, layer: Tensor, all_experts: Softmax, index_TK: Tensor, used_TK: Tensor | None, mask_T: Tensor
) -> None:
    """Add one forward's routing to `RoutingStatistics.sums`.

    Args:
        layer: `[1]` int64, the layer's number.
        index_TK: chosen experts.
        used_TK: False for a chosen expert that is locked; None: none is.
        mask_T: True for real tokens.
    """
    p_TE, normalizer_T = all_experts
    counted_TK = mask_T[:, None].expand_as(index_TK) if used_TK is None else used_TK & mask_T[:, None]
    assigned_TE = torch.zeros_like(p_TE, dtype=torch.bool).scatter_(1, index_TK, counted_TK)
    z_T = normalizer_T.square() * mask_T
    # All columns in one sum; that of p log p is zero where p is.
    columns = [assigned_TE, p_TE, torch.special.entr(p_TE), z_T[:, None], mask_T[:, None]]
    row = torch.cat(columns, dim=1).sum(0, keepdim=True, dtype=sums.dtype)
    sums[:, : row.shape[1]].index_add_(0, layer, row)


def add_delta_gradient(sums: Tensor, layer: Tensor, squares: Tensor, first_expert: int) -> None:
    """Add the squared gradient norms, `[E]` from `first_expert` on, of a layer's effective deltas."""
    experts = (sums.shape[1] - 2) // 4
    first = 3 * experts + 2 + first_expert
    own = sums[:, first : first + len(squares)]  # slots after the last expert are padding
    own.index_add_(0, layer, squares[None, : own.shape[1]].to(sums.dtype))
