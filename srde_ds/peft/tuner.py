"""PEFT's view of a base with the experts of one or several adapters."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, cast

import torch
from peft import PeftConfig
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from torch import Tensor, nn
from transformers import PreTrainedModel

from srde_ds.errors import SRDEError
from srde_ds.model.adapter import SRDEModel
from srde_ds.model.attach import Neurons, block_with_experts, support_chooser
from srde_ds.model.base import no_gather
from srde_ds.model.base_files import check_base, identity_before_quantization
from srde_ds.model.deltas import Storage
from srde_ds.model.feed_forward import FeedForward, find_feed_forward
from srde_ds.model.merging import check_mergeable, merge_into_blocks
from srde_ds.model.policy import PolicyControl, RoutingPolicy, keep_policy_when_recomputing
from srde_ds.model.supports.selection import check_support, support_shape
from srde_ds.peft.blocks import ReadableBlock
from srde_ds.peft.config import OPTIONS, SRDEConfig
from srde_ds.peft.layer import SRDELayer, check_adapter_name
from srde_ds.peft.state import (
    check_tensors,
    empty_statistics,
    experts_of,
    keep_statistics,
    name_in_file,
    with_zeros,
    without_zero_biases,
)
from srde_ds.peft.steps import TrainingSteps
from srde_ds.weights.file import AdapterMetadata
from srde_ds.weights.origins import DomainStatistics, Origins
from srde_ds.weights.schema import support_hash

PLAIN_REGISTRATION = nn.Module.register_parameter


class SRDETuner(BaseTuner):
    """The `base_model` of a `PeftModel`, made by PEFT. The `PeftModel` forwards the attributes below.

    Attributes:
        routing: tells the layers the policy of the current forward, see `model/policy.py`.
        identity: the base's `base_identity`, taken before experts were attached.
    """

    prefix: str = "srde_"
    uses_shared_state = True  # `inject_adapter_in_model` and transformers' `load_adapter` would drop it: they refuse
    tuner_layer_cls = SRDELayer
    target_module_mapping: dict[str, list[str]] = {}

    def _pre_injection_hook(self, model: nn.Module, config: PeftConfig, adapter_name: str) -> None:
        if not isinstance(model, PreTrainedModel):
            raise SRDEError(f"base of type {type(model).__name__}: give a decoder of transformers.")
        if nn.Module.register_parameter is not PLAIN_REGISTRATION:
            raise _no_empty_experts()
        foreign = [m for m in model.modules() if isinstance(m, BaseTunerLayer) and not isinstance(m, SRDELayer)]
        if foreign:
            raise SRDEError(
                f"base: it carries layers of {type(foreign[0]).__module__}, and experts trained on these would not fit "
                "a base without them. Call unload() or merge_and_unload() of its model first."
            )
        self.routing = PolicyControl()
        self.blocks: list[FeedForward] = find_feed_forward(model)
        self.identity = identity_before_quantization(model)
        self._steps: dict[str, TrainingSteps] = {}

    def inject_adapter(
        self,
        model: nn.Module,
        adapter_name: str,
        autocast_adapter_dtype: bool = True,
        low_cpu_mem_usage: bool = False,
        state_dict: dict[str, Tensor] | None = None,
    ) -> None:
        """Attach the experts of an adapter to the base.

        Given the configuration of an adapter that is already here, they copy it. TRL makes a frozen reference this way.

        Raises:
            SRDEError: the configuration is inconsistent, does not fit the base, or belongs to another base's adapter.
        """
        if low_cpu_mem_usage:
            raise _no_empty_experts()
        check_adapter_name(adapter_name, self.model)
        # A copy, since a user may give the same configuration to another base.
        config = copy.copy(self._config(adapter_name))
        config.settle(self.blocks[0].hidden)  # which checks again: options may have been set after it was made
        saved = config.saved_metadata()
        if saved is not None:  # with supports that fit its base
            check_base(self.model, saved.base, f"adapter '{adapter_name}'", known=self.identity)
        else:
            for block in self.blocks:
                check_support(config.adapter(), block.hidden, block.intermediate)
        config.target_modules = self._block_names(model)
        self.peft_config[adapter_name] = config
        super().inject_adapter(model, adapter_name, autocast_adapter_dtype, low_cpu_mem_usage, state_dict)
        if saved is None:
            config.metadata = self._metadata(config, experts_of(model, adapter_name)).to_json()

    def _block_names(self, model: nn.Module) -> list[str]:
        names = {id(module): name for name, module in model.named_modules()}
        return [f"{names[id(block.owner)]}.{block.name}" for block in self.blocks]

    def _prepare_adapter_config(self, peft_config: PeftConfig, model_config: dict[str, Any]) -> PeftConfig:
        return peft_config

    def _create_and_replace(
        self,
        peft_config: PeftConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        assert isinstance(peft_config, SRDEConfig)
        number = next(n for n, block in enumerate(self.blocks) if block.owner is parent and block.name == target_name)
        block, config, saved = self.blocks[number], peft_config.adapter(), peft_config.saved_metadata()
        if saved is None:
            choose = support_chooser(config, None, seed=peft_config.seed, gather=no_gather)
            neurons = choose(number, ReadableBlock(**vars(block), dtype=self.model.dtype))
        else:
            shape = support_shape(config, block.hidden, block.intermediate)
            neurons = Neurons(torch.zeros(shape, dtype=torch.int32))
        experts = block_with_experts(
            block,
            number,
            config,
            neurons,
            control=self.routing,
            seed=peft_config.seed,
            storage=Storage(torch.float32, block.device),
        )
        if saved is not None:
            keep_statistics(experts, empty_statistics(len(saved.domain_tokens), block.hidden))
        layer = target if isinstance(target, SRDELayer) else SRDELayer(block.block)
        twin = None if saved is None else self._twin(peft_config, adapter_name, layer)
        layer.add(adapter_name, experts.train(block.block.training), empty=saved is not None and twin is None)
        if twin is not None:
            experts.load_state_dict(layer.experts(twin).state_dict())
        experts.requires_grad_(adapter_name in self.active_adapters)
        setattr(parent, target_name, layer)

    def _twin(self, config: SRDEConfig, adapter: str, layer: SRDELayer) -> str | None:
        """Another adapter that has values and the same configuration, if there is one."""
        same = (n for n in layer.srde_experts if n != adapter and self._config(n).metadata == config.metadata)
        return next((name for name in same if name not in layer.empty), None)

    def _metadata(self, config: SRDEConfig, layers: Sequence[Any]) -> AdapterMetadata:
        return AdapterMetadata(
            config=config.adapter(),
            expert_names=config.names,
            base=self.identity,
            model_name=str(self.identity["name"]),
            support_hash=support_hash(layer.support for layer in layers),
            model_revision=config.revision or str(getattr(self.model, "srde_revision", "")),
        )

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        # In place, since PEFT would make new parameters without the attributes that optimizers read.
        dtype = torch.float32 if autocast_adapter_dtype else self.model.dtype
        for experts in experts_of(self.model, adapter_name):
            for parameter in experts.parameters():
                parameter.data = parameter.data.to(dtype)

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        setattr(parent, child_name, new_module)

    @property
    def training_steps(self) -> TrainingSteps:
        """The training state of the active adapter, see `steps.py`."""
        adapter = self._one_adapter(None)
        if adapter not in self._steps:
            self._steps[adapter] = TrainingSteps(experts_of(self.model, adapter), self._config(adapter))
        return self._steps[adapter]

    def delete_adapter(self, adapter_name: str) -> None:
        """Remove an adapter's experts."""
        super().delete_adapter(adapter_name)
        self._steps.pop(adapter_name, None)

    def set_adapter(self, adapter_name: str | list[str], inference_mode: bool = False) -> None:
        """Use the experts of this adapter from now on.

        Raises:
            SRDEError: there is no such adapter, or there is more than one.
        """
        for name in [adapter_name] if isinstance(adapter_name, str) else adapter_name:
            self._one_adapter([name])
        super().set_adapter(adapter_name, inference_mode=inference_mode)

    @contextmanager
    def metadata_of(self, config: SRDEConfig, adapter: str, place: object) -> Iterator[None]:
        """Take a saved state's metadata and seed. Load its values inside this context; an error undoes everything.

        Args:
            config: configuration of the saved adapter.
            place: where it is saved, for messages.

        Raises:
            SRDEError: its experts or options differ, so it is another adapter, or it was trained on another base.
        """
        own = self._config(adapter)
        before, found = own.saved_metadata(), config.saved_metadata()
        if before is None or found is None:
            raise SRDEError(f"weights '{place}': it holds no metadata. Save the adapter again with save_pretrained.")
        compared = [("experts", before.expert_names, found.expert_names)]
        compared += [(name, getattr(before.config, name), getattr(found.config, name)) for name in OPTIONS]
        for name, here, there in compared:
            if here != there:
                raise SRDEError(
                    f"adapter '{adapter}': this model has it with other {name} ({_listed(here)}) than '{place}' "
                    f"({_listed(there)}). Load '{place}' under another adapter_name, or call "
                    f"delete_adapter('{adapter}') first."
                )
        check_base(self.model, found.base, str(place), known=self.identity)
        layers, kept = experts_of(self.model, adapter), (own.metadata, own.seed)
        statistics = dict(enumerate(self.srde_model(adapter).origins.statistics))
        own.metadata, own.seed = config.metadata, config.seed
        for experts in layers:
            keep_statistics(experts, empty_statistics(len(found.domain_tokens), experts.hidden))
        try:
            yield
        except BaseException:
            own.metadata, own.seed = kept
            for number, experts in enumerate(layers):
                keep_statistics(experts, statistics.get(number))
            raise

    def set_domain_statistics(
        self, adapter: str, tokens: Mapping[str, int], statistics: list[DomainStatistics]
    ) -> None:
        """Update an adapter's statistics of some domains, as `Origins.update` does."""
        config = self._config(adapter)
        saved = config.saved_metadata()
        assert saved is not None  # injection gave it metadata
        origins = self.srde_model(adapter).origins
        origins.update(tokens, statistics)
        for experts, own in zip(experts_of(self.model, adapter), origins.statistics, strict=True):
            keep_statistics(experts, own)
        config.metadata = replace(saved, domain_tokens=origins.domain_tokens).to_json()

    # Forward: PeftModelForCausalLM calls `forward` inside of the hook context; PeftModel uses only that context.

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The base's forward, with experts."""
        with self._routed(*args, **kwargs):
            return self.model(*args, **kwargs)

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """The base's `generate`.

        Trainers sample in train mode, where experts are not prepared for decoding. So theirs is eval mode meanwhile.
        """
        experts = [layer for name in self.active_adapters for layer in experts_of(self.model, name) if layer.training]
        policy = self.routing.policy
        if experts:  # in eval mode their tokens would be counted with those of the training step
            policy = replace(policy, statistics=None)
        try:
            for layer in experts:
                layer.eval()
            with self.routing.running(policy):
                return cast("Any", self.model).generate(*args, **kwargs)
        finally:
            for layer in experts:
                layer.train()

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        if kwargs.get("adapter_names") is not None:
            raise SRDEError(
                "adapter_names: a forward uses the experts of one adapter. Call set_adapter first, or make one adapter "
                "of several: run srde_ds.peft.statistics.measure_domains on each, save them, and run srde-ds combine."
            )
        with self._routed(*args, **kwargs):
            yield

    @contextmanager
    def _routed(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        """In training, use the policy with losses and statistics inside this context."""
        if not (self.model.training and torch.is_grad_enabled() and self.active_adapters):
            yield
            return
        with self.routing.running(self._begin(args, kwargs)):
            yield

    @torch.compiler.disable  # whether there are gradients is not constant
    def _begin(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> RoutingPolicy:
        """The policy for a forward in training."""
        keep_policy_when_recomputing(self.model, self.routing)
        arguments = inspect.signature(self.model.forward).bind_partial(*args, **kwargs).arguments
        return self.training_steps.policy(arguments)

    # Other forms

    def srde_model(self, adapter_name: str | None = None) -> SRDEModel:
        """The same base and experts as an `SRDEModel`, which shares all tensors.

        Args:
            adapter_name: the adapter; default: the active one.
        """
        return AdapterView(self, self._one_adapter(None if adapter_name is None else [adapter_name]))

    def merge_and_unload(
        self,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: list[str] | None = None,
        expert: str | None = None,
    ) -> nn.Module:
        """Add one expert's deltas to the base's weights, in place, and return the base: an ordinary transformers model.

        It computes the same as this model if all tokens go to that expert.

        Args:
            progressbar: show progress.
            safe_merge: check first that all deltas are finite.
            adapter_names: a list with the adapter; default: the active one.
            expert: the expert's name; may be left out if there is only one.

        Raises:
            SRDEError: no expert is named although there are several, the name is unknown, the base is quantised, or
                values are not finite.
        """
        adapter = self._one_adapter(adapter_names)
        names = self._config(adapter).names
        if expert is None and len(names) > 1:
            raise SRDEError(
                "merge_and_unload(): each token has its own experts, so they cannot all be merged into a dense model. "
                f"Give one with expert=... ({', '.join(names)}), or make a stock mixture of experts: "
                "srde-ds convert FOLDER --to moe."
            )
        view = self.srde_model(adapter)
        number = 0 if expert is None else view.metadata().expert_index(expert)
        check_mergeable(view.layers)
        if safe_merge and not all(bool(layer.deltas().isfinite().all()) for layer in view.layers):
            raise SRDEError(f"adapter '{adapter}': it has values that are not finite. Merge another one.")
        merge_into_blocks(view.layers, number)
        base = self.model
        self._unload_and_optionally_merge(merge=False, progressbar=progressbar)
        return base

    def _config(self, adapter: str) -> SRDEConfig:
        config = self.peft_config[adapter]
        assert isinstance(config, SRDEConfig)
        return config

    def _one_adapter(self, adapter_names: list[str] | None) -> str:
        names = self.active_adapters if adapter_names is None else adapter_names
        if len(names) != 1 or names[0] not in self.peft_config:
            known = ", ".join(self.peft_config)
            raise SRDEError(f"adapter_names={','.join(names) or 'none'}: give one of {known}.")
        return names[0]

    # Files, see `state.py`

    @classmethod
    def _get_adapter_state_dict(
        cls,
        model: nn.Module,
        config: PeftConfig,
        adapter_name: str,
        state_dict: dict[str, Tensor],
        unwanted_adapter_names: list[str],
    ) -> dict[str, Tensor]:
        layers = [layer for layer in model.modules() if isinstance(layer, SRDELayer)]
        if not layers:
            raise SRDEError(
                f"adapter '{adapter_name}': merge_and_unload or unload removed the experts from this model, so there "
                "is nothing to save. Load the adapter again."
            )
        if any(adapter_name in layer.empty for layer in layers):
            raise SRDEError(f"adapter '{adapter_name}': its values were never loaded, so there is nothing to save.")
        state = super()._get_adapter_state_dict(model, config, adapter_name, state_dict, unwanted_adapter_names)
        return without_zero_biases(state)

    @classmethod
    def _remove_adapter_name_from_key(cls, key: str, adapter_name: str) -> str:
        return name_in_file(key, adapter_name) or super()._remove_adapter_name_from_key(key, adapter_name)

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: PeftConfig, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        assert isinstance(config, SRDEConfig)
        layers, saved = experts_of(model, adapter_name), config.saved_metadata()
        assert saved is not None  # injection gave it metadata
        check_tensors(state_dict, saved, layers, f"adapter '{adapter_name}'")
        complete = with_zeros(state_dict, layers)
        for layer in model.modules():
            if isinstance(layer, SRDELayer):
                layer.empty.discard(adapter_name)
        return super()._remap_adapter_state_dict_for_load(model, config, adapter_name, complete)


class AdapterView(SRDEModel):
    """One adapter of a PEFT model as an `SRDEModel`, which shares all tensors."""

    def __init__(self, tuner: SRDETuner, adapter: str) -> None:
        config, base = tuner.peft_config[adapter], tuner.model
        assert isinstance(config, SRDEConfig) and isinstance(base, PreTrainedModel)
        saved = config.saved_metadata()
        assert saved is not None
        super().__init__(base, saved.config, saved.expert_names, tuner.routing, saved.base)
        self.adapter, self._revision = adapter, saved.model_revision or config.revision or ""
        own = [m for m in self.layers if hasattr(m, "domain_mean")]
        statistics = [DomainStatistics(m.domain_mean, m.domain_spread, m.domain_factors) for m in own]
        self.origins = Origins(list(saved.history), dict(saved.domain_tokens), statistics)
        self.training = base.training

    @property
    def layers(self) -> list[Any]:
        """The adapter's layers, in the order in which tokens pass them."""
        return experts_of(self.base, self.adapter)

    def metadata(self) -> AdapterMetadata:
        """As in `SRDEModel`."""
        return replace(super().metadata(), model_revision=self._revision)

    def merge_and_unload(self, expert: str | None = None) -> PreTrainedModel:
        """Raise SRDEError: only the PEFT model can do this."""
        raise SRDEError("merge_and_unload(): call the method of the PEFT model, which also removes the other adapters.")


def _listed(value: Any) -> str:
    return (", ".join(value) or "none") if isinstance(value, list) else str(value)


def _no_empty_experts() -> SRDEError:
    return SRDEError("low_cpu_mem_usage=True: experts cannot be created on the meta device. Leave it out.")
