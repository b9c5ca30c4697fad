"""The sizes of a base, from its configuration alone, for checks and the cost model."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from typing import Any, cast

from torch import Tensor, nn

from srde_ds.config import Config, ModelConfig, ParallelConfig
from srde_ds.errors import SRDEError
from srde_ds.model.attention import DOCUMENT_ATTENTION, takes_documents
from srde_ds.model.base import STATE_LAYERS, base_configuration, decoder_layers, empty_base, layer_configurations
from srde_ds.model.feed_forward import block_of_layer, block_shapes
from srde_ds.model.head import has_plain_head
from srde_ds.model.quantization import PACKINGS, Packing, check_float8, packing_of
from srde_ds.model.supports.selection import check_support
from srde_ds.model.tiny_block import check_formulas


@dataclass(frozen=True)
class LayerShape:
    """One decoder layer.

    Attributes:
        hidden, intermediate: D and F of its feed-forward block.
        attention: number of values in the parameters of each module of the attention, or of what takes its place
            (linear attention, Mamba, a convolution).
        norms: number of values in each other parameter.
        heads, query, key_value: number of query heads, width of all queries, and width of all keys.
        documents: whether each packed document is attended to by itself, see `attention.py`.
        int8: whether its linear maps are in 8 bits; those of bitsandbytes keep their inputs for the backward.
        scores: whether tokens attend to each other.
    """

    hidden: int
    intermediate: int
    attention: tuple[tuple[int, ...], ...] = ()
    norms: tuple[int, ...] = ()
    heads: int = 1
    query: int = 0
    key_value: int = 0
    documents: bool = False
    int8: bool = False
    scores: bool = True

    @property
    def matrix(self) -> int:
        """Number of values in one of the block's three matrices."""
        return self.hidden * self.intermediate

    @property
    def parameters(self) -> tuple[int, ...]:
        """Number of values in each parameter."""
        return (*(n for module in self.attention for n in module), *self.norms, *[self.matrix] * 3)


@dataclass(frozen=True)
class BaseShape:
    """The whole base.

    Attributes:
        head: number of values in the output projection; 0 if it shares the embedding's weight.
        last: number of values in each parameter between the layers and the head (the final norm).
        unused: number of values in each parameter that text does not use (a vision tower).
        plain_head: whether the loss is computed without logits, see `head.py`.
        packing: how its linear maps are stored, apart from the head; None: as plain matrices.
        linear: (outputs, inputs) of each of these maps.
        context: number of positions that the base knows; None: no limit.
    """

    layers: tuple[LayerShape, ...]
    embedding: int = 0
    head: int = 0
    last: tuple[int, ...] = ()
    unused: tuple[int, ...] = ()
    vocabulary: int = 0
    plain_head: bool = True
    packing: Packing | None = None
    linear: tuple[tuple[int, int], ...] = ()
    context: int | None = None

    @property
    def blocks(self) -> tuple[tuple[int, int], ...]:
        """(D, F) of each layer's feed-forward block."""
        return tuple((layer.hidden, layer.intermediate) for layer in self.layers)

    @cached_property
    def parameters(self) -> int:
        """Number of values in all parameters."""
        layers = sum(sum(layer.parameters) for layer in self.layers)
        return layers + self.embedding + self.head + sum(self.last + self.unused)

    def stored_bytes(self, width: int) -> int:
        """Bytes of all parameters as a process holds them; `width`: those of a plain value."""
        if self.packing is None:
            return self.parameters * width
        packed = sum(self.packing.stored_bytes(*shape) for shape in self.linear)
        return packed + (self.parameters - sum(out * inside for out, inside in self.linear)) * width


def base_shape(config: Config) -> BaseShape:
    """The shape of a run's base, once it is clear that the base can serve the run.

    Raises:
        SRDEError: see `measure`; or the base has no room for the supports, rows are longer than its context, or it is
            to be in FP8 and cannot.
    """
    shape, length = measure(config.model), config.data.max_length
    check_float8(config.model, shape.packing, shape.linear)
    largest = replace(config.adapter, density=config.curriculum.initial_density or config.adapter.density)
    for hidden, intermediate in set(shape.blocks):
        check_support(largest, hidden, intermediate)
    if shape.context is not None and length > shape.context:
        raise SRDEError(
            f"max_length={length}: the base knows {shape.context} positions (max_position_embeddings). "
            f"Give --max_length {shape.context} or less."
        )
    return shape


