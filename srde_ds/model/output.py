"""The result of a forward."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor
from transformers.utils.generic import ModelOutput


@dataclass
class SRDEOutput(ModelOutput):
    """The result of a forward of `SRDEModel`.

    Attributes:
        loss_sum, label_count: with labels, their weighted sum of cross entropy in nats (fp32 scalar) and their number
            (int64 scalar).
        logits, past_key_values: without labels, those of the base.
    """

    loss_sum: Tensor | None = None
    label_count: Tensor | None = None
    logits: Tensor | None = None
    past_key_values: Any = None
