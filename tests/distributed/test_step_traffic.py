"""The bytes of a whole optimizer step, DeepSpeed's collectives included, against the cost model."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from srde_ds.config import resolve
from srde_ds.data.tokenizer import load_tokenizer
from srde_ds.distributed.workload import Workload
from srde_ds.model.base_shape import base_shape
from srde_ds.planner.traffic import step_traffic
from tests.distributed.harness import Ranks
from tests.distributed.measures import Received, count_collectives, train_measuring
from tests.distributed.training_helpers import Inputs
from tests.helpers import tiny_llama

ATOMS = {"num_atoms": 4}
CHECKPOINTING = {"gradient_checkpointing": True}
SELECTIVE = {"recompute": "selective"}
# Two experts, both chosen by each token: as many rows leave a rank as the model assumes, whatever the router learns.
TOKENS = {"expert_transport": "tokens", "num_experts": 2, "top_k": 2}
RESIDENT = {"base_placement": "resident"}
# Far below the tiny base's 33,000 values, so that weights are released and gathered again.
SCARCE = {
    "stage3_param_persistence_threshold": 0,
    "stage3_max_reuse_distance": 1000,
    "stage3_prefetch_bucket_size": 500,
}
SOME_STAY = {"stage3_param_persistence_threshold": 1000, "stage3_max_reuse_distance": 20_000}
# Not modelled: a number for each group of equal gradients' norm, stop flags, token counts, rows of an all-to-all. On
# every rank, in bytes; a few hundred are less than 0.3 % of the smallest step here.
FEW_NUMBERS = 400

NAMES = {
    "all_gather": "all_gather_single",
    "reduce_scatter": "reduce_scatter_single",
    "all_reduce": "allreduce",
    "all_to_all": "all_to_all_single",
}


def counted(flags: dict[str, Any]) -> dict[tuple[str, int], float]:
    """Bytes that this rank receives in the second step, by operation and size of the group."""
    received: Received = train_measuring(flags, 2, count_collectives)
    found: Counter[tuple[str, int]] = Counter()
    for (operation, ranks, _), size in received.bytes.items():
        if ranks > 1:
            found[operation, ranks] += size
    return dict(found)


def check(ranks: Ranks, flags: dict[str, Any]) -> None:
    config = resolve({}, flags)
    expected: Counter[tuple[str, int]] = Counter()
    whole_base = config.parallel.whole_base(ranks.world_size)
    for traffic in step_traffic(Workload.of(config, ranks.world_size), base_shape(config)):
        assert not (whole_base and traffic.kind == "base gathered")
        expected[NAMES[traffic.operation], traffic.ranks] += traffic.received  # type: ignore[assignment]
    for found in ranks(counted, flags):
        for entry in found.keys() | expected.keys():
            assert 0 <= found.get(entry, 0) - expected[entry] <= FEW_NUMBERS, (entry, found.get(entry), expected[entry])


def two_steps(inputs: Inputs, folder: Path, zero: dict[str, int], **options: Any) -> dict[str, Any]:
    (folder / "ds.json").write_text(json.dumps({"zero_optimization": {"stage": 3} | zero}))
    once = {"max_steps": 2, "warmup_steps": 1, "eval_steps": 0, "save_steps": 0, "log_steps": 100}
    once["domain_statistics_rows"] = 0
    own = once | {"gradient_accumulation_steps": 2, "deepspeed_config": str(folder / "ds.json")}
    return inputs.flags(folder / "run", **own | options)


@pytest.mark.parametrize(
    ("size", "options", "zero"),
    [
        ((2, 1), {}, {}),
        ((2, 1), CHECKPOINTING, {}),
        ((2, 1), {}, SCARCE),
        ((2, 1), CHECKPOINTING, SCARCE),
        ((2, 1), CHECKPOINTING, SOME_STAY),
        ((2, 1), SELECTIVE, SCARCE),
        ((2, 1), {"shared_expert_density": 0.1}, SCARCE),
        ((2, 1), ATOMS | CHECKPOINTING, SCARCE),
        ((2, 1), ATOMS | {"owner_computes": False}, SCARCE),
        ((2, 1), {"granularity": "element", "use_muon": False}, {}),
        ((2, 1), {"neuron_parts": 3}, SCARCE),
        ((2, 1), RESIDENT, {}),
        ((2, 1), RESIDENT | ATOMS | CHECKPOINTING, SCARCE),
        ((2, 2), RESIDENT | TOKENS | CHECKPOINTING, SCARCE),
        ((2, 2), {}, {}),
        ((2, 2), CHECKPOINTING, SCARCE),
        ((2, 2), TOKENS, {}),
        ((2, 2), TOKENS | CHECKPOINTING, {}),
        ((2, 2), TOKENS | SELECTIVE, {}),
        ((2, 2), TOKENS | {"granularity": "element", "use_muon": False}, {}),
        ((4, 2), {}, {}),
        ((4, 2), CHECKPOINTING, SOME_STAY),
        ((4, 2), ATOMS | {"granularity": "element"}, {}),
        ((4, 2), ATOMS | {"owner_computes": False}, {}),
        ((4, 2), ATOMS | TOKENS | CHECKPOINTING, {}),
        ((4, 2), RESIDENT, SOME_STAY),
    ],
)
def test_counted_bytes_are_those_of_the_cost_model(
    inputs: Inputs,
    two_ranks: Ranks,
    four_ranks: Ranks,
    tmp_path: Path,
    size: tuple[int, int],
    options: dict[str, Any],
    zero: dict[str, int],
) -> None:
    world_size, expert_parallel_size = size
    ranks = two_ranks if world_size == 2 else four_ranks
    check(ranks, two_steps(inputs, tmp_path, zero, expert_parallel_size=expert_parallel_size, **options))


@pytest.mark.parametrize("options", [{}, CHECKPOINTING])
def test_limits_that_bind_as_for_a_large_base(
    inputs: Inputs, two_ranks: Ranks, tmp_path: Path, options: dict[str, Any]
) -> None:
    """Eight layers, of which three may be whole at a time, and an embedding as large as two: the 14 B's proportions."""
    base = tiny_llama(vocab_size=915, num_hidden_layers=8, tie_word_embeddings=False)
    base.save_pretrained(tmp_path / "base")
    load_tokenizer(inputs.base).save_pretrained(tmp_path / "base")
    zero = {
        "stage3_param_persistence_threshold": 350,
        "stage3_max_reuse_distance": 45_000,
        "stage3_max_live_parameters": 45_000,
        "stage3_prefetch_bucket_size": 2500,
    }
    check(two_ranks, two_steps(inputs, tmp_path, zero, model_name=str(tmp_path / "base"), **options))
