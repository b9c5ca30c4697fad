"""A base with experts: attach, run, save, load."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from srde_ds.config import AdapterConfig
from srde_ds.errors import SRDEError
from srde_ds.hub.sharing import push_adapter, save_adapter
from srde_ds.model.adapter_source import AdapterSource, open_adapter
from srde_ds.model.attach import SupportChooser, attach_experts, support_chooser
from srde_ds.model.base import WHOLE, Gather, Sharding, enable_checkpointing, load_base, no_gather
from srde_ds.model.head import has_plain_head, loss_of_logits, loss_without_logits
from srde_ds.model.layer import SRDEFeedForward
from srde_ds.model.merging import merge_into_base
from srde_ds.model.output import SRDEOutput
from srde_ds.model.policy import (
    PolicyControl,
    RoutingPolicy,
    keep_policy_when_recomputing,
    refuse_foreign_checkpointing,
)
from srde_ds.model.prompt_routing import policy_of_generation
from srde_ds.model.targets import Targets
from srde_ds.utils.pretrained import base_to_load
from srde_ds.weights.file import AdapterMetadata, expert_index
from srde_ds.weights.origins import Origins
from srde_ds.weights.schema import NEURONS, support_hash

if TYPE_CHECKING:
    from srde_ds.model.deltas import Trainable


class SRDEModel(nn.Module):
    """A frozen base whose feed-forward blocks carry routed experts, made by `from_pretrained` or `add_experts`.

    Attributes:
        base: the transformers model with the experts in it. Hand this to whatever expects a model of transformers,
            such as `transformers.pipeline`.
        routing: gives the layers the policy of the current forward, see `policy.py`.
        base_identity: `base.base_identity` of the base before the experts were added.
        has_plain_head: whether the loss is computed without logits, see `head.py`.
        origins: how the weights were made, and their statistics of the domains.
        route_by: "token", or "prompt": `generate` uses one expert for each text, see `prompt_routing`.
        run_folder: folder of the training run that the weights come from; None: they come from elsewhere.

    Examples:
        >>> from srde_ds import SRDEModel
        >>> model = SRDEModel.from_pretrained("base", "trained")
        >>> model.expert_names
        ['red', 'green']
    """

    run_folder: Path | None = None

    def __init__(
        self,
        base: PreTrainedModel,
        config: AdapterConfig,
        expert_names: list[str],
        routing: PolicyControl,
        identity: dict[str, str | int],
    ) -> None:
        super().__init__()
        self.base = base
        self.config = config
        self.expert_names = expert_names
        self.routing = routing
        self.base_identity = identity
        self.has_plain_head = has_plain_head(base)
        self.origins = Origins()
        self._route_by: Literal["token", "prompt"] = "token"

    @property
    def route_by(self) -> Literal["token", "prompt"]:
        """How `generate` routes."""
        return self._route_by

    @route_by.setter
    def route_by(self, value: Literal["token", "prompt"]) -> None:
        if value not in ("token", "prompt"):
            raise SRDEError(f"route_by={value!r}: give 'token' or 'prompt'.")
        self._route_by = value

    @classmethod
    def from_pretrained(
        cls,
        base: str | Path | PreTrainedModel | None,
        adapter: str | Path | AdapterSource,
        *,
        dtype: torch.dtype = torch.float32,
        attn_implementation: str = "sdpa",
        revision: str | None = None,
        allow_download: bool = False,
    ) -> SRDEModel:
        """A base with trained experts, in eval mode.

        Args:
            base: its id or folder, or a fresh model, which may be quantised; None: the one named in the weights.
            adapter: whatever `load_adapter` takes as weights.
            dtype: dtype of the experts, and of the base if it is loaded here.
            attn_implementation: transformers' name of the attention, for a base that is loaded here.
            revision: branch, tag or commit of the repository.
            allow_download: without `base`, whether the one named in the weights may be downloaded from the Hub.

        Raises:
            SRDEError: see `load_adapter`.
        """
        return load_adapter(
            adapter,
            base=base,
            dtype=dtype,
            attn_implementation=attn_implementation,
            revision=revision,
            allow_download=allow_download,
        ).eval()

    @property
    def layers(self) -> list[SRDEFeedForward]:
        """The blocks with experts, first layer first."""
        return sorted((m for m in self.base.modules() if isinstance(m, SRDEFeedForward)), key=lambda m: m.layer)

    def forward(
        self,
        input_ids: Tensor,
        *,
        position_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        labels: Tensor | Targets | None = None,
        label_weights: Tensor | None = None,
        token_mask: Tensor | None = None,
        policy: RoutingPolicy | None = None,
        **kwargs: Any,
    ) -> SRDEOutput:
        """Run the base with its experts.

        Args:
            input_ids: `[B, S]`.
            position_ids: `[B, S]`; restarting positions separate documents when attention_mask is None.
            labels: `[B, S]`, -100 where there is no label; label s is predicted from position s - 1. A GPU need not
                wait for labels on the CPU or given as `Targets`.
            label_weights: `[B, S]`, how much each label counts in the sum of the loss; default: 1. `Targets` have their
                own.
            token_mask: `[B, S]` bool, True for real tokens; default: the policy's, else the last S columns of
                attention_mask, else all.
            policy: how this forward routes its tokens and what it records; default: all experts, or those of
                `set_active_experts` (inside `routing.running`, the policy given there).
            kwargs: further arguments of the base's forward.

        Raises:
            SRDEError: every expert is locked, or the base recomputes activations without the policy (use
                `enable_gradient_checkpointing`).
        """
        policy = self.routing.policy if policy is None else policy
        if token_mask is None:
            token_mask = policy.token_mask
        if token_mask is None and attention_mask is not None:
            token_mask = attention_mask[:, -input_ids.shape[1] :].bool()
        inputs = {"input_ids": input_ids, "position_ids": position_ids, "attention_mask": attention_mask} | kwargs
        targets = Targets.of(labels, label_weights) if isinstance(labels, Tensor) else labels
        with self.routing.running(replace(policy, token_mask=token_mask), input_ids.device):
            if self.training and torch.is_grad_enabled():
                refuse_foreign_checkpointing(self.base)
            return self._forward(inputs, None if targets is None else targets.to(input_ids.device))

    def _forward(self, inputs: dict[str, Any], targets: Targets | None) -> SRDEOutput:
        # With a cache, packed documents would not be kept apart.
        inputs.setdefault("use_cache", False)
        if targets is None:
            output = self.base(**inputs)
            return SRDEOutput(logits=output.logits, past_key_values=output.past_key_values)
        loss = loss_without_logits if self.has_plain_head else loss_of_logits
        return SRDEOutput(loss_sum=loss(self.base, inputs, targets), label_count=targets.count)

    def generate(self, *args: Any, policy: RoutingPolicy | None = None, **kwargs: Any) -> Any:
        """The base's `generate`, with experts. With `route_by` "prompt" it reads the prompts once more, before.

        Args:
            policy: the policy of all its forwards; default: the current one.

        Raises:
            SRDEError: every expert is locked, or a prompt is to be routed by its tokens and there are none.
        """
        policy = policy_of_generation(self, policy or self.routing.policy, *args, **kwargs)
        with ExitStack() as stack:
            # On the model's device, since a CUDA graph takes nothing from the CPU.
            stack.enter_context(self.routing.running(policy, self.base.device))
            for layer in self.layers if self.routing.policy.active else ():
                stack.enter_context(layer.hold_prepared(self.base.dtype))
            return cast("Any", self.base).generate(*args, **kwargs)

    def enable_gradient_checkpointing(self, *, use_reentrant: bool = False) -> None:
        """Recompute each decoder layer's activations in the backward (in train mode), under the forward's policy."""
        enable_checkpointing(self.base, use_reentrant=use_reentrant)
        keep_policy_when_recomputing(self.base, self.routing)
        if use_reentrant:  # needs an input with a gradient, but the embedding is frozen
            self.base.enable_input_require_grads()

    @contextmanager
    def no_experts(self) -> Iterator[None]:
        """A context in which the output is that of the bare base, bit for bit."""
        before = self.routing.standing.active
        self.routing.standing = replace(self.routing.standing, active=False)
        try:
            yield
        finally:
            self.routing.standing = replace(self.routing.standing, active=before)

    @property
    def active_experts(self) -> list[str]:
        """Names of the experts that tokens may be routed to."""
        allowed = self.routing.standing.allowed_experts
        used = [True] * len(self.expert_names) if allowed is None else allowed.tolist()
        return [name for name, use in zip(self.expert_names, used, strict=True) if use]

    def set_active_experts(self, names: Sequence[str] | None) -> None:
        """Route tokens only to these experts from now on; None: to all.

        A token's weights are the softmax over those of its `top_k` that are active; with fewer active experts than
        top_k, each token uses all of them. `no_experts` gives the bare base.

        Raises:
            SRDEError: an unknown name, or no name.
        """
        self.routing.standing = replace(self.routing.standing, allowed_experts=self.allowed_experts(names))

    def allowed_experts(self, names: Sequence[str] | None) -> Tensor | None:
        """`RoutingPolicy.allowed_experts` that allows these, `[E]` bool; None: those of `set_active_experts`.

        Raises:
            SRDEError: an unknown name, or no name.
        """
        if names is None:
            return None
        chosen = [expert_index(self.expert_names, name) for name in ([names] if isinstance(names, str) else names)]
        if not chosen:
            raise SRDEError("set_active_experts([]): give at least one expert; `with model.no_experts():` uses none.")
        allowed = torch.zeros(len(self.expert_names), dtype=torch.bool)
        allowed[chosen] = True
        return allowed

    def merge_and_unload(self, expert: str | None = None) -> PreTrainedModel:
        """The base with one expert's deltas added to its own weights, in place: an ordinary transformers model.

        The result computes what this model does if all tokens go to that expert. This model cannot be used afterwards.

        Args:
            expert: its name; may be left out if there is only one.

        Raises:
            SRDEError: the name is unknown, or missing although there are several experts, or the base is quantised.
        """
        if expert is None and len(self.expert_names) > 1:
            raise SRDEError(f"merge_and_unload(): name one of the experts {', '.join(self.expert_names)}.")
        merge_into_base(self.base, 0 if expert is None else expert_index(self.expert_names, expert))
        return self.base

    def save_pretrained(self, folder: str | Path, *, run: str | Path | None = None) -> Path:
        """Write the adapter and its model card into a folder that `from_pretrained` reads; returns the weights' path.

        Args:
            run: folder of the training run, for the card; default: `run_folder`.

        Raises:
            SRDEError: `run` is not the folder of a run.
        """
        run = self.run_folder if run is None else Path(run)
        return save_adapter(Path(folder), self.adapter_tensors(), self.metadata(), run=run)

    def push_to_hub(self, repo: str, *, private: bool = True, run: str | Path | None = None) -> str:
        """Upload the adapter and its model card to the Hub; returns the repository's address.

        The token is the environment variable HF_TOKEN or that of `hf auth login`.

        Args:
            run: as in `save_pretrained`.

        Raises:
            SRDEError: no token, no such run, a bad name, a public repository despite `private`, or the Hub refuses.
        """
        run = self.run_folder if run is None else Path(run)
        return push_adapter(repo, self.adapter_tensors(), self.metadata(), run=run, private=private)

    def trainable_parameters(self) -> Iterator[tuple[str, Trainable]]:
        """Layer by layer, each parameter with its name (such as `layers.{i}.deltas.free`), the same on every base."""
        for number, layer in enumerate(self.layers):
            for child in ("deltas", "router", "shared_expert"):
                module: nn.Module | None = getattr(layer, child)
                for name, parameter in () if module is None else module.named_parameters():
                    yield f"layers.{number}.{child}.{name}", cast("Trainable", parameter)

    def adapter_tensors(self) -> dict[str, Tensor]:
        """All tensors of the adapter, by stable name and without padding. Parameters must be whole here.

        Raises an SRDEError after `merge_and_unload`."""
        if not self.layers:
            raise SRDEError("merge_and_unload took the experts out of this model: load the adapter again.")
        return {name: p.detach()[: p.srde_shape[0]] for name, p in self.trainable_parameters()} | self.common_tensors()

    def common_tensors(self) -> dict[str, Tensor]:
        """Tensors that every rank holds whole: those of the layers, and statistics of the domains, if there are any."""
        own = ((number, layer.common_tensors()) for number, layer in enumerate(self.layers))
        return {f"layers.{n}.{name}": t for n, found in own for name, t in found.items()} | self.origins.tensors()

    def load_common_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Take selection biases (zeros where there are none) and the shared experts' neurons from `tensors`."""
        for number, layer in enumerate(self.layers):
            layer.router.load_selection_bias(tensors.get(f"layers.{number}.router_bias"))
            if layer.shared_expert is not None:
                layer.shared_expert.neurons.copy_(tensors[f"layers.{number}.{NEURONS}"])

    def metadata(self) -> AdapterMetadata:
        """The metadata of the adapter in a weights file."""
        supports = [layer.support for layer in self.layers]
        return AdapterMetadata(
            config=self.config,
            expert_names=self.expert_names,
            base=self.base_identity,
            model_name=str(self.base_identity["name"]),
            support_hash=support_hash(supports),
            domain_tokens=dict(self.origins.domain_tokens),
            history=list(self.origins.history),
            model_revision=getattr(self.base, "srde_revision", ""),
        )

    def delta_norms(self, *, gather: Gather = no_gather) -> Tensor:
        """`[E]` fp32: norm of each expert's effective delta over all layers."""
        squares = []
        for layer in self.layers:
            with gather(list(layer.deltas.parameters())):
                squares.append(layer.delta_square_norms().to(self.layers[0].support.device))
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
    sharding: Sharding = WHOLE,
) -> SRDEModel:
    """Replace the base's feed-forward blocks, in place, by blocks with experts whose deltas are zero.

    Args:
        expert_names: a name for each expert.
        seed: seed of routers, random supports and the mixing of atoms.
        dtype: dtype of all trainables; default: the base's.
        supports: supports of all layers, first layer first; default: chosen as the config says.
        target_density: density of the supports after they have been learned; the config's density is that of the
            candidates. None: the supports are fixed.
        sharding: how base and experts are divided among processes; default: all weights are whole here.

    Raises:
        SRDEError: the names do not fit the config, the base has no fitting blocks or carries experts already, no
            support can be chosen, or those given do not fit.

    Examples:
        >>> from srde_ds import AdapterConfig, add_experts
        >>> from transformers import AutoModelForCausalLM
        >>> base = AutoModelForCausalLM.from_pretrained("base").requires_grad_(False)
        >>> config = AdapterConfig(num_experts=2, density=0.05)
        >>> model = add_experts(base, config, expert_names=["red", "green"], seed=0)
        >>> model.active_experts
        ['red', 'green']
    """
    return _with_experts(
        base,
        config,
        expert_names,
        support_chooser(config, supports, seed=seed, gather=sharding.gather),
        seed=seed,
        dtype=dtype,
        sharding=sharding,
        target_density=target_density,
    )


