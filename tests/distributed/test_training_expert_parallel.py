"""The same run with the experts spread over ranks: same losses, gradient norms, updates, checkpoints."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from tests.distributed.harness import Ranks
from tests.distributed.test_training_equivalence import TOLERANCE
from tests.distributed.training_helpers import Inputs, assert_same_training, train_here

ROWS = 12  # a step's rows, for 1, 2, 3, 4 and 6 ranks
ATOMS = {"num_atoms": 4, "atom_mixing": "linear"}
ELEMENT = {"granularity": "element", "use_muon": False}
# Element deltas through AdamW, whose first updates are the gradient's sign: rounding flips it where it is near zero.
LOOSE = 5e-3


def flags(inputs: Inputs, folder: Path, world_size: int, **changes: Any) -> dict[str, Any]:
    cut = {"batch_size": 1, "gradient_accumulation_steps": ROWS // world_size}
    return inputs.flags(folder, **({"max_steps": 4, "save_steps": 0, "eval_steps": 0} | cut | changes))


@pytest.fixture(scope="module")
def ranks() -> Iterator[dict[int, Ranks]]:
    with ExitStack() as stack:
        yield {size: stack.enter_context(Ranks(size)) for size in (1, 2, 3, 4, 6)}


@pytest.fixture(scope="module")
def alone(inputs: Inputs, ranks: dict[int, Ranks], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Run folders of one process with all experts, by case."""
    cases: dict[str, dict[str, Any]] = {
        "free": {"batch_size": 4, "gradient_accumulation_steps": 3},
        "atoms": ATOMS,
        "element": ELEMENT,
        "per_expert": {"support_scope": "per_expert"},
    }
    folders = {}
    for name, changes in cases.items():
        folders[name] = tmp_path_factory.mktemp("alone") / name
        assert ranks[1](train_here, flags(inputs, folders[name], 1, **changes)) == [None]
    return folders


@pytest.mark.parametrize("transport", ["tokens", "deltas"])
@pytest.mark.parametrize(("world_size", "size"), [(2, 2), (4, 2), (4, 4), (3, 3), (6, 3)])
def test_free_deltas(
    inputs: Inputs,
    ranks: dict[int, Ranks],
    alone: dict[str, Path],
    world_size: int,
    size: int,
    transport: str,
    tmp_path: Path,
) -> None:
    """Three experts: P = 2 and P = 4 leave slots empty."""
    changes = {"expert_parallel_size": size, "expert_transport": transport}
    assert ranks[world_size](train_here, flags(inputs, tmp_path / "run", world_size, **changes)) == [None] * world_size
    assert_same_training(tmp_path / "run", alone["free"], tolerance=TOLERANCE)


@pytest.mark.parametrize(
    ("case", "changes", "tolerance"),
    [
        ("atoms", ATOMS, TOLERANCE),
        ("element", ELEMENT, LOOSE),
        ("per_expert", {"support_scope": "per_expert", "gradient_checkpointing": True}, TOLERANCE),
    ],
)
@pytest.mark.parametrize("transport", ["tokens", "deltas"])
def test_other_adapters(
    inputs: Inputs,
    ranks: dict[int, Ranks],
    alone: dict[str, Path],
    case: str,
    changes: dict[str, Any],
    tolerance: float,
    transport: str,
    tmp_path: Path,
) -> None:
    options = changes | {"expert_parallel_size": 2, "expert_transport": transport}
    assert ranks[4](train_here, flags(inputs, tmp_path / "run", 4, **options)) == [None] * 4
    assert_same_training(tmp_path / "run", alone[case], tolerance=tolerance)


@pytest.fixture(scope="module")
def four_two(inputs: Inputs, ranks: dict[int, Ranks], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("four_two") / "run"
    options = {"expert_parallel_size": 2, "save_steps": 2}
    assert ranks[4](train_here, flags(inputs, folder, 4, **options)) == [None] * 4
    return folder / "checkpoint-2"


@pytest.mark.parametrize(("world_size", "size"), [(1, 1), (2, 2), (3, 1), (6, 3)])
def test_a_checkpoint_goes_on_with_experts_elsewhere(
    inputs: Inputs,
    ranks: dict[int, Ranks],
    alone: dict[str, Path],
    four_two: Path,
    world_size: int,
    size: int,
    tmp_path: Path,
) -> None:
    """Saved after two of four steps by four ranks that shared the experts in pairs."""
    options = {"expert_parallel_size": size, "resume_from": str(four_two)}
    assert ranks[world_size](train_here, flags(inputs, tmp_path / "run", world_size, **options)) == [None] * world_size
    assert_same_training(tmp_path / "run", alone["free"], first_step=3, tolerance=TOLERANCE)


def test_a_size_that_does_not_divide_is_refused(inputs: Inputs, ranks: dict[int, Ranks], tmp_path: Path) -> None:
    messages = ranks[3](train_here, flags(inputs, tmp_path / "run", 3, expert_parallel_size=2))
    assert messages == ["expert_parallel_size=2: must divide the number of processes, 3."] * 3
