"""A base with experts: attach, run, save, load."""

from __future__ import annotations

import dataclasses
import json
import math
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils import ModelOutput

from srde_ds.config import AdapterConfig
from srde_ds.config_values import checked
from srde_ds.errors import SRDEError, nearest
from srde_ds.model.base import FeedForward, Gather, base_identity, find_feed_forward, load_base, no_gather
from srde_ds.model.deltas import build_deltas
from srde_ds.model.layer import SRDEFeedForward
from srde_ds.model.router import Router, RoutingContext, RoutingStatistics
from srde_ds.model.supports import kept_size, select_support, support_hash, support_shape, support_size

if TYPE_CHECKING:
    from srde_ds.model.deltas import Trainable

FORMAT_VERSION = 1
METADATA_KEY = "srde"


@dataclass
class AdapterMetadata:
    """What `srde_weights.safetensors` says about itself, as JSON under the header's key "srde"."""

    config: AdapterConfig
    expert_names: list[str]
    base: dict[str, str | int]
    model_name: str
    support_hash: str
    format_version: int = FORMAT_VERSION

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> AdapterMetadata:
        """Raises SRDEError for a newer format, a missing key or a bad adapter config."""
        if values.get("format_version") != FORMAT_VERSION:
            raise SRDEError(
                f"weights: format_version={values.get('format_version')!r}, this program reads {FORMAT_VERSION}; "
                "use the srde_ds that wrote them."
            )
        missing = {f.name for f in dataclasses.fields(cls)} - set(values)
        if missing:
            raise SRDEError(f"weights: the metadata lack '{min(missing)}'; export the weights again.")
        config, known = AdapterConfig(), {f.name for f in dataclasses.fields(AdapterConfig)}
        for key, value in values["config"].items():
            if key not in known:
                raise SRDEError(f"weights: unknown adapter option '{key}' in the metadata.{nearest(key, known)}")
            setattr(config, key, checked(config, key, value))
        return cls(**(values | {"config": config}))


@dataclass
class SRDEOutput(ModelOutput):
    """Of a forward with labels: loss_sum (fp32 scalar, summed over labels) and label_count (int64 scalar).
    Without: the base's logits and cache."""

    loss_sum: Tensor | None = None
    label_count: Tensor | None = None
    logits: Tensor | None = None
    past_key_values: Any = None


