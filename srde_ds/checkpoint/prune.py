"""Replaces a checkpoint by one with smaller supports (docs/curriculum.md). Needs no deepspeed."""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from srde_ds.checkpoint.layout import COMMON, read_manifest
from srde_ds.checkpoint.resume import load_common_tensors, load_rank_state, load_run_state, verify_checkpoint
from srde_ds.checkpoint.save import CheckpointSaver
from srde_ds.checkpoint.shards import ShardIndex, open_tensors
from srde_ds.checkpoint.tensor_slice import KINDS, TensorSlice
from srde_ds.config import ModelConfig
from srde_ds.config.values import checked
from srde_ds.errors import SRDEError
from srde_ds.model.base_shape import measure
from srde_ds.model.supports.pruning import at_positions, kept_positions
from srde_ds.model.supports.selection import support_size
from srde_ds.utils.together import Collectives, Ranks, together
from srde_ds.weights.file import AdapterMetadata
from srde_ds.weights.schema import support_hash

# Ranks that are threads of one process take turns, so that its memory holds one layer at a time.
_one_layer = threading.Lock()


def prune_checkpoint(
    folder: str | Path, density: float, *, ranks: Ranks, keep: int, base: ModelConfig | None = None
) -> Path:
    """Replace `checkpoint-<step>` by one of the same step whose supports have `density`. Every rank calls this.

    `model.pruning.kept_positions` chooses the entries that stay. Deltas, atoms, importance and all optimizer state keep
    their values there; the scores of a learned support are dropped. All else stays the same, except that in the run
    state the adapter gets the new density and support_hash, and `probe_loss` becomes None, since the pruned model's
    loss was not measured.

    If there are as many ranks as saved the checkpoint, they share the layers. Otherwise rank 0 does everything, so that
    one process can prune any checkpoint. A rank's memory holds one original layer, and its share of what stays.

    Args:
        ranks: the ranks that call this.
        keep: number of checkpoints to keep in the run's folder, including this one, which becomes the latest.
        base: names the base, whose configuration gives the supports' sizes; default: the base that the checkpoint
            names.

    Returns:
        The new checkpoint: `checkpoint-<step>` beside `folder`.

    Raises:
        SRDEError: on every rank, if any rank failed, with its reason: the checkpoint is damaged or its folder has
            another name, the base is missing or another one, or the supports would not shrink. After a failure or a
            kill, either the old checkpoint or the new one is there, complete.
    """
    source = Path(folder)
    step, saved_by = together(lambda: _step_and_ranks(source), ranks, long=True)
    target = source.parent / f"checkpoint-{step}"
    if saved_by == ranks.world_size:
        content = together(lambda: _content(source, density, base, ranks.rank, saved_by), ranks, long=True)
        with CheckpointSaver(source.parent, ranks, keep=keep) as saver:
            saver.start(step, **content, copy_first=False)
        return target

    def as_it_was_saved() -> None:
        if ranks.rank == 0:
            _on_threads(saved_by, lambda thread: prune_checkpoint(source, density, ranks=thread, keep=keep, base=base))

    together(as_it_was_saved, ranks, long=True)
    return target