def measure(model: ModelConfig, *, local_files_only: bool = False) -> BaseShape:
    """The shape of a base. With `local_files_only` nothing is downloaded.

    Raises:
        SRDEError: `model_name` is missing or names no base, or the base has no gated feed-forward blocks.
    """
    if not model.model_name:
        raise SRDEError("model_name is missing: give a Hugging Face id or a local folder (--model_name).")
    name, revision = str(model.model_name), model.model_revision
    configuration = base_configuration(name, revision=revision, local_files_only=local_files_only)
    return _measure(name, revision, model.base_quantization, configuration.to_json_string(), local_files_only)


@lru_cache(maxsize=1)
def _measure(
    name: str, revision: str | None, quantization: str, configuration: str, local_files_only: bool
) -> BaseShape:
    """Build the base without storage, and measure it.

    The cache is here because a run asks at several places: for the memory at hand, its checks, engines and prunings.

    Args:
        configuration: the base's config.json, which tells it from another one that takes its place in the folder.
    """
    base = empty_base(
        name, revision=revision, local_files_only=local_files_only, attn_implementation=DOCUMENT_ATTENTION
    )
    check_formulas(base)
    packing = packing_of(name, quantization, base.config)
    blocks, text = block_shapes(base), base.config.get_text_config()
    documents = takes_documents(base)
    kinds = getattr(text, "layer_types", None) or ["full_attention"] * len(blocks)
    layers = []
    each = zip(decoder_layers(base), layer_configurations(base.config), blocks, strict=True)
    for number, (module, own, (hidden, intermediate)) in enumerate(each):
        _, block, _ = block_of_layer(module, number, base)
        attention = [values for child in module.children() if child is not block for values in _projections(child)]
        norms = [p.numel() for p in module.parameters()]
        for values in [hidden * intermediate] * 3 + [n for projection in attention for n in projection]:
            norms.remove(values)
        sizes = *_head_widths(own), documents, packing == PACKINGS["int8"]
        scores = kinds[number] not in STATE_LAYERS or kinds[number].startswith("hybrid")
        layers.append(LayerShape(hidden, intermediate, tuple(attention), tuple(norms), *sizes, scores))
    embedding = cast("Tensor", base.get_input_embeddings().weight)
    head = cast("Tensor", base.get_output_embeddings().weight)
    linear = [m for m in base.modules() if type(m) is nn.Linear and m is not base.get_output_embeddings()]
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
        plain_head=has_plain_head(base),
        packing=packing,
        linear=tuple((module.out_features, module.in_features) for module in linear),
        context=getattr(text, "max_position_embeddings", None),
    )


def check_whole(parallel: ParallelConfig, shape: BaseShape, processes: int) -> None:
    """Raise an SRDEError if a quantised base would be divided among processes, which ZeRO cannot do."""
    if shape.packing is not None and parallel.base_placement == "sharded" and processes > 1:
        raise SRDEError(
            f"base_placement=sharded on {processes} processes: a quantised base cannot be "
            "sharded. Give --base_placement resident."
        )


def _head_widths(configuration: Any) -> tuple[int, int, int]:
    """Of a layer's attention: number of query heads, width of all queries, and width of all keys."""
    heads: int = configuration.num_attention_heads
    key_value_heads = getattr(configuration, "num_key_value_heads", None) or heads
    size = getattr(configuration, "head_dim", None) or configuration.hidden_size // heads
    return heads, heads * size, key_value_heads * size


def _projections(child: nn.Module) -> list[tuple[int, ...]]:
    """Number of values in each module of a layer's attention or mixer; empty for a child without linear maps."""
    if not any(isinstance(module, nn.Linear) for module in child.modules()):
        return []
    own = [tuple(p.numel() for p in module.parameters(recurse=False)) for module in child.modules()]
    return [values for values in own if values]
