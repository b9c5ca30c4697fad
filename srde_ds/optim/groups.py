"""Assigns each trainable an update rule and learning rate. Every trainable is in exactly one group."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor, nn

from srde_ds.config import OptimizerConfig
from srde_ds.config.granularity import Granularity
from srde_ds.errors import SRDEError
from srde_ds.utils.tables import aligned_table


def group_of_tensor(config: OptimizerConfig, granularity: Granularity) -> dict[str, str]:
    """The last two parts of a trainable's name -> its group."""
    matrices = "delta_matrices" if config.use_muon else "deltas"
    return {
        # The free delta of blocks or single weights is a list of values, not a matrix that could be orthogonalised.
        "deltas.free": matrices if granularity == "neuron" else "deltas",
        "deltas.atoms": matrices,
        "deltas.importance": "deltas",
        "deltas.mixing": "deltas",
        "deltas.scores": "deltas",
        "shared_expert.delta": matrices,
        "router.weight": "routers",
    }


# Group -> the option that is its rate.
RATES = {"delta_matrices": "muon_lr", "deltas": "learning_rate", "routers": "router_lr"}


def unused_rates(line: Mapping[str, Any]) -> set[str]:
    """The options of rates that no group of a run uses, by a line of its metrics; earlier versions wrote none."""
    used = line.get("learning_rates", RATES)
    return {option for group, option in RATES.items() if group not in used}


# Found in the names of parameters that are matrices only in shape: embeddings and output layers.
LOOK_UPS = ("embed", "wte", "wpe", "head", "router")


def is_hidden_matrix(name: str, parameter: Tensor) -> bool:
    """Whether Muon suits a parameter: the weight of a hidden layer, or the delta matrices of experts.

    It does not suit the experts' other tensors: importance, mixing, scores, routers, and free deltas of
    blocks or single weights.
    """
    kind = getattr(parameter, "srde_kind", None)
    if kind is not None:
        return kind in ("free", "atoms", "shared") and parameter.ndim == 3
    return parameter.ndim == 2 and not any(part in name.lower() for part in LOOK_UPS)


def build_groups(
    named_params: Iterable[tuple[str, nn.Parameter]],
    config: OptimizerConfig,
    granularity: Granularity,
) -> list[dict[str, Any]]:
    """Parameter groups for `GramMuonAdamW`; a group without parameters is left out.

    Args:
        named_params: names that end in the stable tensor names ("layers.0.deltas.free").

    Returns:
        Dicts with "params", "name", "rule", "lr", "peak_lr", "weight_decay", "step" and the rule's own settings.

    Raises:
        SRDEError: a trainable has no rule, there is no trainable, or `use_muon` is true but none is a matrix for Muon.
    """
    adamw = {"rule": "adamw", "betas": (config.adam_beta1, config.adam_beta2), "eps": 1e-8}
    muon = {"rule": "muon", "momentum": config.muon_momentum, "eps": 1e-7}
    groups: dict[str, dict[str, Any]] = {
        "delta_matrices": muon | {"weight_decay": config.weight_decay},
        "deltas": adamw | {"weight_decay": config.weight_decay},
        "routers": adamw | {"weight_decay": 0.0},
    }
    for name, group in groups.items():
        rate = getattr(config, RATES[name])
        group |= {"name": name, "params": [], "lr": rate, "peak_lr": rate, "step": 0}
    table = group_of_tensor(config, granularity)
    for name, param in named_params:
        kind = ".".join(name.split(".")[-2:])
        if kind not in table:
            raise SRDEError(f"{name}: no update rule for this trainable; the rules cover {', '.join(table)}.")
        groups[table[kind]]["params"].append(param)
    if config.use_muon and not groups["delta_matrices"]["params"]:
        raise SRDEError(
            "use_muon=true: no trainable is a delta matrix, so Muon has nothing to do. Give --use_muon false."
        )
    used = [group for group in groups.values() if group["params"]]
    if not used:
        raise SRDEError("model: no trainable parameters to optimize; add experts before building the optimizer.")
    return used


def rule_table(groups: Iterable[dict[str, Any]]) -> str:
    """The groups as a table: group, rule, tensors, values, learning rate, weight decay.

    It counts values in the parameters, so call it before ZeRO-3 empties them.
    """
    lines = [("group", "rule", "tensors", "values", "learning rate", "weight decay")]
    for group in groups:
        values = sum(param.numel() for param in group["params"])
        lines.append(
            (
                group["name"],
                group["rule"],
                str(len(group["params"])),
                f"{values:,}",
                f"{group['peak_lr']:g}",
                f"{group['weight_decay']:g}",
            )
        )
    return aligned_table(lines, right=2)
