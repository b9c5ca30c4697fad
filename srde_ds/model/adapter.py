"""A base with experts: attach, run, save, load."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils import ModelOutput

from srde_ds.config import AdapterConfig
from srde_ds.errors import SRDEError
from srde_ds.hub.card import is_run
from srde_ds.hub.sharing import find_adapter, push_adapter, save_adapter
from srde_ds.model.attach import SupportChooser, attach_experts, support_chooser
from srde_ds.model.base import FeedForward, Gather, load_base, no_gather
from srde_ds.model.base_files import check_base
from srde_ds.model.layer import SRDEFeedForward
from srde_ds.model.merging import merge_into_base
from srde_ds.model.router import RoutingContext
from srde_ds.model.supports.selection import support_hash, support_shape
from srde_ds.utils.pretrained import base_to_load
from srde_ds.weights.file import AdapterMetadata, expert_index, open_weights, read_metadata

if TYPE_CHECKING:
    from srde_ds.model.deltas import Trainable


@dataclass
class SRDEOutput(ModelOutput):
    """Of a forward with labels: loss_sum (fp32 scalar, summed over labels) and label_count (int64 scalar).
    Without: the base's logits and cache."""

    loss_sum: Tensor | None = None
    label_count: Tensor | None = None
    logits: Tensor | None = None
    past_key_values: Any = None


class SRDEModel(nn.Module):
    """A frozen base whose feed-forward blocks carry routed experts. Built by `from_pretrained` or `add_experts`.

    Attributes:
        base: the transformers model, with the experts in it: what expects a model of transformers, such as
            `transformers.pipeline`, takes this.
        routing: the context that all layers read, see `router.RoutingContext`.
        base_identity: `base.base_identity` of the base before the experts were added.
        run_folder: of the training run that the weights were loaded from; None: of no run.
    """

    run_folder: Path | None = None

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

    @classmethod
    def from_pretrained(
        cls,
        base: str | Path | PreTrainedModel | None,
        adapter: str | Path,
        *,
        dtype: torch.dtype = torch.float32,
        attn_implementation: str = "sdpa",
        revision: str | None = None,
        allow_download: bool = False,
    ) -> SRDEModel:
        """A base with trained experts, in eval mode.

        Args:
            base: its id or folder, or a fresh model, which may be quantised; None: the one named in the weights.
            adapter: a weights file, a folder of `save_pretrained` or of a finished run, or a repository of the Hub.
            dtype: of the experts, and of the base if it is loaded here.
            revision: of the repository.
            allow_download: without `base`: the one named in the weights may be fetched from the Hub.

        Raises:
            SRDEError: no such adapter or base, or the experts were trained on another base.
        """
        weights = find_adapter(adapter, revision=revision)
        return load_adapter(
            weights, base=base, dtype=dtype, attn_implementation=attn_implementation, allow_download=allow_download
        )

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

    @property
    def active_experts(self) -> list[str]:
        """Names of the experts that tokens may be routed to."""
        allowed = self.routing.allowed_experts
        used = [True] * len(self.expert_names) if allowed is None else allowed.tolist()
        return [name for name, use in zip(self.expert_names, used, strict=True) if use]

    def set_active_experts(self, names: Sequence[str] | None) -> None:
        """Route tokens to these experts alone, until further notice; None: to all.

        A token's weights are the softmax over those of its `top_k` that are active; with fewer active experts than
        top_k, each token uses all of them. `no_experts` gives the bare base.

        Raises:
            SRDEError: an unknown name, or no name.
        """
        if names is None:
            self.routing.allowed_experts = None
            return
        chosen = [expert_index(self.expert_names, name) for name in ([names] if isinstance(names, str) else names)]
        if not chosen:
            raise SRDEError("set_active_experts([]): give at least one expert; `with model.no_experts():` uses none.")
        allowed = torch.zeros(len(self.expert_names), dtype=torch.bool)
        allowed[chosen] = True
        self.routing.allowed_experts = allowed

    def merge_and_unload(self, expert: str | None = None) -> PreTrainedModel:
        """The base with one expert's deltas added to its own weights, in place: an ordinary transformers model.

        It gives what this model gives with all tokens routed to that expert. This model is of no use afterwards.

        Args:
            expert: its name; may be left out where there is only one.

        Raises:
            SRDEError: an unknown name, none where there are several, or a quantised base.
        """
        if expert is None and len(self.expert_names) > 1:
            raise SRDEError(f"merge_and_unload(): name one of the experts {', '.join(self.expert_names)}.")
        merge_into_base(self.base, 0 if expert is None else expert_index(self.expert_names, expert))
        return self.base

    def save_pretrained(self, folder: str | Path, *, run: str | Path | None = None) -> Path:
        """Write the adapter and its model card into a folder that `from_pretrained` reads; returns the weights' path.

        Args:
            run: folder of the training run, which the card tells of; default: `run_folder`.

        Raises:
            SRDEError: `run` is no run's folder.
        """
        run = self.run_folder if run is None else Path(run)
        return save_adapter(Path(folder), self.adapter_tensors(), self.metadata(), run=run)

    def push_to_hub(self, repo: str, *, private: bool = True, run: str | Path | None = None) -> str:
        """Upload the adapter and its model card to the Hub; returns the repository's address.

        The token is the environment variable HF_TOKEN or that of `hf auth login`.

        Args:
            run: as in `save_pretrained`.

        Raises:
            SRDEError: no token, a bad name, no such run, or the Hub refuses or cannot be reached.
        """
        run = self.run_folder if run is None else Path(run)
        return push_adapter(repo, self.adapter_tensors(), self.metadata(), run=run, private=private)

    def trainable_parameters(self) -> Iterator[tuple[str, Trainable]]:
        """Stable name (`layers.{i}.deltas.free`, ...) and parameter, layer by layer."""
        for number, layer in enumerate(self.layers):
            for child in ("deltas", "router"):
                for name, parameter in getattr(layer, child).named_parameters():
                    yield f"layers.{number}.{child}.{name}", cast("Trainable", parameter)

    def adapter_tensors(self) -> dict[str, Tensor]:
        """All that makes the adapter by stable name, without padding rows; parameters must be whole here.

        Raises SRDEError after `merge_and_unload`."""
        if not self.layers:
            raise SRDEError("merge_and_unload took the experts out of this model: load the adapter again.")
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

    return _with_experts(
        base,
        config,
        expert_names,
        support_chooser(config, supports, seed=seed, gather=gather),
        seed=seed,
        dtype=dtype,
        row_multiple=row_multiple,
        gather=gather,
        target_density=target_density,
    )