class SRDEModel(nn.Module):
    """A frozen base whose feed-forward blocks carry routed experts. Built by `add_experts` or `load_adapter`.

    Attributes:
        routing: the context that all layers read, see `router.RoutingContext`.
        base_identity: `base.base_identity` of the base before the experts were added.
    """

    def __init__(
        self,
        base: PreTrainedModel,
        config: AdapterConfig,
        expert_names: list[str],
        routing: RoutingContext,
        identity: dict[str, str | int],
    ) -> None:
        super().__init__()
        self.base = base
        self.config = config
        self.expert_names = expert_names
        self.routing = routing
        self.base_identity = identity

    @property
    def layers(self) -> list[SRDEFeedForward]:
        """Top to bottom, as the tokens pass them."""
        return sorted((m for m in self.base.modules() if isinstance(m, SRDEFeedForward)), key=lambda m: m.layer)

    def forward(
        self,
        input_ids: Tensor,
        *,
        position_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        token_mask: Tensor | None = None,
        **kwargs: Any,
    ) -> SRDEOutput:
        """Run the base with its experts.

        Args:
            input_ids: `[B, S]`.
            position_ids: `[B, S]`; restarting positions separate documents when attention_mask is None.
            labels: `[B, S]`, -100 where there is no label; label s is predicted from position s - 1.
            token_mask: `[B, S]` bool, True for real tokens; default: the last S columns of attention_mask, else all.
            kwargs: for the base's forward.

        Raises:
            SRDEError: every expert is locked.
        """
        allowed = self.routing.allowed_experts
        if allowed is not None and not bool(allowed.any()):
            raise SRDEError("allowed_experts: all experts are locked; allow at least one.")
        if token_mask is None and attention_mask is not None:
            token_mask = attention_mask[:, -input_ids.shape[1] :].bool()
        self.routing.token_mask = token_mask
        # A cache switches off the separation of packed documents.
        kwargs.setdefault("use_cache", False)
        inputs = {"input_ids": input_ids, "position_ids": position_ids, "attention_mask": attention_mask} | kwargs
        if labels is None:
            output = self.base(**inputs)
            return SRDEOutput(logits=output.logits, past_key_values=output.past_key_values)
        targets = F.pad(labels[:, 1:], (0, 1), value=-100)
        labelled = (targets != -100).any(0).nonzero().squeeze(1)
        if labelled.numel() == 0:  # the loss is 0, with a graph, so that every rank runs the same backward
            labelled = targets.new_zeros(1)
        logits = self.base(**inputs, logits_to_keep=labelled).logits
        targets = targets.index_select(1, labelled).flatten()
        loss_sum = F.cross_entropy(logits.flatten(0, 1).float(), targets, ignore_index=-100, reduction="sum")
        return SRDEOutput(loss_sum=loss_sum, label_count=(targets != -100).sum())

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """The base's `generate`, with experts."""
        self.routing.token_mask = None
        return self.base.generate(*args, **kwargs)

    def enable_gradient_checkpointing(self, *, use_reentrant: bool = False) -> None:
        """Recompute each decoder layer's activations in the backward (in train mode)."""
        self.base.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": use_reentrant})
        if use_reentrant:  # it needs an input with a gradient, and the embedding is frozen
            self.base.enable_input_require_grads()

    @contextmanager
    def no_experts(self) -> Iterator[None]:
        """Inside, the output is the bare base's, bit for bit."""
        before, self.routing.active = self.routing.active, False
        try:
            yield
        finally:
            self.routing.active = before

    def trainable_parameters(self) -> Iterator[tuple[str, Trainable]]:
        """Stable name (`layers.{i}.deltas.free`, ...) and parameter, layer by layer."""
        for number, layer in enumerate(self.layers):
            for child in ("deltas", "router"):
                for name, parameter in getattr(layer, child).named_parameters():
                    yield f"layers.{number}.{child}.{name}", cast("Trainable", parameter)

    def adapter_tensors(self) -> dict[str, Tensor]:
        """All that makes the adapter by stable name, without padding rows; parameters must be whole here."""
        return {name: p.detach()[: p.srde_rows] for name, p in self.trainable_parameters()} | self.common_tensors()

    def common_tensors(self) -> dict[str, Tensor]:
        """What is whole on every rank: supports, and copies of the routers' selection biases that are not zero."""
        supports = {f"layers.{number}.support": layer.support for number, layer in enumerate(self.layers)}
        biases = {f"layers.{number}.router_bias": m.router.selection_bias for number, m in enumerate(self.layers)}
        return supports | {name: bias.clone() for name, bias in biases.items() if bool(bias.any())}

    def load_selection_biases(self, tensors: dict[str, Tensor]) -> None:
        """Take each `layers.{i}.router_bias` out of `tensors`; a router without one gets zeros."""
        for number, layer in enumerate(self.layers):
            layer.router.load_selection_bias(tensors.pop(f"layers.{number}.router_bias", None))

    def metadata(self) -> AdapterMetadata:
        supports = [layer.support for layer in self.layers]
        return AdapterMetadata(
            config=self.config,
            expert_names=self.expert_names,
            base=self.base_identity,
            model_name=str(self.base_identity["name"]),
            support_hash=support_hash(supports),
        )

    def delta_norms(self, *, gather: Gather = no_gather) -> Tensor:
        """`[E]` fp32: norm of each expert's effective delta over all layers."""
        squares = []
        for layer in self.layers:
            with gather(list(layer.deltas.parameters())):
                squares.append(layer.delta_square_norms())
        return torch.stack(squares).sum(0).sqrt()


