"""Options without an effect. They are not refused, since scripts of the predecessor give them; a run warns of each."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from typing import Any

from srde_ds.config.presets import PRESETS
from srde_ds.config.schema import Config
from srde_ds.config.strategy import CALIBRATED


@dataclass(frozen=True)
class Needs:
    """What options need to have an effect.

    Attributes:
        holds: whether a run gives it.
        settings: the options of other names that decide about it.
        remedy: what to do where it does not hold.
        why: what the settings mean for the options.
    """

    keys: tuple[str, ...]
    holds: Callable[[Config], bool]
    settings: tuple[str, ...]
    remedy: str
    why: str = "it has no effect"


def _trains_deltas(config: Config) -> bool:
    return config.curriculum.training_phases != "routers" or config.curriculum.supervised_experts


def _trains_routers(config: Config) -> bool:
    return config.curriculum.training_phases != "by_domain"


def _deltas_by_adamw(config: Config) -> bool:
    """Whether the parameter group "deltas" has a tensor, see `optim.groups`."""
    adapter = config.adapter
    others = adapter.num_atoms > 0 or adapter.granularity != "neuron" or adapter.support_strategy == "learned"
    return others or not config.optimizer.use_muon


NEEDS = (
    Needs(
        ("muon_lr", "muon_momentum", "learning_rate", "weight_decay", "delta_size_weight"),
        _trains_deltas,
        ("training_phases",),
        "Leave it out: --router_lr is the rate of the routers.",
    ),
    Needs(
        ("learning_rate",),
        _deltas_by_adamw,
        ("use_muon", "granularity"),
        "Give --muon_lr or --router_lr.",
        "no trainable uses it",
    ),
    Needs(
        ("adam_beta1", "adam_beta2"),
        lambda config: _trains_routers(config) or _deltas_by_adamw(config),
        ("use_muon", "granularity", "training_phases"),
        "Give --muon_momentum.",
        "no trainable uses it",
    ),
    Needs(
        ("muon_lr",),
        lambda config: config.optimizer.use_muon,
        ("use_muon",),
        "Give --learning_rate.",
        "no trainable uses it",
    ),
    Needs(
        ("muon_momentum",),
        lambda config: config.optimizer.use_muon,
        ("use_muon",),
        "Give --adam_beta1.",
        "no trainable uses it",
    ),
    Needs(
        ("decay_ratio",),
        lambda config: config.optimizer.lr_schedule == "wsd",
        ("lr_schedule",),
        "Give --lr_schedule wsd.",
    ),
    Needs(
        ("min_lr_ratio",),
        lambda config: config.optimizer.lr_schedule != "constant",
        ("lr_schedule",),
        "Give another --lr_schedule.",
    ),
    Needs(
        ("atom_mixing", "owner_computes"),
        lambda config: config.adapter.num_atoms > 0,
        ("num_atoms",),
        "Give --num_atoms, or leave it out.",
    ),
    Needs(
        ("support_scope",),
        lambda config: config.adapter.num_experts > 1 or config.adapter.support_strategy in CALIBRATED,
        ("num_experts",),
        "Give more experts, or leave it out.",
    ),
    Needs(
        ("load_balancing_weight", "load_balancing_target", "balancing_bias_rate"),
        lambda config: config.adapter.num_experts > 1,
        ("num_experts",),
        "Give more experts, or leave it out.",
    ),
    Needs(
        ("expert_transport",),
        lambda config: config.parallel.expert_parallel_size > 1,
        ("expert_parallel_size",),
        "Give --expert_parallel_size, or leave it out.",
    ),
    Needs(
        ("wandb_project", "wandb_run_name"),
        lambda config: config.tracking.use_wandb or config.tracking.use_trackio,
        ("use_wandb", "use_trackio"),
        "Give one of them, or leave it out.",
    ),
)


def idle_options(config: Config) -> Iterator[str]:
    """A line for each option without an effect that was given as a flag, or differs from its default."""
    sections = [getattr(config, section.name) for section in fields(config)]
    owner = {option.name: section for section in sections for option in fields(section)}
    named = set()
    for needs in NEEDS:
        for key in needs.keys if not needs.holds(config) else ():
            if key not in named and _is_chosen(config, owner[key], key):
                named.add(key)
                settings = " and ".join(f"{name}={_shown(getattr(owner[name], name))}" for name in needs.settings)
                value = _shown(getattr(owner[key], key))
                yield f"{key}={value}: {needs.why} with {settings}. {needs.remedy}"


def _is_chosen(config: Config, section: Any, key: str) -> bool:
    usual = (None, getattr(type(section), key), PRESETS[config.adapter.preset].get(key))
    return key in config.flags or (key not in config.derived and getattr(section, key) not in usual)


def _shown(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
