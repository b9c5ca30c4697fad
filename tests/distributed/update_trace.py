"""Gradients, clipped gradients and weights of chosen steps, put together from all ranks and compared."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from tests.distributed.training_helpers import metrics, train_here

Piece = tuple[str, tuple[int, ...], int, int, Tensor]
"""name, shape of the whole tensor, offset, stride, values: as in tensor_slice.TensorSlice"""
Trace = dict[tuple[int, str], list[Piece]]
"""(step, "gradient" | "clipped" | "weights") -> this rank's pieces"""
Whole = dict[tuple[int, str], dict[str, Tensor]]


def train_tracing(flags: dict[str, Any], steps: Iterable[int]) -> Trace:
    """Train here; the pieces of this rank in these steps (from 1)."""
    from srde_ds.distributed import zero_placement as placement
    from srde_ds.distributed.deepspeed_internals import deepspeed
    from srde_ds.distributed.engine import Engine
    from srde_ds.training import trainer
    from srde_ds.training.step import optimizer_step

    zero = deepspeed.runtime.zero.stage3.DeepSpeedZeroOptimizer_Stage3
    step, clip = optimizer_step, zero.unscale_and_clip_grads
    wanted = set(steps)
    trace: Trace = {}
    done: list[None] = []
    engines: list[Any] = []

    def keep(kind: str, values: Callable[[Any], Tensor], index: int | None = None) -> None:
        entry = trace.setdefault((len(done) + 1, kind), [])
        for number, group in enumerate(placement.sub_groups(engines[0].deepspeed, engines[0].model)):
            for part in group.partitions if index in (None, number) else ():
                piece = part.slice("master", values(group.master))
                if piece is not None:
                    entry.append((piece.name, piece.global_shape, piece.offset, piece.stride, piece.data.clone()))

    def traced_step(*args: Any) -> Any:
        engines[:] = [next(arg for arg in args if isinstance(arg, Engine))]
        result = step(*args)
        if len(done) + 1 in wanted:
            keep("weights", lambda master: master.detach())
        done.append(None)
        return result

    def traced_clip(optimizer: Any, index: int, norm: Any) -> None:
        watched = len(done) + 1 in wanted
        if watched:
            keep("gradient", lambda master: master.grad, index)
        clip(optimizer, index, norm)
        if watched:
            keep("clipped", lambda master: master.grad, index)

    with ExitStack() as stack:
        stack.enter_context(patch.object(trainer, "optimizer_step", traced_step))
        stack.enter_context(patch.object(zero, "unscale_and_clip_grads", traced_clip))
        error = train_here(flags)
    assert error is None, error
    return trace


def whole(traces: list[Trace]) -> Whole:
    """The tensors that the ranks' pieces make; each value must be there once."""
    result: Whole = {}
    for key in traces[0]:
        tensors = result.setdefault(key, {})
        for name, shape, offset, stride, data in (piece for trace in traces for piece in trace[key]):
            tensor = tensors.setdefault(name, torch.full((math.prod(shape),), math.nan)).view(-1)
            target = tensor.as_strided(data.shape, (1,) if data.dim() == 1 else (stride, 1), offset)
            assert target.isnan().all(), f"{key}: '{name}' is held twice"
            target.copy_(data)
            tensors[name] = tensor
        for name, tensor in tensors.items():
            assert not tensor.isnan().any(), f"{key}: nobody holds all of '{name}'"
    return result


def largest_differences(found: Whole, expected: Whole) -> dict[str, float]:
    """By step and kind: the largest difference in any tensor, relative to the tensor's largest value."""
    assert found.keys() == expected.keys() != set()
    result = {}
    for (step, kind), tensors in expected.items():
        assert tensors.keys() == found[step, kind].keys()
        result[f"step {step}: {kind}"] = max(
            float((found[step, kind][name] - tensor).abs().max() / tensor.abs().max())
            for name, tensor in tensors.items()
        )
    return result


def metric_differences(found: Path, expected: Path) -> dict[str, float]:
    """The largest relative difference of losses and gradient norms in any step of two run folders."""
    lines = list(zip(metrics(found), metrics(expected), strict=True))
    return {
        key: max(abs(ours[key] - theirs[key]) / abs(theirs[key]) for ours, theirs in lines)
        for key in ("loss", "grad_norm")
    }
