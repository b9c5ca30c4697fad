"""Writes a stock mixture of experts: the same model as `GraniteMoeShared`, which unmodified transformers and vLLM load.

With neuron supports S_e, their union U in a layer, and p_e that add up to 1,

    y = FFN(x; W) + sum_e p_e [FFN(x; W + delta_e) - FFN(x; W)]
      = FFN(x; W without the neurons of U) + sum_e p_e FFN(x; the neurons of U in W + delta_e)

so the shared block is the base (with the delta of a shared expert, whose neurons are not in U) with the down columns of
U zeroed, and an expert holds the base's neurons of U, with its delta added on S_e. Experts are equally wide in all
layers: narrower ones are filled up with neurons of zeros.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from srde_ds.errors import SRDEError
from srde_ds.export.moe_config import (
    ATTENTION,
    KEYS_AND_VALUES,
    NORMS,
    OUTPUT,
    check_expressible,
    has_usual_heads,
    head_dim,
    heads,
    moe_config,
    padded,
)
from srde_ds.export.streaming import complete_folder, tensors_size, write_model
from srde_ds.model.adapter_source import AdapterSource
from srde_ds.model.base_files import BaseFiles
from srde_ds.model.merging import Rounding, merged_weight
from srde_ds.utils.dtypes import dtype_name
from srde_ds.weights.tensors import LazyTensor

log = logging.getLogger(__name__)


def write_moe(adapter: AdapterSource, base: BaseFiles, output: str | Path, *, dtype: torch.dtype | None) -> Path:
    """Write the base with its experts as a GraniteMoeShared checkpoint, with the base's file names.

    Names and shapes are those of the published checkpoints. Memory holds one tensor, and one layer's deltas.

    Args:
        dtype: dtype of the weights; None: the base's. Experts' sums are rounded to it once.

    Raises:
        SRDEError: the model cannot be expressed, the experts were trained on another base, or the folder cannot be
            written.
    """
    check_expressible(adapter, base)
    adapter.check_fits(base)
    moe = _Moe(adapter, base, dtype)
    if moe.bias or not has_usual_heads(base):
        log.warning(
            "vLLM's own code for GraniteMoeShared leaves out the %s of this base and would answer wrongly: start it "
            "with --model-impl transformers",
            "attention's biases" if moe.bias else "head_dim",
        )
    shards: dict[str, dict[str, LazyTensor]] = {file: {} for file in base.shards}
    for source, name, tensor in moe.tensors():
        shards[base.files[source]][name] = tensor
    shards = {file: tensors for file, tensors in shards.items() if tensors}
    tensors = [tensor for tensors in shards.values() for tensor in tensors.values()]
    config = moe_config(
        adapter,
        base,
        width=moe.width,
        tied=moe.output is None,
        bias=moe.bias,
        dtype=dtype_name(moe.embedding.dtype),
    )
    companions = [path for path in base.companions() if "processor" not in path.name]  # for images or sounds
    with complete_folder(Path(output), tensors_size(tensors)) as folder:
        write_model(folder, shards, config, companions, base=base.folder)
    if moe.rounding.changed:
        log.info("%s; --dtype float32 keeps them exactly", moe.rounding)
    return Path(output)


def moe_size(adapter: AdapterSource, base: BaseFiles, *, dtype: torch.dtype | None) -> int:
    """Bytes of the weights that `write_moe` would write; errors as there."""
    check_expressible(adapter, base)
    return tensors_size(tensor for _, _, tensor in _Moe(adapter, base, dtype).tensors())


@dataclass(frozen=True)
class _Block:
    """One layer's experts. `union`: int64 `[u]`, ascending; `experts`: their supports; `deltas`: `[D, E, 3, m]`;
    `shared_expert`: its neurons and delta, if there is one."""

    union: Tensor
    experts: list[Tensor]
    deltas: Tensor
    shared_expert: Any


class _Moe:
    """The tensors of the new model, each with a tensor of the base, whose file it goes into."""

    def __init__(self, adapter: AdapterSource, base: BaseFiles, dtype: torch.dtype | None) -> None:
        self.adapter, self.base, self.dtype, self.rounding = adapter, base, dtype, Rounding()
        self.experts = range(adapter.metadata.config.num_experts)
        unions = [self._union(layer) for layer in range(adapter.num_layers)]
        self.width = padded(max(len(union) for union in unions))
        self.embedding = base.decoder_tensor("embed_tokens.weight").to(dtype)
        self.bias = any(
            name.startswith("layers.0.self_attn.") and name.endswith(".bias") for name in base.decoder_shapes
        )
        self.output = self._output_layer()
        self.block: Callable[[int], _Block] = lru_cache(maxsize=1)(self._block)

    def _output_layer(self) -> str | None:
        """The name of the output layer's weight in the files; None if it is the embedding."""
        model = self.base.empty
        if model.get_output_embeddings().weight is model.get_input_embeddings().weight:
            return None
        found = [name for name in self.base.files if name.rpartition("lm_head")[1:] == ("lm_head", ".weight")]
        if len(found) != 1:
            raise SRDEError(f"base '{self.base.name}': {len(found)} tensors are called lm_head.weight, one is needed.")
        return found[0]

    def _union(self, layer: int) -> Tensor:
        return torch.cat([self.adapter.support(layer, expert) for expert in self.experts]).long().unique()

    def _block(self, layer: int) -> _Block:
        supports = [self.adapter.support(layer, expert) for expert in self.experts]
        return _Block(self._union(layer), supports, self.adapter.deltas(layer), self.adapter.shared_expert(layer))

    def tensors(self) -> Iterator[tuple[str, str, LazyTensor]]:
        """Yields the name of the base's tensor whose file it goes into, the tensor's name, and the tensor."""
        prefix = self.base.prefix
        yield f"{prefix}embed_tokens.weight", "model.embed_tokens.weight", self.embedding
        yield f"{prefix}norm.weight", "model.norm.weight", self._same("norm.weight")
        if self.output is not None:
            yield self.output, "lm_head.weight", self.base.tensor(self.output).to(self.dtype)
        for layer in range(self.adapter.num_layers):
            place = f"layers.{layer}."
            parts = {**self._attention(place), **self._mixture(place, layer)}
            for name, (source, tensor) in parts.items():
                yield f"{prefix}{place}{source}", f"model.{place}{name}", tensor

    def _same(self, name: str) -> LazyTensor:
        return self.base.decoder_tensor(name).to(self.dtype)

    def _attention(self, place: str) -> dict[str, tuple[str, LazyTensor]]:
        found = {name: (name, self._same(place + name)) for name in NORMS}
        for part in ATTENTION:
            source, out = f"{part}.weight", part == OUTPUT
            weight = self._same(place + source)
            size = (heads(self.base)[part in KEYS_AND_VALUES]) * head_dim(self.base)
            found[source] = (source, _filled(weight, size, axis=int(out)))
            if self.bias:
                if f"{place}{part}.bias" in self.base.decoder_shapes:
                    bias = self._same(f"{place}{part}.bias")
                else:  # such as Qwen2's output projection
                    bias = LazyTensor(weight.dtype, (0,), partial(torch.zeros, 0, dtype=weight.dtype))
                found[f"{part}.bias"] = (source, _filled(bias, weight.shape[0] if out else size, axis=0))
        return found

    def _mixture(self, place: str, layer: int) -> dict[str, tuple[str, LazyTensor]]:
        roles = self.base.roles
        gate, up, down = (self._with_shared_expert(place + roles[role], role, layer) for role in ("gate", "up", "down"))
        hidden, intermediate = down.shape
        experts, width, dtype = len(self.experts), self.width, down.dtype

        def shared_output() -> Tensor:
            weight = down.load().clone()
            weight[:, self.block(layer).union] = 0
            return weight

        def expert_input() -> Tensor:
            loaded = {"gate": gate.load(), "up": up.load()}
            rows = torch.zeros(experts, 2, width, hidden, dtype=dtype)
            for expert in self.experts:
                for half, (role, weight) in enumerate(loaded.items()):
                    neurons = self._neurons(weight, role, layer, expert)
                    rows[expert, half, : len(neurons)] = neurons
            return rows.flatten(1, 2)

        def expert_output() -> Tensor:
            weight = down.load()
            columns = torch.zeros(experts, hidden, width, dtype=dtype)
            for expert in self.experts:
                neurons = self._neurons(weight, "down", layer, expert)
                columns[expert, :, : neurons.shape[1]] = neurons
            return columns

        router = self.adapter.router(layer)
        shared = LazyTensor(dtype, (2 * intermediate, hidden), lambda: torch.cat([gate.load(), up.load()]))
        mixture = "block_sparse_moe"
        return {
            "shared_mlp.input_linear.weight": (roles["gate"], shared),
            "shared_mlp.output_linear.weight": (roles["down"], LazyTensor(dtype, down.shape, shared_output)),
            f"{mixture}.router.layer.weight": (
                roles["gate"],
                LazyTensor(dtype, router.shape, lambda: router.load().to(dtype)),
            ),
            f"{mixture}.input_linear.weight": (
                roles["gate"],
                LazyTensor(dtype, (experts, 2 * width, hidden), expert_input),
            ),
            f"{mixture}.output_linear.weight": (
                roles["down"],
                LazyTensor(dtype, (experts, hidden, width), expert_output),
            ),
        }

    def _with_shared_expert(self, name: str, role: str, layer: int) -> LazyTensor:
        weight = self._same(name)
        if not self.adapter.metadata.config.shared_expert_density:
            return weight

        def load() -> Tensor:
            neurons, delta = self.block(layer).shared_expert
            return merged_weight(weight.load(), role, neurons, delta, "neuron", self.rounding)

        return LazyTensor(weight.dtype, weight.shape, load)

    def _neurons(self, weight: Tensor, role: str, layer: int, expert: int) -> Tensor:
        """The union's rows of a matrix (for down: columns) with the expert's delta, in the matrix's dtype."""
        block = self.block(layer)
        axis = 1 if role == "down" else 0
        part = weight.index_select(axis, block.union)
        support = torch.searchsorted(block.union, block.experts[expert].long())
        return merged_weight(part, role, support, block.deltas[:, expert], "neuron", self.rounding)


def _filled(tensor: LazyTensor, size: int, *, axis: int) -> LazyTensor:
    """The tensor with zeros after the last row or column, up to `size`."""
    missing = size - tensor.shape[axis]
    if not missing:
        return tensor
    shape = list(tensor.shape)
    shape[axis] = size
    behind = [0, missing] if axis == len(shape) - 1 else [0, 0, 0, missing]
    return LazyTensor(tensor.dtype, tuple(shape), lambda: F.pad(tensor.load(), behind))
