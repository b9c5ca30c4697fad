"""Checkpoints of small tensors, saved by one rank or by several that are threads."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from srde_ds.checkpoint.save import CheckpointSaver
from srde_ds.checkpoint.shards import ShardIndex
from srde_ds.checkpoint.tensor_slice import KINDS, TensorSlice
from srde_ds.utils.together import Collectives

SHAPES = {
    "layers.0.deltas.free": (7, 6, 3),
    "layers.0.router.weight": (2, 7),
    "layers.1.deltas.importance": (2, 3, 7, 3),
}
SUPPORT = {"layers.0.support": torch.arange(3, dtype=torch.int32)}
ALONE = Collectives(rank=0, world_size=1, all_reduce_max=int, gather=lambda value: [value])
Tensors = dict[tuple[str, str], Tensor]


def make_tensors(shift: float = 0.0) -> Tensors:
    generator = torch.Generator().manual_seed(0)
    return {
        (kind, name): torch.randn(shape, generator=generator) + shift
        for name, shape in SHAPES.items()
        for kind in KINDS
    }


def cut(tensors: Tensors, world_size: int, seed: int = 0) -> list[list[TensorSlice]]:
    """Uneven flat runs, several a rank and tensor, as expert parallelism makes them; some are empty."""
    draw = random.Random(seed)
    ranks: list[list[TensorSlice]] = [[] for _ in range(world_size)]
    for (kind, name), tensor in tensors.items():
        flat = tensor.flatten()
        inner = sorted(draw.randint(0, flat.numel()) for _ in range(2 * world_size - 1))
        ends = [0, *inner, flat.numel()]
        for index, (start, stop) in enumerate(zip(ends, ends[1:], strict=False)):
            ranks[index % world_size].append(
                TensorSlice(name, kind, tuple(tensor.shape), start, flat[start:stop].clone())
            )
    return ranks


def blank(pieces: list[TensorSlice]) -> list[TensorSlice]:
    return [TensorSlice(p.name, p.kind, p.global_shape, p.offset, torch.full_like(p.data, torch.nan)) for p in pieces]


def thread_collectives(world_size: int) -> list[Collectives]:
    """Real collectives between threads; a rank that does not come breaks the barrier within 20 s."""
    barrier = threading.Barrier(world_size, timeout=20)
    slots: list[Any] = [None] * world_size

    def of_rank(rank: int) -> Collectives:
        def gather(value: Any) -> list[Any]:
            slots[rank] = value
            barrier.wait()
            everyone = list(slots)
            barrier.wait()
            return everyone

        return Collectives(rank, world_size, lambda value: max(gather(value)), gather)

    return [of_rank(rank) for rank in range(world_size)]


def on_ranks(world_size: int, work: Callable[[Collectives], Any]) -> list[Any]:
    """`work` on a thread for each rank; what each returned or raised."""
    results: list[Any] = [None] * world_size

    def run(collectives: Collectives) -> None:
        try:
            results[collectives.rank] = work(collectives)
        except Exception as error:
            results[collectives.rank] = error

    threads = [threading.Thread(target=run, args=(collectives,)) for collectives in thread_collectives(world_size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


def contents(step: int, collectives: Collectives = ALONE) -> dict[str, Any]:
    """What one rank saves: tensors whose values tell the step."""
    return {
        "slices": cut(make_tensors(float(step)), collectives.world_size)[collectives.rank],
        "rank_state": {"rng": [step, collectives.rank]},
        "run_state": {"tokens": step},
        "common_tensors": SUPPORT,
    }


def save(run: Path, step: int, collectives: Collectives = ALONE, *, keep: int = 9, **given: Any) -> Path:
    """One rank's save, which waits for its end; `given` replaces some of its contents."""
    saver = CheckpointSaver(run, collectives, keep=keep)
    saver.start(step, **(contents(step, collectives) | given), copy_first=False)
    saver.wait()
    assert saver.saved_step == step
    return run / f"checkpoint-{step}"


def save_on_ranks(
    run: Path, step: int, world_size: int, per_rank: dict[int, dict[str, Any]] | None = None
) -> list[Any]:
    """`save` on each rank; its folder or exception."""
    return on_ranks(world_size, lambda ranks: save(run, step, ranks, **(per_rank or {}).get(ranks.rank, {})))


def value_of(folder: Path) -> float:
    """The step that the tensors in a checkpoint tell; every element must say the same."""
    wanted = blank(cut(make_tensors(), 1)[0])
    ShardIndex(folder).read(wanted)
    shifts = [
        found.data - piece.data
        for found, piece in zip(wanted, cut(make_tensors(), 1)[0], strict=True)
        if len(found.data)
    ]
    flat = torch.cat(shifts)
    step = round(flat.mean().item())
    assert torch.allclose(flat, torch.full_like(flat, step), atol=1e-3)
    return step


def names(run: Path) -> list[str]:
    return sorted(path.name for path in run.iterdir())
