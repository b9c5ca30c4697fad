"""Writes a dense Hugging Face checkpoint: the base with one expert merged into its weights, file by file."""

from __future__ import annotations

import copy
import logging
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from srde_ds.export.adapter_source import AdapterSource
from srde_ds.export.streaming import complete_folder, tensors_size, write_model
from srde_ds.model.base_files import BaseFiles
from srde_ds.model.merging import merged_weight
from srde_ds.utils.dtypes import dtype_name
from srde_ds.weights.tensors import LazyTensor

log = logging.getLogger(__name__)


def write_dense(
    adapter: AdapterSource, base: BaseFiles, output: str | Path, *, expert: str, dtype: torch.dtype | None
) -> Path:
    """Write the base with `expert` merged, with the base's file names and order, tokenizer and configuration.

    It computes the same as the experts do with all tokens routed to this one. Memory holds one tensor and one layer's
    deltas.

    Args:
        dtype: dtype of the weights; None: the base's. Sums are rounded to it once.

    Raises:
        SRDEError: the expert does not exist, was trained on another base, or the folder cannot be written.
    """
    number, granularity = adapter.metadata.expert_index(expert), adapter.metadata.config.granularity
    adapter.check_fits(base)

    @lru_cache(maxsize=1)
    def change(layer: int) -> tuple[Tensor, Tensor]:
        return adapter.support(layer, number), adapter.expert_delta(layer, number)

    rounding = Rounding()

    def merged(weight: LazyTensor, role: str, layer: int) -> LazyTensor:
        def load() -> Tensor:
            before = weight.load()
            after = merged_weight(before, role, *change(layer), granularity)
            if after.dtype != torch.float32:
                rounding.add(before, after, merged_weight(torch.zeros(before.shape), role, *change(layer), granularity))
            return after

        return LazyTensor(weight.dtype, weight.shape, load)

    changed = {
        f"{base.prefix}layers.{layer}.{name}": (role, layer)
        for layer in range(adapter.num_layers)
        for role, name in base.roles.items()
    }
    shards: dict[str, dict[str, LazyTensor]] = {}
    for file, names in base.shards.items():
        tensors = {name: base.tensor(name).to(dtype) for name in names}
        shards[file] = {n: merged(t, *changed[n]) if n in changed else t for n, t in tensors.items()}
    size = tensors_size(tensor for tensors in shards.values() for tensor in tensors.values())
    with complete_folder(Path(output), size) as folder:
        write_model(folder, shards, with_dtype(base.config, dtype), base.companions())
    if rounding.changed:
        log.info("%s", rounding)
    return Path(output)


class Rounding:
    """Measures what rounding to the dtype of the weights loses of the experts' changes.

    Attributes:
        changed: number of weights that the experts change.
    """

    def __init__(self) -> None:
        self.changed = self._same = 0
        self._error = self._size = 0.0

    def add(self, before: Tensor, after: Tensor, change: Tensor) -> None:
        """Count one matrix: before and after the merge, and the exact change in float32."""
        moved = after.float() - before.float()
        self.changed += int((change != 0).sum())
        self._same += int(((change != 0) & (moved == 0)).sum())
        self._error += float((moved - change).square().sum())
        self._size += float(change.square().sum())

    @property
    def relative_error(self) -> float:
        """The norm of the error relative to the norm of the exact changes."""
        return (self._error / self._size) ** 0.5 if self._size else 0.0

    @property
    def unchanged_share(self) -> float:
        """The share of the weights to change that rounding leaves unchanged."""
        return self._same / self.changed if self.changed else 0.0

    def __str__(self) -> str:
        return (
            f"rounding: the merged changes have a relative error of {self.relative_error:.2g}, and "
            f"{self.unchanged_share:.1%} of the weights to change stay the same; --dtype float32 keeps changes exactly"
        )


def with_dtype(config: dict[str, Any], dtype: torch.dtype | None) -> dict[str, Any]:
    """A configuration with another `dtype`, also in its parts; None: unchanged."""
    if dtype is None:
        return config
    config = copy.deepcopy(config)
    for part in (config, *(value for value in config.values() if isinstance(value, dict))):
        for key in {"dtype", "torch_dtype"} & part.keys():
            part[key] = dtype_name(dtype)
    return config