def _with_experts(
    base: PreTrainedModel, config: AdapterConfig, expert_names: list[str], choose: SupportChooser, **options: Any
) -> SRDEModel:
    routing, identity = attach_experts(base, config, expert_names, choose, **options)
    return SRDEModel(base, config, list(expert_names), routing, identity).train(base.training)


def load_adapter(
    weights: str | Path | AdapterSource,
    *,
    base: str | Path | PreTrainedModel | None = None,
    dtype: torch.dtype = torch.float32,
    attn_implementation: str = "sdpa",
    revision: str | None = None,
    allow_download: bool = False,
) -> SRDEModel:
    """A base with trained experts, in the mode (train or eval) of the base.

    Args:
        weights: as every verb takes them: a weights file, a folder with one, a folder that PEFT has saved, the folder
            of a run, finished or not, a checkpoint or a repository of the Hub (see `weights.locate.locate_weights`);
            or the result of `open_adapter`.
        base: a fresh model, or the id or folder to load it from; default: the one named in the weights.
        dtype: dtype of the experts, and of the base if it is loaded here.
        revision: revision of a Hub repository.
        allow_download: without `base`, whether the one named in the weights may be downloaded from the Hub.

    Raises:
        SRDEError: weights or base do not exist, the weights are damaged (see `weights.schema`), or the experts were
            trained on another base.

    Examples:
        >>> from srde_ds import load_adapter
        >>> model = load_adapter("trained/srde_weights.safetensors", base="base")
        >>> model.config.density
        0.05
    """
    source = weights if isinstance(weights, AdapterSource) else open_adapter(weights, revision=revision)
    metadata, tensors = source.metadata, source.tensors
    if base is None or isinstance(base, str | Path):
        name, loading = base_to_load(base, metadata.model_name, metadata.model_revision, allow_download=allow_download)
        base = load_base(name, dtype=dtype, attn_implementation=attn_implementation, **loading)
    identity = source.check_fits(base)
    supports = [tensors[f"layers.{layer}.support"].load() for layer in range(source.num_layers)]
    choose = support_chooser(metadata.config, supports, seed=0, gather=no_gather)
    model = _with_experts(base, metadata.config, metadata.expert_names, choose, seed=0, dtype=dtype)
    model.base_identity, model.run_folder = identity, source.run
    with torch.no_grad():
        for name, parameter in model.trainable_parameters():
            parameter.copy_(tensors[name].load())
    common = (".router_bias", f".{NEURONS}")
    model.load_common_tensors({name: tensor.load() for name, tensor in tensors.items() if name.endswith(common)})
    model.origins = Origins.of(metadata, tensors)
    return model
