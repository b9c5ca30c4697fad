"""Finds the gated feed-forward blocks of a base, by structure."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from srde_ds.errors import SRDEError
from srde_ds.model.base import Gather, decoder_layers, no_gather, refuse_experts, whole_shape
from srde_ds.model.quantization import dense_weight, keep_differentiable

ROLES = ("gate", "up", "down")


@dataclass
class FeedForward:
    """A gated block: down(act(gate(x)) * up(x)).

    Attributes:
        block: the module, attribute `name` of the module `owner`.
        roles: "gate", "up", "down", "act" -> attribute of `block`.
        hidden, intermediate: D and F.
    """

    block: nn.Module
    owner: nn.Module
    name: str
    roles: dict[str, str]
    hidden: int
    intermediate: int

    def weights(self) -> tuple[Tensor, Tensor, Tensor]:
        """Gate `[F, D]`, up `[F, D]`, down `[D, F]`; empty if a projection has no matrix, see `dense_weight`."""
        found = [dense_weight(getattr(self.block, self.roles[role])) for role in ROLES]
        gate, up, down = (torch.empty(0, device=self.device) if weight is None else weight for weight in found)
        return gate, up, down

    @property
    def device(self) -> torch.device:
        """Where the block computes."""
        return _device(self.block)


def find_feed_forward(base: PreTrainedModel, *, gather: Gather = no_gather) -> list[FeedForward]:
    """The gated feed-forward block of every decoder layer, in order, found by structure.

    A block is a child of a decoder layer that has exactly three linear-like children, two D -> F and one F -> D,
    and an activation. `verify_block` finds out which of them is gate and which is up.

    Raises:
        SRDEError: a layer has no such block or several, a block computes something else, or is not in memory.
    """
    refuse_experts(base)
    _refuse_offloaded(base)
    keep_differentiable(base)
    return [_feed_forward(layer, number, base, gather) for number, layer in enumerate(decoder_layers(base))]


def _refuse_offloaded(base: PreTrainedModel) -> None:
    places = getattr(base, "hf_device_map", {})
    offloaded = [name for name, parameter in base.named_parameters() if parameter.is_meta] if places else []
    away = sorted(
        {str(places[key]) for key in places if any(not key or f"{name}.".startswith(f"{key}.") for name in offloaded)}
    )
    if away:
        raise SRDEError(
            f"device_map: parts of the base are on {' and '.join(away)}, from where they are fetched for each forward. "
            "Experts need its weights in memory: load it whole, in 8 or 4 bits, or spread over more GPUs."
        )


def block_shapes(base: PreTrainedModel) -> list[tuple[int, int]]:
    """(D, F) of every decoder layer's block, in order. Reads no weights.

    Raises:
        SRDEError: a layer has no gated block or several.
    """
    shapes = []
    for number, layer in enumerate(decoder_layers(base)):
        _, block, hidden = block_of_layer(layer, number, base)
        linear = [shape for child in block.children() if (shape := _linear_shape(child))]
        shapes.append((hidden, next((out for out, width in linear if width == hidden and out != hidden), hidden)))
    return shapes


def block_of_layer(layer: nn.Module, number: int, base: PreTrainedModel) -> tuple[str, nn.Module, int]:
    """Name, module and D of decoder layer `number`'s gated block. Reads no weights; errors as in `block_shapes`."""
    hidden = base.config.get_text_config().hidden_size
    found = [(name, child) for name, child in layer.named_children() if _is_gated(child, hidden)]
    if len(found) != 1:
        seen = "; ".join(f"{name} {_describe(child)}" for name, child in layer.named_children())
        raise SRDEError(
            f"base {type(base).__name__}, layer {number} ({type(layer).__name__}): expected one feed-forward block of "
            f"three linear maps ({hidden} -> F twice, F -> {hidden}) and an activation, found {len(found)} in: {seen}. "
            "Fused gate/up projections, mixtures of experts and blocks without a gate are not supported."
        )
    return (*found[0], hidden)


