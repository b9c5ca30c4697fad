"""Decoder layers that recompute their activations in the backward, except attention's results."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts
from transformers import PreTrainedModel

from srde_ds.model.base import decoder_layers, has_dropout
from srde_ds.model.policy import PolicyControl

# Attention's result has one value per input value, but recomputing it takes time with a document's squared length.
_KEPT = ("scaled_dot_product", "varlen_attn", "flash_attn")


class RecomputedForward:
    """A decoder layer's `forward` in training, which keeps only its input and attention's results.

    It runs inside of the layer's hooks: ZeRO-3 has gathered the layer's weights when its backward begins, and the
    second forward needs no others. The second forward follows the policy of the first.
    """

    def __init__(self, layer: nn.Module, control: PolicyControl) -> None:
        self.layer, self.control, self.forward = layer, control, layer.forward
        self.preserve_rng_state = has_dropout(layer)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The layer's output."""
        if not (self.layer.training and torch.is_grad_enabled()):
            return self.forward(*args, **kwargs)
        return checkpoint(
            self.control.bound(self.forward),
            *args,
            use_reentrant=False,
            preserve_rng_state=self.preserve_rng_state,
            context_fn=partial(create_selective_checkpoint_contexts, _policy),
            **kwargs,
        )


def recompute_selectively(base: PreTrainedModel, control: PolicyControl) -> None:
    """Have each decoder layer of a base run as a `RecomputedForward`."""
    for layer in decoder_layers(base):
        vars(layer)["forward"] = RecomputedForward(layer, control)


def recomputes_selectively(base: PreTrainedModel) -> bool:
    """Whether `recompute_selectively` has been called for this base."""
    return any(isinstance(vars(layer).get("forward"), RecomputedForward) for layer in decoder_layers(base))


def _policy(context: Any, function: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    name = getattr(function, "__name__", str(function))
    kept = any(part in name for part in _KEPT) and "backward" not in name
    return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE
