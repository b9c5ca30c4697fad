"""Give trainables new values while training goes on."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from srde_ds.distributed import zero_placement as placement
from srde_ds.distributed.engine import Engine
from srde_ds.errors import SRDEError


@torch.no_grad()
def write_trainables(engine: Engine, tensors: Mapping[str, Tensor]) -> None:
    """Set trainables to whole tensors: fp32 masters and parameters. Their optimizer state starts again at zero.

    Args:
        tensors: by stable name (`layers.0.router.weight`), of all experts and without padding, equal on all ranks.

    Raises:
        SRDEError: no such trainable, or another shape.
    """
    pieces = placement.state_pieces(engine.deepspeed, engine.model, engine.optimizer)
    known = {name for name, _ in engine.model.trainable_parameters()}
    unknown = sorted(set(tensors) - known)
    if unknown:
        raise SRDEError(f"'{unknown[0]}' is no trainable of this model; known are {min(known)} to {max(known)}.")
    for piece in pieces:
        if piece.name not in tensors:
            continue
        tensor = tensors[piece.name]
        if tuple(tensor.shape) != piece.global_shape:
            raise SRDEError(f"'{piece.name}': shape {list(tensor.shape)}, expected {list(piece.global_shape)}.")
        if piece.kind != "master":
            piece.data.zero_()
            continue
        values = tensor.to(piece.data).contiguous()
        strides = (1,) if piece.data.dim() == 1 else (piece.stride, 1)
        piece.data.copy_(values.as_strided(piece.data.shape, strides, piece.offset))
    placement.publish_masters(engine.deepspeed)
