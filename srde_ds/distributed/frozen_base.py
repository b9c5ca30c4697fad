"""Forward and backward of the frozen base alone, without experts and without effect on DeepSpeed's training."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from srde_ds.distributed import deepspeed_internals as internals
from srde_ds.distributed.engine import Engine
from srde_ds.model.base import is_checkpointing
from srde_ds.model.recompute import recomputes_selectively


@contextmanager
def base_alone(engine: Engine) -> Iterator[None]:
    """A context for `forward_base` and `backward_base`. Afterwards the engine is as before.

    The base stays in train mode only if its activations are recomputed in the backward, which requires that mode.
    """
    training = engine.deepspeed.training
    base = engine.model.base
    engine.deepspeed.train(is_checkpointing(base) or recomputes_selectively(base))
    embedding = engine.model.base.get_input_embeddings()
    # With a gradient from here on, the backward reaches every block, although no parameter of the base has one.
    hook = embedding.register_forward_hook(_with_gradient)
    try:
        with engine.model.no_experts():
            yield
    finally:
        hook.remove()
        engine.deepspeed.train(training)


def forward_base(engine: Engine, batch: dict[str, Tensor]) -> Tensor:
    """The loss of a CPU batch from the loader, summed over its labels.

    It calls the model instead of DeepSpeed's engine, whose hooks on the loss would count the backward as a micro-step.
    The hooks on the modules, which gather the weights, still run.
    """
    loss: Tensor = engine.model(**engine.inputs(batch)).loss_sum
    return loss


def backward_base(engine: Engine, loss: Tensor) -> None:
    """Backward of a loss from `forward_base`. No trainable takes part, so no gradient is kept or reduced."""
    loss.backward()
    internals.release_gathered(engine.deepspeed)


def _with_gradient(module: torch.nn.Module, inputs: object, output: Tensor) -> Tensor:
    return output.requires_grad_(True) if torch.is_grad_enabled() else output
