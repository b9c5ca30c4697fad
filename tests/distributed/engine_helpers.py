"""Engines that are driven by hand, without the trainer, inside the processes of `harness.Ranks`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import datasets
import torch

from srde_ds.checkpoint.tensor_slice import TensorSlice
from srde_ds.config import Config
from srde_ds.data.loader import RowStream
from srde_ds.data.manifest import load_manifest, load_rows
from srde_ds.model.policy import RoutingPolicy


def training_rows(config: Config) -> datasets.Dataset:
    folder = Path(str(config.data.pretokenized_dir))
    return load_rows(folder, "train", load_manifest(folder))


def run_steps(engine: Any, config: Config, topology: Any, steps: int = 1, policy: RoutingPolicy | None = None) -> None:
    """Optimizer steps on the first training rows; the loss is the sum over their labels."""
    from srde_ds.optim.schedule import set_step

    training = config.training
    micro_steps, world_size = training.gradient_accumulation_steps, topology.world_size
    rows = training.batch_size * micro_steps * world_size
    stream = RowStream(training_rows(config), seed=0, global_batch_rows=rows)
    for step in range(steps):
        set_step(engine.optimizer, step + 1)
        for micro in range(micro_steps):
            batch = stream.micro_batch(
                step, micro, rank=topology.rank, world_size=world_size, batch_size=training.batch_size
            )
            loss, _ = engine.forward(batch, policy)
            engine.deepspeed.backward(loss * micro_steps * world_size)
            engine.deepspeed.step()


def state(engine: Any) -> list[TensorSlice]:
    """This rank's masters and optimizer states."""
    from srde_ds.distributed.zero_placement import state_slices

    return state_slices(engine.deepspeed, engine.model, engine.optimizer)


def whole(ranks: list[list[TensorSlice]], kind: str) -> dict[str, torch.Tensor]:
    """Global tensors of one kind from the pieces of all ranks."""
    tensors: dict[str, torch.Tensor] = {}
    for piece in (piece for pieces in ranks for piece in pieces if piece.kind == kind):
        target = tensors.setdefault(piece.name, torch.full(piece.global_shape, float("nan")))
        strides = (1,) if piece.data.dim() == 1 else (piece.stride, 1)
        target.as_strided(piece.data.shape, strides, piece.offset).copy_(piece.data)
    return tensors
