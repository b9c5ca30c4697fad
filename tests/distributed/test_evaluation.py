"""Two processes that share an evaluation: the figures of one process, written once; and what ends both."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from srde_ds.errors import SRDEError
from srde_ds.evaluation.command import evaluate_command
from srde_ds.evaluation.options import EvaluateOptions
from srde_ds.evaluation.processes import Processes, launched_processes
from tests.distributed.harness import Ranks
from tests.evaluation_helpers import save_model, scored_records, write_jsonl


@pytest.fixture(scope="module")
def options(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("evaluated")
    write_jsonl(folder / "held_out.jsonl", scored_records())
    run = save_model(folder).parent
    given: dict[str, Any] = {
        "weights": str(run),
        "eval_file": str(folder / "held_out.jsonl"),
        "base": str(folder / "base"),
    }
    given |= {"compare_baseline": True, "each_expert": True, "run_code": True, "max_samples": 100, "seed": 1}
    return given | {"max_new_tokens": 4, "batch_size": 4, "bf16": False, "output_file": None}


def _approximately(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _approximately(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [_approximately(entry) for entry in value]
    return pytest.approx(value, rel=1e-5, abs=1e-6) if isinstance(value, float) else value


def _evaluate_on_rank(options: dict[str, Any]) -> dict[str, Any]:
    folder = Path(options["output_file"]).parent / f"rank{dist.get_rank()}"
    return evaluate_command(EvaluateOptions(**options | {"output_file": str(folder / "evaluation.json")}))


def test_two_processes_give_the_figures_of_one(options: dict[str, Any], two_ranks: Ranks, tmp_path: Path) -> None:
    alone = evaluate_command(EvaluateOptions(**options | {"output_file": str(tmp_path / "alone.json")}))
    shared = two_ranks(_evaluate_on_rank, options | {"output_file": str(tmp_path / "any.json")})
    assert sorted(path.name for path in (tmp_path / "rank0").iterdir()) == ["evaluation.json", "evaluation_items.jsonl"]
    assert not (tmp_path / "rank1").exists()
    assert json.loads((tmp_path / "rank0" / "evaluation.json").read_text()) == shared[0]
    for result in shared:
        assert {key: result[key] for key in result if key != "run"} == _approximately(
            {key: alone[key] for key in alone if key != "run"}
        )
    items = [
        [json.loads(line) for line in path.read_text().splitlines()]
        for path in (tmp_path / "alone_items.jsonl", tmp_path / "rank0" / "evaluation_items.jsonl")
    ]
    assert items[1] == _approximately(items[0])


def _fewer_items_than_processes(options: dict[str, Any]) -> int:
    result = evaluate_command(EvaluateOptions(**options | {"max_samples": 1}))
    return int(result["overall"]["srde"]["items"])


def test_a_process_may_be_left_without_items(options: dict[str, Any], two_ranks: Ranks, tmp_path: Path) -> None:
    assert two_ranks(_fewer_items_than_processes, options | {"output_file": str(tmp_path / "one.json")}) == [1, 1]


def _other_items(options: dict[str, Any]) -> str:
    target = Path(options["output_file"])
    mine = target.with_name(f"items{dist.get_rank()}.jsonl")
    write_jsonl(mine, scored_records()[dist.get_rank() :])
    with pytest.raises(SRDEError) as caught:
        evaluate_command(EvaluateOptions(**options | {"eval_file": str(mine)}))
    return str(caught.value)


def test_processes_with_other_items_are_refused(options: dict[str, Any], two_ranks: Ranks, tmp_path: Path) -> None:
    messages = two_ranks(_other_items, options | {"output_file": str(tmp_path / "any.json")})
    assert all("held-out items differ between processes" in message for message in messages)


def _one_fails() -> str:
    def work() -> str:
        if dist.get_rank() == 1:
            raise SRDEError("item 7 is too long")
        return "done"

    with launched_processes() as processes:
        assert processes == Processes(dist.get_rank(), 2)
        try:
            processes.together(work)
        except SRDEError as error:
            return str(error)
        except SystemExit as end:
            return f"exit {end.code}"
    return "nothing happened"


def test_an_error_on_one_ends_both_and_is_told_once(two_ranks: Ranks) -> None:
    assert two_ranks(_one_fails) == ["exit 2", "item 7 is too long"]


def test_items_are_dealt_out_evenly() -> None:
    costs = [5, 9, 1, 7, 3, 8]
    shares = [Processes(rank, 4).share(costs) for rank in range(4)]
    assert sorted(index for share in shares for index in share) == list(range(6))
    assert shares == [[1, 4], [5, 2], [3], [0]]
