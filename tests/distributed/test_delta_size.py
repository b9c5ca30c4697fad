"""The loss of the deltas' size has one gradient, however the batch and the experts are spread."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from srde_ds.config import resolve
from srde_ds.parallel.pieces import TensorPiece
from tests.distributed.harness import Ranks
from tests.distributed.training_helpers import Inputs, assert_close
from tests.helpers import randomize

ROWS = 4


def first_moments(flags: dict[str, Any], size_weight: float) -> list[TensorPiece]:
    """AdamW's first moments, (1 - beta1) times the gradient, after one step from random deltas: this rank's pieces."""
    from srde_ds.data.loader import RowStream
    from srde_ds.data.manifest import load_manifest, load_rows
    from srde_ds.optim.schedule import set_step
    from srde_ds.parallel.engine import build_engine, build_model
    from srde_ds.parallel.placement import state_pieces
    from srde_ds.parallel.topology import start_processes
    from srde_ds.training.balancing import delta_size_factor

    config = resolve({}, flags)
    topology = start_processes(60)
    model = randomize(build_model(config, topology))
    model.routing.delta_size_weight = size_weight * delta_size_factor(config)
    engine = build_engine(model, config, topology)
    folder = Path(str(config.data.pretokenized_dir))
    set_step(engine.optimizer, 1)
    rows = load_rows(folder, "train", load_manifest(folder))
    stream = RowStream(rows, seed=0, global_batch_rows=ROWS)
    for micro in range(config.training.gradient_accumulation_steps):
        batch = stream.micro_batch(0, micro, rank=topology.rank, world_size=topology.world_size, batch_size=1)
        loss, _ = engine.forward(batch)
        engine.deepspeed.backward(loss * config.training.gradient_accumulation_steps * topology.world_size)
        engine.deepspeed.step()
    pieces = state_pieces(engine.deepspeed, model, engine.optimizer)
    return [piece for piece in pieces if piece.kind == "exp_avg"]


def whole(ranks: list[list[TensorPiece]]) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for piece in (piece for pieces in ranks for piece in pieces):
        target = tensors.setdefault(piece.name, torch.full(piece.global_shape, float("nan")))
        strides = (1,) if piece.data.dim() == 1 else (piece.stride, 1)
        target.as_strided(piece.data.shape, strides, piece.offset).copy_(piece.data)
    return tensors


@pytest.mark.parametrize("form", [{}, {"num_atoms": 4, "atom_mixing": "softmax"}])
def test_the_size_of_deltas_weighs_the_same_on_any_number_of_ranks(
    inputs: Inputs,
    one_rank: Ranks,
    two_ranks: Ranks,
    four_ranks: Ranks,
    tmp_path: Path,
    form: dict[str, Any],
) -> None:
    """Three experts: expert-parallel size 2 leaves a slot empty."""
    ranks = {1: one_rank, 2: two_ranks, 4: four_ranks}

    def gradients(world_size: int, expert_parallel_size: int = 1, transport: str = "auto", weight: float = 20.0) -> Any:
        flags = inputs.flags(
            tmp_path,
            use_muon=False,
            max_grad_norm=0.0,
            gradient_accumulation_steps=ROWS // world_size,
            expert_parallel_size=expert_parallel_size,
            expert_transport=transport,
            **form,
        )
        return whole(ranks[world_size](first_moments, flags, weight))

    alone, without = gradients(1), gradients(1, weight=0.0)
    name = "layers.1.deltas." + ("atoms" if form else "free")
    assert float((alone[name] - without[name]).norm()) > 0.3 * float(without[name].norm())
    for placement in [(2, 1), (2, 2, "tokens"), (4, 2, "tokens"), (4, 2, "deltas")]:
        found = gradients(*placement)
        assert found.keys() == alone.keys()
        for name, tensor in found.items():
            assert_close(tensor, alone[name], 1e-5, f"{placement}: {name}")