def add_experts(
    base: PreTrainedModel,
    config: AdapterConfig,
    *,
    expert_names: list[str],
    seed: int,
    dtype: torch.dtype | None = None,
    supports: Sequence[Tensor] | None = None,
    target_density: float | None = None,
    row_multiple: int = 1,
    gather: Gather = no_gather,
) -> SRDEModel:
    """Replace the base's feed-forward blocks, in place, by blocks with experts whose deltas are zero.

    Args:
        dtype: of all trainables; default: the base's.
        supports: of all layers, top to bottom; default: chosen as the config says.
        target_density: the supports, of the config's density, hold the candidates of a support that is being learned;
            so many of them are kept. None: the supports are fixed.
        row_multiple: see `deltas.build_deltas`.
        gather: context in which the given parameters of one layer are readable (ZeRO-3).

    Raises:
        SRDEError: names do not fit the config, the base has no fitting blocks or carries experts already, no
            support can be chosen, or those given do not fit.
    """

    def choose(layer: int, block: FeedForward) -> Tensor:
        if supports is not None:
            given = supports[layer] if layer < len(supports) else torch.empty(0)
            shape = support_shape(config, block.hidden, block.intermediate)
            if tuple(given.shape) != shape:
                raise SRDEError(
                    f"support of layer {layer}: shape {list(given.shape)} is stored, this base and these options "
                    f"need {list(shape)}. Use the base and the adapter options that the supports were chosen with."
                )
            return given
        weights = block.weights()
        with gather(list(weights)):  # type: ignore[arg-type]
            shapes = [(block.intermediate, block.hidden)] * 2 + [(block.hidden, block.intermediate)]
            if config.support_strategy != "random" and [tuple(w.shape) for w in weights] != shapes:
                raise SRDEError(
                    f"support_strategy={config.support_strategy}: layer {layer} of the base has no plain weights of "
                    f"shapes {shapes} (quantised?); use support_strategy=random."
                )
            return select_support(
                config, weights, hidden=block.hidden, intermediate=block.intermediate, seed=seed, layer=layer
            )

    return _attach(
        base,
        config,
        expert_names,
        choose,
        seed=seed,
        dtype=dtype,
        row_multiple=row_multiple,
        gather=gather,
        target_density=target_density,
    )


def _attach(
    base: PreTrainedModel,
    config: AdapterConfig,
    expert_names: list[str],
    choose_support: Callable[[int, FeedForward], Tensor],
    *,
    seed: int,
    dtype: torch.dtype | None,
    row_multiple: int,
    gather: Gather,
    target_density: float | None = None,
) -> SRDEModel:
    if len(expert_names) != config.num_experts:
        raise SRDEError(
            f"num_experts={config.num_experts}, but {len(expert_names)} expert names ({', '.join(expert_names)}); "
            "give one name an expert."
        )
    if config.top_k > config.num_experts:
        raise SRDEError(f"top_k={config.top_k}: must not exceed num_experts={config.num_experts}.")
    blocks = find_feed_forward(base, gather=gather)
    identity = base_identity(base, gather=gather)
    routing = RoutingContext(RoutingStatistics(len(blocks), config.num_experts))
    base.requires_grad_(False)
    dtype = dtype or base.dtype
    for number, block in enumerate(blocks):
        support = choose_support(number, block)
        device = block.weights()[0].device
        deltas = build_deltas(
            config,
            hidden=block.hidden,
            size=support_size(config, block.hidden, block.intermediate),
            seed=seed,
            layer=number,
            dtype=dtype,
            device=device,
            row_multiple=row_multiple,
            keep=kept_size(config, target_density, block.hidden, block.intermediate),
        )
        router = Router(
            block.hidden, config.num_experts, config.top_k, seed=seed, layer=number, dtype=dtype, device=device
        )
        layer = SRDEFeedForward(
            block, deltas, router, support.to(device), granularity=config.granularity, layer=number, context=routing
        )
        setattr(block.owner, block.name, layer.train(base.training))
    return SRDEModel(base, config, list(expert_names), routing, identity).train(base.training)


def save_weights(path: str | Path, tensors: dict[str, Tensor], metadata: AdapterMetadata) -> None:
    """Write the adapter as one safetensors file; a crash leaves either the old file or the new one."""
    path = Path(path)
    temporary = path.with_name(path.name + ".tmp")
    whole = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    save_file(whole, temporary, metadata={METADATA_KEY: json.dumps(metadata.to_dict())})
    with open(temporary, "rb+") as file:
        os.fsync(file.fileno())
    os.replace(temporary, path)


def read_metadata(path: str | Path) -> AdapterMetadata:
    """The metadata of a weights file.

    Raises:
        SRDEError: no such file, not a safetensors file, or not one of ours.
    """
    with _open_weights(path) as file:
        header = file.metadata() or {}
    if METADATA_KEY not in header:
        raise SRDEError(
            f"weights '{path}': a safetensors file without SRDE metadata; give an srde_weights.safetensors."
        )
    return AdapterMetadata.from_dict(json.loads(header[METADATA_KEY]))


