"""Sizes of a base and of its trainables, from a configuration alone: what the cost model counts."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import astuple, dataclass, replace
from functools import cache, cached_property
from typing import Any

from torch import nn

from srde_ds.config import AdapterConfig, Config
from srde_ds.errors import SRDEError
from srde_ds.model.base import block_shapes, decoder_layers, empty_base
from srde_ds.model.deltas import AtomDeltas, empty_deltas
from srde_ds.model.supports.selection import check_support, support_size


@dataclass(frozen=True)
class LayerShape:
    """One decoder layer.

    Attributes:
        hidden, intermediate: D and F of its feed-forward block.
        attention: values of the parameters of each module of the attention.
        norms: values of each other parameter.
        heads, query, key_value: heads of the queries, their width, and that of the keys.
    """

    hidden: int
    intermediate: int
    attention: tuple[tuple[int, ...], ...] = ()
    norms: tuple[int, ...] = ()
    heads: int = 1
    query: int = 0
    key_value: int = 0

    @property
    def matrix(self) -> int:
        """Values of one of the block's three matrices."""
        return self.hidden * self.intermediate

    @property
    def parameters(self) -> tuple[int, ...]:
        return (*(n for module in self.attention for n in module), *self.norms, *[self.matrix] * 3)


@dataclass(frozen=True)
class BaseShape:
    """A base.

    Attributes:
        head: values of the output projection; 0 if it is the embedding's own weight.
        last: values of each parameter between the layers and the head (the final norm).
        unused: values of each parameter that text never passes (a vision tower).
    """

    layers: tuple[LayerShape, ...]
    embedding: int = 0
    head: int = 0
    last: tuple[int, ...] = ()
    unused: tuple[int, ...] = ()
    vocabulary: int = 0

    @property
    def blocks(self) -> tuple[tuple[int, int], ...]:
        """(D, F) of each layer's feed-forward block."""
        return tuple((layer.hidden, layer.intermediate) for layer in self.layers)

    @cached_property
    def parameters(self) -> int:
        layers = sum(sum(layer.parameters) for layer in self.layers)
        return layers + self.embedding + self.head + sum(self.last + self.unused)


def base_shape(config: Config) -> BaseShape:
    """Build the base without storage, check that the run can be had with it, and measure it.

    Raises:
        SRDEError: no `model_name`, no base there, no gated feed-forward blocks in it, no room for the supports, or
            rows longer than its positions.
    """
    if not config.model.model_name:
        raise SRDEError("model_name is missing: give a Hugging Face id or a local folder (--model_name).")
    base = empty_base(str(config.model.model_name), revision=config.model.model_revision)
    blocks = block_shapes(base)
    largest = replace(config.adapter, density=config.curriculum.initial_density or config.adapter.density)
    for hidden, intermediate in set(blocks):
        check_support(largest, hidden, intermediate)
    text = base.config.get_text_config()
    positions = getattr(text, "max_position_embeddings", None)
    if positions is not None and config.data.max_length > positions:
        raise SRDEError(
            f"max_length={config.data.max_length}: the base knows {positions} positions (max_position_embeddings). "
            f"Give --max_length {positions} or less."
        )
    heads = text.num_attention_heads
    key_value_heads = getattr(text, "num_key_value_heads", None) or heads
    size = getattr(text, "head_dim", None) or text.hidden_size // heads
    layers = []
    for module, (hidden, intermediate) in zip(decoder_layers(base), blocks, strict=True):
        attention = [own for _, child in module.named_children() for own in _attention(child)]
        norms = [p.numel() for p in module.parameters()]
        for values in [hidden * intermediate] * 3 + [n for own in attention for n in own]:
            norms.remove(values)
        sizes = heads, heads * size, key_value_heads * size
        layers.append(LayerShape(hidden, intermediate, tuple(attention), tuple(norms), *sizes))
    embedding, head = base.get_input_embeddings().weight, base.get_output_embeddings().weight
    known = {id(embedding), id(head)} | {id(p) for p in decoder_layers(base).parameters()}
    last = {id(p): p.numel() for p in base.get_decoder().parameters() if id(p) not in known}
    unused = [p.numel() for p in base.parameters() if id(p) not in known | last.keys()]
    return BaseShape(
        layers=tuple(layers),
        embedding=embedding.numel(),
        head=0 if head is embedding else head.numel(),
        last=tuple(last.values()),
        unused=tuple(unused),
        vocabulary=head.shape[0],
    )


