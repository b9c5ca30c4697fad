"""Every trainable gets exactly one rule."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from srde_ds.config import OptimizerConfig
from srde_ds.errors import SRDEError
from srde_ds.optim.gram_muon import GramMuonAdamW
from srde_ds.optim.groups import build_groups, rule_table

CONFIG = OptimizerConfig(muon_lr=0.02, learning_rate=1e-3, router_lr=5e-4, weight_decay=0.1, adam_beta2=0.99)
PREFIX = "base.model.layers.0.mlp."


def params(*names: str) -> dict[str, nn.Parameter]:
    return {PREFIX + name: nn.Parameter(torch.zeros(4, 3, 2)) for name in names}


def assignment(named: dict[str, nn.Parameter], config: OptimizerConfig, granularity: str) -> dict[str, tuple[str, str]]:
    groups = build_groups(named.items(), config, granularity)  # type: ignore[arg-type]
    owner = {id(param): (group["name"], group["rule"]) for group in groups for param in group["params"]}
    assert sum(len(group["params"]) for group in groups) == len(named)
    return {name.removeprefix(PREFIX): owner[id(param)] for name, param in named.items()}


MATRICES, DELTAS, ROUTERS = ("delta_matrices", "muon"), ("deltas", "adamw"), ("routers", "adamw")


def test_free_neuron_deltas() -> None:
    named = params("deltas.free", "router.weight")
    assert assignment(named, CONFIG, "neuron") == {"deltas.free": MATRICES, "router.weight": ROUTERS}


@pytest.mark.parametrize("granularity", ["neuron", "element"])
def test_atoms(granularity: str) -> None:
    named = params("deltas.atoms", "deltas.importance", "deltas.mixing", "router.weight")
    assert assignment(named, CONFIG, granularity) == {
        "deltas.atoms": MATRICES,
        "deltas.importance": DELTAS,
        "deltas.mixing": DELTAS,
        "router.weight": ROUTERS,
    }


def test_scores_of_a_learned_support() -> None:
    named = params("deltas.free", "deltas.scores", "router.weight")
    assert assignment(named, CONFIG, "neuron")["deltas.scores"] == DELTAS


def test_without_muon_delta_matrices_go_to_adamw() -> None:
    config = OptimizerConfig(use_muon=False)
    assert assignment(params("deltas.free", "deltas.atoms", "router.weight"), config, "neuron") == {
        "deltas.free": DELTAS,
        "deltas.atoms": DELTAS,
        "router.weight": ROUTERS,
    }
    assert assignment(params("deltas.free"), config, "element") == {"deltas.free": DELTAS}


def test_settings_of_the_groups() -> None:
    named = params("deltas.atoms", "deltas.mixing", "router.weight")
    matrices, deltas, routers = build_groups(named.items(), CONFIG, "neuron")
    for group in (matrices, deltas, routers):
        del group["params"]
    assert matrices == {
        "name": "delta_matrices", "rule": "muon", "lr": 0.02, "peak_lr": 0.02, "weight_decay": 0.1, "step": 0,
        "momentum": 0.95, "eps": 1e-7,
    }  # fmt: skip
    assert deltas == {
        "name": "deltas", "rule": "adamw", "lr": 1e-3, "peak_lr": 1e-3, "weight_decay": 0.1, "step": 0,
        "betas": (0.9, 0.99), "eps": 1e-8,
    }  # fmt: skip
    assert routers == {
        "name": "routers", "rule": "adamw", "lr": 5e-4, "peak_lr": 5e-4, "weight_decay": 0.0, "step": 0,
        "betas": (0.9, 0.99), "eps": 1e-8,
    }  # fmt: skip


def test_groups_make_an_optimizer() -> None:
    groups = build_groups(params("deltas.free", "router.weight").items(), CONFIG, "neuron")
    optimizer = GramMuonAdamW(groups)
    assert [(g["name"], g["lr"], g["step"]) for g in optimizer.param_groups] == [
        ("delta_matrices", 0.02, 0),
        ("routers", 5e-4, 0),
    ]


@pytest.mark.parametrize("name", ["deltas.other", "router.bias", "deltas.free.extra", "xdeltas.free", "weight"])
def test_a_trainable_without_a_rule_is_named(name: str) -> None:
    with pytest.raises(SRDEError, match=rf"^{PREFIX}{name}: no update rule"):
        build_groups(params("deltas.free", name).items(), CONFIG, "neuron")


@pytest.mark.parametrize(
    ("names", "granularity"), [(["router.weight"], "neuron"), (["deltas.free", "router.weight"], "element")]
)
def test_muon_without_matrices(names: list[str], granularity: str) -> None:
    with pytest.raises(SRDEError, match="^use_muon=true: .* Give --use_muon false"):
        build_groups(params(*names).items(), CONFIG, granularity)  # type: ignore[arg-type]


def test_no_trainables() -> None:
    with pytest.raises(SRDEError, match="no trainable parameters"):
        build_groups([], OptimizerConfig(use_muon=False), "neuron")


def test_rule_table() -> None:
    named = {
        "layers.0.deltas.free": nn.Parameter(torch.zeros(100, 18, 2)),
        "layers.1.deltas.free": nn.Parameter(torch.zeros(100, 18, 2)),
        "layers.0.router.weight": nn.Parameter(torch.zeros(6, 100)),
    }
    assert rule_table(build_groups(named.items(), CONFIG, "neuron")).splitlines() == [
        "group           rule   tensors  values  learning rate  weight decay",
        "delta_matrices  muon         2   7,200           0.02           0.1",
        "routers         adamw        1     600         0.0005             0",
    ]
