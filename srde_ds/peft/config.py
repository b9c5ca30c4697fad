"""The options of SRDE as a method of PEFT."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal

from peft import PeftConfig, PeftType, TaskType

from srde_ds.config import AdapterConfig, LossConfig, TrainingConfig
from srde_ds.config.derive import NEURON_PARTS, is_scattered, wants_parts, why_no_parts
from srde_ds.config.granularity import Granularity
from srde_ds.config.strategy import WITHOUT_DATA, Strategy
from srde_ds.config.values import checked
from srde_ds.errors import SRDEError
from srde_ds.model.attach import check_experts
from srde_ds.weights.file import AdapterMetadata
from srde_ds.weights.peft_folder import PEFT_TYPE
from srde_ds.weights.schema import is_printable, shown

OPTIONS = tuple(option.name for option in dataclasses.fields(AdapterConfig) if option.name != "preset")
DERIVED = ("neuron_parts", "support_strategy")
LOSSES = ("load_balancing_weight", "router_z_weight")
SECTIONS: tuple[tuple[type, tuple[str, ...]], ...] = (
    (AdapterConfig, OPTIONS),
    (LossConfig, LOSSES),
    (TrainingConfig, ("seed",)),
)
"""Sections of a run's configuration, each with the options that it shares with `SRDEConfig`"""