def _attention(child: nn.Module) -> list[tuple[int, ...]]:
    """Values of the parameters of each module inside a decoder layer's attention; of another child nothing."""
    linear = [m for m in child.modules() if isinstance(m, nn.Linear)]
    if child in linear or len(linear) < 4:  # a norm, or the feed-forward block with its three
        return []
    own = [tuple(p.numel() for p in module.parameters(recurse=False)) for module in child.modules()]
    return [values for values in own if values]


@dataclass(frozen=True)
class TrainableShape:
    """A trainable of one layer as a process sees it when it is gathered, padding included.

    Attributes:
        kind: the end of its name ("deltas.free", ..., "router.weight").
        shape: of what ZeRO cuts: the whole tensor, the experts that the process holds, or its own rows.
        ranks: processes over which ZeRO cuts it; 1: no other process has any of it.
        stride: distance between their numbers.
    """

    kind: str
    shape: tuple[int, ...]
    ranks: int
    stride: int = 1

    @property
    def values(self) -> int:
        return math.prod(self.shape)


def slots(config: Config) -> int:
    """Experts that a process holds, padding included."""
    return math.ceil(config.adapter.num_experts / config.parallel.expert_parallel_size)


def exchanges_rows(config: Config, world_size: int) -> bool:
    """Whether each process mixes its own rows of atoms, as `expert_parallel.cut_rows` has it."""
    return config.adapter.num_atoms > 0 and config.parallel.owner_computes and world_size > 1


def layer_trainables(config: Config, layer: LayerShape, world_size: int) -> list[TrainableShape]:
    """The trainables of one layer, without the scores of a support that is being learned: few values."""
    adapter, size = config.adapter, config.parallel.expert_parallel_size
    by_rows = exchanges_rows(config, world_size)
    result = []
    for name, whole, expert_axis, row_axis in _bank_shape(astuple(adapter), layer, world_size):
        shape, ranks, stride = list(whole), world_size, 1
        if by_rows and row_axis is not None:
            shape[row_axis] = math.ceil(shape[row_axis] / world_size)
            ranks = 1
        elif expert_axis is not None and not by_rows and size > 1:
            shape[expert_axis] = shape[expert_axis] // adapter.num_experts * slots(config)
            ranks, stride = world_size // size, size
        result.append(TrainableShape(name, tuple(shape), ranks, stride))
    result.append(TrainableShape("router.weight", (adapter.num_experts, layer.hidden), world_size))
    return result


@cache
def _bank_shape(
    adapter: tuple[Any, ...], layer: LayerShape, world_size: int
) -> list[tuple[str, tuple[int, ...], int | None, int | None]]:
    """Name, shape, axis of the experts and axis of the atoms' rows of each parameter of a layer's deltas."""
    config = AdapterConfig(*adapter)
    size = support_size(config, layer.hidden, layer.intermediate)
    bank = empty_deltas(config, hidden=layer.hidden, size=size, pad_to=world_size)
    long_axis = bank.long_axis if isinstance(bank, AtomDeltas) else {}
    named: list[tuple[str, Any]] = list(bank.named_parameters())
    return [(f"deltas.{name}", tuple(p.shape), p.srde_expert_axis, long_axis.get(p.srde_kind)) for name, p in named]


def trainable_values(adapter: AdapterConfig, shape: BaseShape) -> dict[str, int]:
    """Values of each trainable by the end of its name, over all layers, without padding."""
    values: Counter[str] = Counter()
    for layer, count in Counter(shape.layers).items():
        for trainable in layer_trainables(Config(adapter=adapter), layer, world_size=1):
            values[trainable.kind] += trainable.values * count
    return dict(values)
