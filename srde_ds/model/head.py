"""Computes the loss without keeping all logits, which for long rows take more memory than the layers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast

from srde_ds.data.packing import NO_LABEL
from srde_ds.model.targets import Targets

# Bytes of logits at a time. With smaller chunks, reading the weight would take longer than the arithmetic.
CHUNK_BYTES = 2**30


def linear_cross_entropy(
    x_ND: Tensor,
    weight_VD: Tensor,
    bias_V: Tensor | None,
    tokens_N: Tensor,
    weights_N: Tensor | None = None,
    *,
    chunk_bytes: int = CHUNK_BYTES,
) -> Tensor:
    """Cross entropy of x W^T + b in nats, summed over the tokens that are not NO_LABEL; a scalar, at least float32.

    W and b are frozen. No more than `chunk_bytes` of logits exist at a time, and none are kept.

    Args:
        weights_N: how much each token counts in the sum; None: 1.
    """
    loss: Tensor = LinearCrossEntropy.apply(x_ND, weight_VD, bias_V, tokens_N, weights_N, chunk_bytes)
    return loss


def chunk_rows(vocabulary: int, width: int, chunk_bytes: int = CHUNK_BYTES) -> int:
    """Number of positions whose logits fit into `chunk_bytes`; `width`: bytes per value of the model."""
    return max(1, chunk_bytes // (vocabulary * (max(width, 4) + (width if width < 4 else 0))))


class LinearCrossEntropy(torch.autograd.Function):
    """See `linear_cross_entropy`. The gradient of x is made in the forward, where the logits exist."""

    @staticmethod
    def forward(
        ctx: Any,
        x_ND: Tensor,
        weight_VD: Tensor,
        bias_V: Tensor | None,
        tokens_N: Tensor,
        weights_N: Tensor | None,
        chunk_bytes: int,
    ) -> Tensor:
        """The sum of the losses."""
        precision = torch.promote_types(x_ND.dtype, torch.float32)
        rows = chunk_rows(len(weight_VD), x_ND.element_size(), chunk_bytes)
        gradient_ND = torch.empty_like(x_ND) if ctx.needs_input_grad[0] else None
        losses = []
        for first in range(0, len(x_ND), rows):
            part = slice(first, first + rows)
            ignored_n1 = (tokens_N[part] == NO_LABEL)[:, None]
            token_n1 = tokens_N[part].clamp(min=0)[:, None]
            values_nV = F.linear(x_ND[part], weight_VD, bias_V).to(precision)
            target_n1 = values_nV.gather(1, token_n1)
            largest_n1 = values_nV.amax(1, keepdim=True)
            sum_n1 = values_nV.sub_(largest_n1).exp_().sum(1, keepdim=True)
            loss_n1 = (sum_n1.log() + largest_n1 - target_n1).masked_fill(ignored_n1, 0)
            counts_n1 = None if weights_N is None else weights_N[part].to(precision)[:, None]
            losses.append((loss_n1 if counts_n1 is None else loss_n1 * counts_n1).sum())
            if gradient_ND is not None:  # softmax - onehot
                values_nV.div_(sum_n1).scatter_add_(1, token_n1, torch.full_like(target_n1, -1)).masked_fill_(
                    ignored_n1, 0
                )
                if counts_n1 is not None:
                    values_nV.mul_(counts_n1)
                gradient_ND[part] = values_nV.to(weight_VD.dtype) @ weight_VD
        ctx.save_for_backward(gradient_ND)
        return torch.stack(losses).sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        """The gradient of x."""
        (gradient_ND,) = ctx.saved_tensors
        return gradient_ND * gradient, None, None, None, None, None


class _Anything(BaseModelOutputWithPast):
    """A made-up output of a decoder: hidden states, and None for anything else that a base may ask for."""

    def __getattr__(self, name: str) -> Any:
        return None


def has_plain_head(base: PreTrainedModel) -> bool:
    """Whether the base's logits come from its decoder's output by a linear module alone, neither capped nor scaled.

    This is tried out with made-up hidden states and logits, which must pass unchanged. Reads no weights.
    """
    head, decoder = base.get_output_embeddings(), base.base_model
    if type(head) is not nn.Linear or decoder is base:
        return False
    generator = torch.Generator().manual_seed(0)
    hidden, logits = (torch.randn(1, 4, width, generator=generator) * 100 for width in (head.in_features, 8))
    seen: list[Tensor] = []

    def made_up(x: Tensor) -> Tensor:
        seen.append(x)
        return logits.clone()

    with _replaced(head, made_up), _replaced(decoder, lambda *_, **__: _Anything(last_hidden_state=hidden.clone())):
        found = base(input_ids=torch.zeros(1, 4, dtype=torch.int64), use_cache=False, return_dict=True).logits
    return len(seen) == 1 and torch.equal(seen[0], hidden) and torch.equal(found, logits)


def loss_of_logits(base: PreTrainedModel, inputs: dict[str, Any], targets: Targets) -> Tensor:
    """The cross entropy in nats, summed over the targets; the readable way.

    Args:
        inputs: inputs of the base's forward.
    """
    logits = base(**inputs, logits_to_keep=targets.columns).logits.flatten(0, 1).float()
    tokens = targets.tokens.flatten()
    if targets.weights is None:
        return F.cross_entropy(logits, tokens, ignore_index=NO_LABEL, reduction="sum")
    losses = F.cross_entropy(logits, tokens, ignore_index=NO_LABEL, reduction="none")
    return (losses * targets.weights.flatten()).sum()


def loss_without_logits(base: PreTrainedModel, inputs: dict[str, Any], targets: Targets) -> Tensor:
    """The same for a base with `has_plain_head` whose head is frozen.

    It is computed within the head's own call, so that hooks which gather the head's weight work.
    """
    head = base.get_output_embeddings()
    if any(parameter.requires_grad for parameter in head.parameters()):
        return loss_of_logits(base, inputs, targets)

    tokens, weights = targets.tokens.flatten(), None if targets.weights is None else targets.weights.flatten()

    def loss(x_BND: Tensor) -> Tensor:
        found = linear_cross_entropy(x_BND.flatten(0, 1), head.weight, head.bias, tokens, weights)
        return found.view(1, 1, 1)  # passes through the base in place of logits

    with _replaced(head, loss):
        return base(**inputs, logits_to_keep=targets.columns).logits.squeeze()


def token_losses(base: PreTrainedModel, forward: Callable[[], Tensor], tokens_BN: Tensor, *, plain: bool) -> Tensor:
    """`[B, N]` float32: each token's cross entropy in nats, 0 for NO_LABEL. Computes no gradients.

    No more than CHUNK_BYTES of logits exist at a time, beside those of a base whose head is not plain.

    Args:
        forward: runs the base on the positions that predict the tokens, and returns its logits.
        plain: whether the base has a plain head, see `has_plain_head`.
    """
    head = base.get_output_embeddings()

    def losses(x_BND: Tensor, logits_of: Callable[[Tensor], Tensor]) -> Tensor:
        x_ND, tokens_N = x_BND.flatten(0, 1), tokens_BN.flatten()
        found_N = torch.zeros(len(tokens_N), device=x_ND.device)
        labelled = (tokens_N != NO_LABEL).nonzero().squeeze(1)
        for part in labelled.split(chunk_rows(len(head.weight), x_ND.element_size(), CHUNK_BYTES)):
            logits_nV = logits_of(x_ND[part]).float()
            found_N[part] = F.cross_entropy(logits_nV, tokens_N[part], reduction="none")
        return found_N.view_as(tokens_BN)

    if not plain:
        return losses(forward(), lambda logits: logits)
    with _replaced(head, lambda x: losses(x, lambda part: F.linear(part, head.weight, head.bias))[..., None]):
        return forward().squeeze(-1)


@contextmanager
def _replaced(module: Any, forward: Callable[..., Any]) -> Iterator[None]:
    before = vars(module).get("forward")
    module.forward = forward
    try:
        yield
    finally:
        if before is None:
            del module.forward
        else:
            module.forward = before
