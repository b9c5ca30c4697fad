"""Writes a dense Hugging Face checkpoint: the base with one expert merged into its weights, file by file."""

from __future__ import annotations

import copy
import logging
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from srde_ds.config.granularity import Granularity
from srde_ds.export.streaming import complete_folder, tensors_size, write_model
from srde_ds.model.adapter_source import AdapterSource
from srde_ds.model.base_files import BaseFiles
from srde_ds.model.merging import Rounding, merged_weight
from srde_ds.utils.dtypes import dtype_name
from srde_ds.weights.tensors import LazyTensor

log = logging.getLogger(__name__)


def write_dense(
    adapter: AdapterSource, base: BaseFiles, output: str | Path, *, expert: str, dtype: torch.dtype | None
) -> Path:
    """Write the base with `expert` merged, with the base's file names and order, tokenizer and configuration.

    A shared expert is merged as well. The result computes the same as the experts do with all tokens routed to this
    one. Memory holds one tensor and one layer's deltas.

    Args:
        dtype: dtype of the weights; None: the base's. Sums are rounded to it once.

    Raises:
        SRDEError: the expert does not exist, was trained on another base, or the folder cannot be written.
    """
    number, granularity = adapter.metadata.expert_index(expert), adapter.metadata.config.granularity
    adapter.check_fits(base)

    @lru_cache(maxsize=1)
    def changes(layer: int) -> list[tuple[Tensor, Tensor, Granularity]]:
        own = (adapter.support(layer, number), adapter.expert_delta(layer, number), granularity)
        shared = adapter.shared_expert(layer)
        return [own] if shared is None else [own, (*shared, "neuron")]

    rounding = Rounding()

    def merged(weight: LazyTensor, role: str, layer: int) -> LazyTensor:
        def load() -> Tensor:
            loaded = weight.load()
            for change in changes(layer):
                loaded = merged_weight(loaded, role, *change, rounding)
            return loaded

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
        write_model(folder, shards, with_dtype(base.config, dtype), base.companions(), base=base.folder)
    if rounding.changed:
        log.info("%s; --dtype float32 keeps them exactly", rounding)
    return Path(output)


def with_dtype(config: dict[str, Any], dtype: torch.dtype | None) -> dict[str, Any]:
    """A configuration with another `dtype`, also in its parts; None: unchanged."""
    if dtype is None:
        return config
    config = copy.deepcopy(config)
    for part in (config, *(value for value in config.values() if isinstance(value, dict))):
        for key in {"dtype", "torch_dtype"} & part.keys():
            part[key] = dtype_name(dtype)
    return config