class PrunedLayers:
    """What pruning leaves of a checkpoint, layer by layer.

    Args:
        density: density of the supports after pruning.
        base: see `prune_checkpoint`.

    Attributes:
        metadata: the adapter's metadata, with the new density but still the old support_hash.
        old_sizes, sizes: number of entries in each layer's supports, before and after.

    Raises:
        SRDEError: the checkpoint holds no adapter, or the base is missing or not the one that it was made with.
    """

    def __init__(self, folder: Path, density: float, base: ModelConfig | None = None) -> None:
        self.folder, self.index = folder, ShardIndex(folder)
        state = load_run_state(folder)
        if "adapter" not in state:
            raise SRDEError(f"checkpoint '{folder}': its run state has no 'adapter': there are no supports to prune.")
        metadata = AdapterMetadata.from_dict(state["adapter"])
        before = metadata.config
        after = replace(before, density=checked(before, "density", density))
        self.metadata = replace(metadata, config=after)
        base = base or ModelConfig(model_name=str(metadata.model_name), model_revision=metadata.model_revision or None)
        shapes = measure(base).blocks
        self.old_sizes = [support_size(before, hidden, intermediate) for hidden, intermediate in shapes]
        self.sizes = [support_size(after, hidden, intermediate) for hidden, intermediate in shapes]
        with open_tensors(folder / COMMON) as file:
            supports = [name for name in file.keys() if name.endswith(".support")]  # noqa: SIM118
            saved_sizes = {name: file.get_slice(name).get_shape()[-1] for name in supports}
        if saved_sizes != {_support_name(layer): size for layer, size in enumerate(self.old_sizes)}:
            raise SRDEError(
                f"checkpoint '{folder}': its supports have {sorted(set(saved_sizes.values()))} entries, but with base "
                f"'{base.model_name}' they would have {sorted(set(self.old_sizes))}. Give the base that it was "
                "made with."
            )

    def positions(self, layer: int) -> Tensor:
        """The positions in the layer's supports that stay, see `kept_positions`."""
        masters = {name: self.index.tensor(kind, name) for kind, name in self._names(layer, {"master"})}
        values = {name.rpartition(".")[2]: tensor for name, tensor in masters.items()}
        return kept_positions(self.metadata.config, values, self.old_sizes[layer], self.sizes[layer])

    def support(self, layer: int, positions: Tensor) -> Tensor:
        """The layer's int32 support, reduced to the entries at `positions`."""
        name = _support_name(layer)
        with open_tensors(self.folder / COMMON) as file:
            return at_positions(self.metadata.config, name, file.get_tensor(name), positions)

    def tensors(self, layer: int, positions: Tensor, kinds: Collection[str] = KINDS) -> dict[tuple[str, str], Tensor]:
        """What remains of the layer's masters and optimizer states, by kind and name; without scores."""
        return {
            (kind, name): at_positions(self.metadata.config, name, self.index.tensor(kind, name), positions)
            for kind, name in self._names(layer, kinds)
            if not name.endswith(".scores")
        }

    def common_tensors(self, supports: list[Tensor]) -> dict[str, Tensor]:
        """The tensors that all ranks share, with these supports."""
        others = load_common_tensors(self.folder, but=".support")
        return others | {_support_name(layer): support for layer, support in enumerate(supports)}

    def _names(self, layer: int, kinds: Collection[str]) -> list[tuple[str, str]]:
        prefix = f"layers.{layer}."
        return sorted(key for key in self.index.shapes if key[0] in kinds and key[1].startswith(prefix))


def _support_name(layer: int) -> str:
    return f"layers.{layer}.support"


def _step_and_ranks(source: Path) -> tuple[int, int]:
    manifest = read_manifest(source)
    name = f"checkpoint-{manifest['step']}"
    if source.name not in (name, f"{name}.old"):  # a kill between the two renames of a save leaves the latter
        raise SRDEError(f"checkpoint '{source}': pruning needs a folder called '{name}'. Rename it.")
    return manifest["step"], manifest["world_size"]


def _content(source: Path, density: float, base: ModelConfig | None, rank: int, ranks: int) -> dict[str, Any]:
    """The content that a rank saves; see `CheckpointSaver.start`."""
    if rank == 0:
        verify_checkpoint(source)
    pruned = PrunedLayers(source, density, base)
    if all(new >= old for new, old in zip(pruned.sizes, pruned.old_sizes, strict=True)):
        raise SRDEError(
            f"density={density}: the supports would have {pruned.sizes[0]} entries, and those in '{source}' have "
            f"{pruned.old_sizes[0]}, but pruning makes them smaller. Give a lower density."
        )
    slices, supports = [], []
    for layer in range(len(pruned.sizes)):
        if rank not in (0, layer % ranks):
            continue
        with _one_layer:
            positions = pruned.positions(layer)
            if rank == 0:
                supports.append(pruned.support(layer, positions))
            if rank == layer % ranks:
                for (kind, name), tensor in pruned.tensors(layer, positions).items():
                    slices.append(TensorSlice(name, kind, tuple(tensor.shape), 0, tensor.flatten()))
    content = {"slices": slices, "rank_state": load_rank_state(source, rank), "run_state": {}, "common_tensors": {}}
    if rank == 0:
        adapter = replace(pruned.metadata, support_hash=support_hash(supports))
        content["run_state"] = load_run_state(source) | {"adapter": adapter.to_dict(), "probe_loss": None}
        content["common_tensors"] = pruned.common_tensors(supports)
    return content


def _on_threads(ranks: int, work: Callable[[Collectives], Any]) -> None:
    """Run `work` as several ranks, each in a thread of this process."""
    barrier = threading.Barrier(ranks)
    values: list[Any] = [None] * ranks

    def collectives(rank: int) -> Collectives:
        def gather(value: Any) -> list[Any]:
            values[rank] = value
            barrier.wait()
            everyone = list(values)
            barrier.wait()
            return everyone

        return Collectives(rank, ranks, lambda value: max(gather(value)), gather)

    with ThreadPoolExecutor(ranks) as pool:
        done = [pool.submit(work, collectives(rank)) for rank in range(ranks)]
    for future in done:
        future.result()