def _feed_forward(layer: nn.Module, number: int, base: PreTrainedModel, gather: Gather) -> FeedForward:
    name, block, hidden = block_of_layer(layer, number, base)
    with gather(list(block.parameters())):
        roles = verify_block(
            block, hidden, dtype=base.dtype, where=f"base {type(base).__name__}, layer {number}, {name}"
        )
    intermediate = _linear_shape(getattr(block, roles["gate"]))
    assert intermediate is not None
    return FeedForward(block, layer, name, roles, hidden, intermediate[0])


def verify_block(
    block: nn.Module, hidden: int, *, dtype: torch.dtype, where: str = "block", original: nn.Module | None = None
) -> dict[str, str]:
    """The roles for which down(act(gate(x)) * up(x)) equals the block's own output bit for bit on random input.

    The order that the attributes' names suggest is tried first, then all others that the shapes allow. The weights
    must be whole here.

    Args:
        original: the block that `block` is a copy of, for the message.

    Raises:
        SRDEError: no order gives the block's output.
    """
    device = _device(block)
    x = torch.randn(1, 8, hidden, generator=torch.Generator().manual_seed(0)).to(device=device, dtype=dtype)
    with torch.no_grad():
        expected = block(x)
        for roles in _possible_roles(block, hidden):
            gate, up, down, act = (getattr(block, roles[role]) for role in (*ROLES, "act"))
            if torch.equal(down(act(gate(x)) * up(x)), expected):
                return roles
    raise SRDEError(
        f"{where}: {_describe(original or block)} looks like a gated feed-forward block but does not compute "
        "down(act(gate(x)) * up(x)); this base is not supported."
    )


def _possible_roles(block: nn.Module, hidden: int) -> Iterator[dict[str, str]]:
    shapes = {name: shape for name, child in block.named_children() if (shape := _linear_shape(child))}
    orders = [
        names
        for names in itertools.permutations(shapes)
        if shapes[names[0]][1] == shapes[names[1]][1] == shapes[names[2]][0] == hidden
    ]
    orders.sort(key=lambda names: sum(role not in name for role, name in zip(ROLES, names, strict=True)))
    for act, names in itertools.product(_activations(block), orders):
        yield dict(zip((*ROLES, "act"), (*names, act), strict=True))


def _is_gated(module: nn.Module, hidden: int) -> bool:
    shapes = [shape for child in module.children() if (shape := _linear_shape(child))]
    if len(shapes) != 3 or not _activations(module):
        return False
    intermediate = next((out for out, width in shapes if width == hidden and out != hidden), hidden)
    return sorted(shapes) == sorted([(intermediate, hidden), (intermediate, hidden), (hidden, intermediate)])


def _activations(module: nn.Module) -> list[str]:
    """Attributes that can be an activation: children that are not linear and have no parameters, or functions."""
    others = [(name, child) for name, child in module.named_children() if _linear_shape(child) is None]
    children = [name for name, child in others if not any(True for _ in child.parameters())]
    values = {name: value for name, value in vars(module).items() if not name.startswith("_") and name != "forward"}
    return children + [name for name, value in values.items() if callable(value) and not isinstance(value, type)]


def _device(block: nn.Module) -> torch.device:
    return next(itertools.chain(block.parameters(), block.buffers())).device


def _linear_shape(module: nn.Module) -> tuple[int, int] | None:
    """(out, in) of a linear-like module, even if it is quantised or ZeRO-3 holds its weight; else None."""
    width, out = getattr(module, "in_features", None), getattr(module, "out_features", None)
    if isinstance(width, int) and isinstance(out, int):
        return out, width
    weight = getattr(module, "weight", None)
    if isinstance(module, nn.Embedding) or not isinstance(weight, Tensor):
        return None
    shape = whole_shape(weight)
    return (shape[0], shape[1]) if len(shape) == 2 else None


def _describe(module: nn.Module) -> str:
    parts = []
    for name, child in module.named_children():
        shape = _linear_shape(child)
        parts.append(f"{name} {type(child).__name__}" + (f" {shape[1]} -> {shape[0]}" if shape else ""))
    return f"{type(module).__name__} ({', '.join(parts)})" if parts else type(module).__name__
