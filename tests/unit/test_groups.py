"""Every trainable gets exactly one rule."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from srde_ds.config import OptimizerConfig, resolve
from srde_ds.config.idle_options import idle_options
from srde_ds.errors import SRDEError
from srde_ds.optim.gram_muon import GramMuonAdamW
from srde_ds.optim.groups import RATES, build_groups, rule_table, unused_rates
from tests.helpers import tiny_srde
from tests.unit.test_adapter import FORMS

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


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("use_muon", [True, False])
def test_a_rate_that_no_group_uses_is_named(form: dict[str, Any], use_muon: bool) -> None:
    model = tiny_srde(**form)
    rates = {"muon_lr": 0.5, "learning_rate": 0.5, "router_lr": 0.5}
    try:
        config = resolve({}, form | rates | {"use_muon": use_muon})
        groups = build_groups(model.trainable_parameters(), config.optimizer, config.adapter.granularity)
    except SRDEError as error:
        assert "use_muon" in str(error) and use_muon
        return
    unused = rates.keys() - {RATES[group["name"]] for group in groups}
    assert {line.partition("=")[0] for line in idle_options(config)} & rates.keys() == unused
    assert unused_rates({"learning_rates": {group["name"]: group["lr"] for group in groups}}) == unused
    assert unused_rates({"learning_rate": 0.5}) == set()  # a run of an earlier version


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