@dataclass
class SRDEConfig(PeftConfig):
    """Experts in every feed-forward block of a decoder, for `peft.get_peft_model`.

    Options from `num_experts` to `shared_expert_density` are those of `AdapterConfig`; the two weights are those of
    `LossConfig`.

    Attributes:
        num_experts: experts in each layer.
        top_k: experts that each token uses.
        density: share of the feed-forward weights that an expert may change.
        granularity: what an expert changes: whole neurons, blocks of 16 x 16 weights, or single weights.
        neuron_parts: of each of its neurons, an expert changes only the weights from and to one of so many parts of the
            hidden dimensions; so it has so many times as many neurons. None: 4, or 1 with atoms, a shared expert, a
            support by magnitude, blocks or single weights, more than a quarter of the weights, or on a base whose
            hidden size is no multiple of 4; settled when the adapter is attached.
        support_strategy: how the weights that may change are chosen: "magnitude" or "random". A saved adapter that is
            loaded may have any strategy. None: random, or magnitude for whole neurons and atoms.
        support_scope: one support for all experts of a layer, or one for each expert.
        num_atoms: number of atoms that the experts share; 0: each expert's delta is a free parameter.
        atom_mixing: how an expert weights the atoms.
        shared_expert_density: share of the feed-forward weights that a shared expert may change, which every token uses
            beside its own; 0: none.
        expert_names: a name for each expert; None: expert_0, expert_1, ...
        seed: seed of routers, random supports and the mixing of atoms.
        load_balancing_weight, router_z_weight: weights of the router's losses in training.
        target_modules: the blocks that carry experts; filled in by the model.
        metadata: the metadata that `srde_weights.safetensors` would hold for this adapter, as JSON; filled in by the
            model. A configuration with metadata belongs to an adapter whose values are in a file.

    Raises:
        SRDEError: an option is out of range.

    Examples:
        >>> from peft import get_peft_model
        >>> from srde_ds.peft import SRDEConfig
        >>> from transformers import AutoModelForCausalLM
        >>> base = AutoModelForCausalLM.from_pretrained("base")
        >>> model = get_peft_model(base, SRDEConfig(num_experts=2, density=0.05, expert_names=["red", "green"]))
        >>> model.active_adapters
        ['default']
    """

    task_type: str | TaskType | None = TaskType.CAUSAL_LM
    num_experts: int = 6
    top_k: int = 2
    density: float = 0.01
    granularity: Granularity = "neuron"
    neuron_parts: int | None = None
    support_strategy: Strategy | None = None
    support_scope: Literal["shared", "per_expert"] = "shared"
    num_atoms: int = 0
    atom_mixing: Literal["linear", "softmax"] = "linear"
    shared_expert_density: float = 0.0
    expert_names: list[str] | None = None
    seed: int = 42
    load_balancing_weight: float = 0.01
    router_z_weight: float = 0.001
    target_modules: list[str] | None = None
    metadata: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType(PEFT_TYPE)
        self.check()

    def check(self) -> None:
        """Raise SRDEError unless every option is valid and they fit together."""
        for section, names in SECTIONS:
            for name in names:
                if getattr(self, name) is not None or name not in DERIVED:
                    setattr(self, name, checked(section, name, getattr(self, name)))
        if self.expert_names is not None:
            self.expert_names = _checked_names(self.expert_names)
        check_experts(self._derived(None), self.names)
        if self.metadata is not None and not isinstance(self.metadata, str):
            raise SRDEError(
                f"metadata={shown(self.metadata)}: must be the text that the model fills in. Leave it out, or save the "
                "adapter again with save_pretrained."
            )
        if self.metadata is None and self.support_strategy not in (*WITHOUT_DATA, None):
            raise SRDEError(
                f"support_strategy={self.support_strategy}: needs data, which PEFT does not pass to its methods. Use "
                "magnitude or random, or train with srde-ds and convert the result."
            )
        if self.metadata is None and self.target_modules is not None:
            raise SRDEError(
                f"target_modules={self.target_modules}: the experts are in the feed-forward block of every decoder "
                "layer. Leave it out. If it comes from an adapter_config.json, that file has lost its 'metadata': "
                "save the adapter again with save_pretrained."
            )

    def settle(self, hidden: int) -> None:
        """Check the options, and set those of `DERIVED` that are not given: to what the adapter's metadata say, or to
        what a run would choose.

        Args:
            hidden: the base's hidden size.
        """
        self.check()
        saved = self.saved_metadata()
        chosen = self._derived(hidden) if saved is None else saved.config
        for name in DERIVED:
            if getattr(self, name) is None:
                setattr(self, name, getattr(chosen, name))

    def _derived(self, hidden: int | None) -> AdapterConfig:
        """The options of a new adapter, as a run would derive those that are not given."""
        given = {name: getattr(self, name) for name in OPTIONS if getattr(self, name) is not None}
        adapter = AdapterConfig(**given)
        if "neuron_parts" not in given:
            parts = wants_parts(adapter, given) and not why_no_parts(self.density, hidden)
            adapter.neuron_parts = NEURON_PARTS if parts else 1
        if "support_strategy" not in given:
            adapter.support_strategy = "random" if is_scattered(adapter) else "magnitude"
        return adapter

    @property
    def names(self) -> list[str]:
        """The experts' names."""
        if self.expert_names is not None:
            return self.expert_names
        return [f"expert_{number}" for number in range(self.num_experts)]

    def saved_metadata(self) -> AdapterMetadata | None:
        """The metadata of an adapter whose values are in a file; None for a new adapter.

        Raises:
            SRDEError: the metadata are damaged or contradict the options.
        """
        if self.metadata is None:
            return None
        saved = AdapterMetadata.from_json(self.metadata, "adapter_config.json")
        for name in OPTIONS:
            unknown = name in DERIVED and getattr(self, name) is None
            if not unknown and getattr(saved.config, name) != getattr(self, name):
                raise SRDEError(
                    f"{name}={getattr(self, name)}: the adapter was made with {getattr(saved.config, name)}, and "
                    "its configuration cannot change that. Save the adapter again, or give a new SRDEConfig."
                )
        if saved.expert_names != self.names:
            raise SRDEError(
                f"expert_names={','.join(self.names)}: the adapter's experts are {', '.join(saved.expert_names)}. "
                "Rename them with srde-ds rename."
            )
        return saved

    def adapter(self) -> AdapterConfig:
        """The same options for `srde_ds.model`, once they are settled."""
        saved = self.saved_metadata()
        return AdapterConfig(**{name: getattr(self, name) for name in OPTIONS}) if saved is None else saved.config


def _checked_names(given: Any) -> list[str]:
    names = list(given) if isinstance(given, list | tuple) else [given]
    for name in names:
        if not isinstance(given, list | tuple) or not is_printable(name) or not name.strip():
            raise SRDEError(
                f"expert_names={shown(given)}: {shown(name)} is not a valid name. Give a list of printable texts, "
                "one for each expert."
            )
        if names.count(name) > 1:
            raise SRDEError(
                f"expert_names={shown(given)}: {names.count(name)} experts are called {shown(name)}. Give each a "
                "different name."
            )
    return names
