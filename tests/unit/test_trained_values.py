"""The count of trained values at each density is that of the models that are built."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from srde_ds.config import resolve
from srde_ds.errors import SRDEError
from srde_ds.model.base_shape import BaseShape, LayerShape, base_shape
from srde_ds.planner.trained_values import describe_trained_values, trained_values
from srde_ds.training.schedule import Schedule
from tests.helpers import tiny_llama, tiny_srde

SHAPE = BaseShape((LayerShape(32, 96),) * 2)  # tiny_llama's


@pytest.mark.parametrize(
    "form",
    [
        {"neuron_parts": 1},
        {"neuron_parts": 4},
        {"num_atoms": 4, "support_scope": "per_expert"},
        {"support_strategy": "learned", "support_scope": "per_expert"},
        {"support_strategy": "learned", "granularity": "element", "num_atoms": 4},
        {"shared_expert_density": 0.05, "neuron_parts": 4},
    ],
)
def test_values_at_each_density(form: dict[str, Any]) -> None:
    annealing = {"initial_density": 0.2, "density": 0.05, "density_warmup_steps": 40, "density_prunings": 2}
    config = resolve({}, annealing | {"max_steps": 100, "num_experts": 3} | form)
    learned = form.get("support_strategy") == "learned"
    densities = [0.2, 0.05] if learned else [0.2, 0.1, 0.05]
    spans = trained_values(config.adapter, Schedule.of(config).densities, SHAPE)
    assert [span.first_step for span in spans] == ([0, 40] if learned else [0, 20, 40])
    assert [span.density for span in spans] == pytest.approx(densities)
    for span in spans:
        target = 0.05 if learned and span.first_step == 0 else None
        model = tiny_srde(density=span.density, target_density=target, **form)
        assert span.values == sum(parameter.numel() for _, parameter in model.trainable_parameters())


def test_supports_must_fit_at_the_initial_density(tmp_path: Path) -> None:
    tiny_llama().config.save_pretrained(tmp_path)
    options = {"model_name": str(tmp_path), "max_length": 64, "num_experts": 3, "support_scope": "per_expert"}
    base_shape(resolve({}, options | {"density": 0.05}))
    annealing = {"initial_density": 0.5, "density": 0.05, "density_warmup_steps": 40}
    with pytest.raises(SRDEError, match=r"density=0\.5 for 3 experts.*disjoint slices"):
        base_shape(resolve({}, options | annealing))


def test_without_annealing_there_is_one_density() -> None:
    config = resolve({}, {"density": 0.05, "num_experts": 3, "max_steps": 100, "neuron_parts": 1})
    spans = trained_values(config.adapter, Schedule.of(config).densities, SHAPE)
    assert describe_trained_values(spans, max_steps=100).splitlines() == [
        "steps  density  trained values",
        f"1-100     0.05{2 * (32 * 9 * 5 + 3 * 32):>16,}",
    ]