def _open_weights(path: str | Path) -> Any:
    if not Path(path).is_file():
        raise SRDEError(f"weights '{path}': no such file; give the path of an srde_weights.safetensors.")
    try:
        return safe_open(str(path), framework="pt")
    except SafetensorError as error:
        raise SRDEError(f"weights '{path}': not a readable safetensors file ({error}); export it again.") from None


def load_adapter(
    weights: str | Path,
    *,
    base: str | PreTrainedModel | None = None,
    dtype: torch.dtype = torch.float32,
    attn_implementation: str = "sdpa",
) -> SRDEModel:
    """A base with the experts of a weights file.

    Args:
        base: a fresh model, or the id or folder to load it from; default: the one named in the file.
        dtype: of the experts, and of the base if it is loaded here.

    Raises:
        SRDEError: another base than the experts were trained on; missing, unknown, misshapen or NaN tensors.
    """
    metadata = read_metadata(weights)
    with _open_weights(weights) as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
    if base is None or isinstance(base, str):
        base = load_base(base or metadata.model_name, dtype=dtype, attn_implementation=attn_implementation)
    identity = base_identity(base)
    if identity["hash"] != metadata.base["hash"]:
        raise SRDEError(
            f"weights '{weights}': trained on {_describe_base(metadata.base)}, but the base given is "
            f"{_describe_base(identity)}; give the base that they were trained on."
        )

    def stored_support(layer: int, block: FeedForward) -> Tensor:
        name = f"layers.{layer}.support"
        candidates = block.intermediate * (1 if metadata.config.granularity == "neuron" else 3 * block.hidden)
        support = _take(tensors, name, support_shape(metadata.config, block.hidden, block.intermediate), weights)
        if support.dtype != torch.int32 or support.min() < 0 or support.max() >= candidates:
            raise SRDEError(
                f"weights '{weights}': {name} must hold int32 indices below {candidates}; export them again."
            )
        return support

    model = _attach(
        base,
        metadata.config,
        metadata.expert_names,
        stored_support,
        seed=0,
        dtype=dtype,
        row_multiple=1,
        gather=no_gather,
    )
    for name, parameter in model.trainable_parameters():
        tensor = _take(tensors, name, parameter.srde_shape, weights)
        if not tensor.is_floating_point() or not bool(tensor.isfinite().all()):
            raise SRDEError(f"weights '{weights}': {name} holds values that are not finite; export them again.")
        with torch.no_grad():
            parameter.copy_(tensor)
    model.load_selection_biases(tensors)
    if tensors:
        raise SRDEError(f"weights '{weights}': unknown tensor {min(tensors)}; the file does not fit its own config.")
    if model.metadata().support_hash != metadata.support_hash:
        raise SRDEError(f"weights '{weights}': the supports do not match support_hash; the file is damaged.")
    return model


def _take(tensors: dict[str, Tensor], name: str, shape: Sequence[int], weights: str | Path) -> Tensor:
    """Remove and return one tensor, checked for presence and shape."""
    if name not in tensors:
        raise SRDEError(f"weights '{weights}': tensor {name} is missing; export them again.")
    tensor = tensors.pop(name)
    if tuple(tensor.shape) != tuple(shape):
        raise SRDEError(f"weights '{weights}': {name} has shape {list(tensor.shape)}, expected {list(shape)}.")
    return tensor


def _describe_base(identity: dict[str, str | int]) -> str:
    return f"{identity['name'] or 'an unnamed model'} ({identity['architecture']}, hash {str(identity['hash'])[:12]})"


def parameter_table(model: SRDEModel) -> str:
    """Kinds of tensors, how many, how many values, and their share of the base's weights."""
    rows: dict[str, list[int]] = {}
    for _, parameter in model.trainable_parameters():
        row = rows.setdefault(parameter.srde_kind, [0, 0])
        row[0] += 1
        row[1] += math.prod(parameter.srde_shape)
    trainable = [sum(column) for column in zip(*rows.values(), strict=True)]
    frozen = [p for p in model.base.parameters() if not hasattr(p, "srde_kind")]
    base_values = sum(int(getattr(p, "ds_numel", p.numel())) for p in frozen)
    rows |= {"trainable": trainable, "frozen base": [len(frozen), base_values]}
    lines = [f"{'kind':<12} {'tensors':>8} {'values':>15} {'of base':>9}"]
    lines += [f"{kind:<12} {n:>8} {values:>15,} {values / base_values:>9.3%}" for kind, (n, values) in rows.items()]
    return "\n".join(lines)
