"""Learned supports in whole runs: the same choice, then the same training, however the work is cut."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from srde_ds.checkpoint.resume import load_run_state
from tests.distributed.harness import Ranks
from tests.distributed.training_helpers import Inputs, assert_same_training, train_here, weights

# Masks are discrete: another choice would show in the supports and in the losses at once.
TOLERANCE = 1e-4
LEARNED = {
    "support_strategy": "learned",
    "initial_density": 0.2,
    "density_warmup_steps": 3,
    "max_steps": 5,
    "save_steps": 0,
    "eval_steps": 0,
}
ADAMW = {"use_muon": False}  # of rank-deficient gradients, such as masks give, Muon also scales up the rounding
FORMS: dict[str, dict[str, Any]] = {
    "shared": {},
    "per_expert": {"support_scope": "per_expert", "support_overlap_weight": 0.1} | ADAMW,
    "atoms": {"num_atoms": 4},
    "element": {"granularity": "element", "support_scope": "per_expert"} | ADAMW,
}
TOKENS = {"expert_parallel_size": 2, "expert_transport": "tokens"}
DELTAS = {"expert_parallel_size": 2, "expert_transport": "deltas"}


def flags(inputs: Inputs, folder: Path, world_size: int, **changes: Any) -> dict[str, Any]:
    rows = {"batch_size": 4 // world_size, "gradient_accumulation_steps": 2}
    return inputs.flags(folder, **(LEARNED | rows | changes))


@pytest.fixture(scope="module")
def alone(inputs: Inputs, one_rank: Ranks, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Run folders of one process, by form."""
    folders = {}
    for name, form in FORMS.items():
        folders[name] = tmp_path_factory.mktemp("alone") / name
        assert one_rank(train_here, flags(inputs, folders[name], 1, **form)) == [None]
    return folders


@pytest.mark.parametrize(
    ("form", "cut"),
    [
        ("shared", {}),
        ("per_expert", {"gradient_checkpointing": True}),
        ("per_expert", TOKENS),
        ("per_expert", DELTAS),
        ("atoms", TOKENS),
        ("element", TOKENS),
        ("element", DELTAS),
    ],
)
def test_two_processes_learn_what_one_learns(
    inputs: Inputs, two_ranks: Ranks, alone: dict[str, Path], form: str, cut: dict[str, Any], tmp_path: Path
) -> None:
    assert two_ranks(train_here, flags(inputs, tmp_path / "run", 2, **FORMS[form], **cut)) == [None, None]
    assert_same_training(tmp_path / "run", alone[form], tolerance=TOLERANCE)
    assert not [name for name in weights(tmp_path / "run") if name.endswith(".scores")]
    run = load_run_state(tmp_path / "run" / "checkpoint-5")
    assert run["adapter"]["config"]["density"] == 0.05
