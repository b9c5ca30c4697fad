"""Measuring a model in the middle of its training."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


@contextmanager
def evaluated(model: Any) -> Iterator[None]:
    """A context in which the model is in eval mode and computes no gradients.

    >>> linear = torch.nn.Linear(1, 1)
    >>> with evaluated(linear):
    ...     inside = linear.training
    >>> inside, linear.training
    (False, True)
    """
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(training)