def _with_experts(
    base: PreTrainedModel, config: AdapterConfig, expert_names: list[str], choose: SupportChooser, **options: Any
) -> SRDEModel:
    routing, identity = attach_experts(base, config, expert_names, choose, **options)
    return SRDEModel(base, config, list(expert_names), routing, identity).train(base.training)


def load_adapter(
    weights: str | Path,
    *,
    base: str | Path | PreTrainedModel | None = None,
    dtype: torch.dtype = torch.float32,
    attn_implementation: str = "sdpa",
    allow_download: bool = False,
) -> SRDEModel:
    """A base with the experts of a weights file.

    Args:
        base: a fresh model, or the id or folder to load it from; default: the one named in the file.
        dtype: of the experts, and of the base if it is loaded here.
        allow_download: without `base`: the one named in the file may be fetched from the Hub.

    Raises:
        SRDEError: another base than the experts were trained on; missing, unknown, misshapen or NaN tensors.
    """
    metadata = read_metadata(weights)
    with open_weights(weights) as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
    if base is None or isinstance(base, str | Path):
        name, local = base_to_load(base, metadata.model_name, allow_download=allow_download)
        base = load_base(name, dtype=dtype, attn_implementation=attn_implementation, local_files_only=local)
    identity = check_base(base, metadata.base, weights)

    def stored_support(layer: int, block: FeedForward) -> Tensor:
        name = f"layers.{layer}.support"
        candidates = block.intermediate * (1 if metadata.config.granularity == "neuron" else 3 * block.hidden)
        support = _take(tensors, name, support_shape(metadata.config, block.hidden, block.intermediate), weights)
        if support.dtype != torch.int32 or support.min() < 0 or support.max() >= candidates:
            raise SRDEError(
                f"weights '{weights}': {name} must hold int32 indices below {candidates}; export them again."
            )
        return support

    model = _with_experts(base, metadata.config, metadata.expert_names, stored_support, seed=0, dtype=dtype)
    model.base_identity = identity
    model.run_folder = Path(weights).parent if is_run(Path(weights).parent) else None
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
