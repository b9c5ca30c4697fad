"""A run measures its base once: for the memory at hand, the checks, each engine and a pruning."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch.distributed as dist

from srde_ds.config import resolve
from tests.distributed.harness import Ranks
from tests.distributed.training_helpers import Inputs
from tests.helpers import counted_measurements


def measured_bases(flags: dict[str, Any]) -> list[str]:
    """The bases that `srde-ds train` measures."""
    from srde_ds.planner.settle import settle
    from srde_ds.training import trainer

    with counted_measurements() as built, patch.object(trainer, "stop_processes", dist.barrier):
        assert trainer.train(settle(resolve({}, flags))) is None
    return built


def test_a_run_measures_its_base_once(inputs: Inputs, one_rank: Ranks, tmp_path: Path) -> None:
    settled = {"recompute": "auto", "base_placement": "auto"}
    pruned = {"initial_density": 0.1, "density_warmup_steps": 1, "density_prunings": 1, "max_steps": 2}
    flags = inputs.flags(tmp_path / "run", warmup_steps=0, save_steps=0, eval_steps=0, **settled, **pruned)
    assert one_rank(measured_bases, flags) == [[inputs.base]]
    assert (tmp_path / "run/checkpoint-1").is_dir()  # the pruning's
