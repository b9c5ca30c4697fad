"""A step's numbers from summed statistics, and the watch for experts that do not learn."""

from __future__ import annotations

import math
from unittest.mock import patch

import pytest
import torch
from torch import Tensor

from srde_ds.errors import SRDEError
from srde_ds.training.reporting import step_metrics
from srde_ds.training.reporting.step_metrics import SILENT_ASSIGNMENTS, ExpertWatch, expert_metrics, sum_over_ranks


def sums(assignments: list[list[float]], top_k: int = 2) -> dict[str, Tensor]:
    """Statistics of a router that gives every expert the same probability."""
    counts = torch.tensor(assignments, dtype=torch.float64)
    tokens = counts.sum(dim=1) / top_k
    experts = counts.shape[1]
    return {
        "assignments": counts,
        "tokens": tokens,
        "probability_sum": tokens.unsqueeze(1).expand(-1, experts) / experts,
        "entropy_sum": tokens * math.log(experts),
        "z_sum": tokens * 0.25,
        "delta_gradient_square": torch.arange(counts.numel(), dtype=torch.float64).view_as(counts),
    }


def test_expert_metrics_by_hand() -> None:
    # Two layers, three experts, top-2: ten tokens in the first layer and ten in the second.
    metrics = expert_metrics(sums([[10, 6, 4], [8, 8, 4]]))
    assert metrics["tokens_per_expert"] == [9.0, 7.0, 4.0]
    assert sum(metrics["tokens_per_expert"]) == 2 * 10
    assert metrics["expert_gradient_norm"] == pytest.approx([math.sqrt(3), math.sqrt(5), math.sqrt(7)])
    assert metrics["router_entropy"] == pytest.approx(math.log(3))
    assert metrics["load_balancing_loss"] == pytest.approx(1.0)  # equal probabilities: 1 whatever the shares
    assert metrics["router_z_loss"] == pytest.approx(0.25)


def test_load_balancing_loss_grows_with_what_probability_and_share_agree_on() -> None:
    statistics = sums([[20, 0]], top_k=1)
    statistics["probability_sum"] = torch.tensor([[20.0, 0.0]], dtype=torch.float64)
    assert expert_metrics(statistics)["load_balancing_loss"] == pytest.approx(2.0)


def test_a_silent_expert_with_tokens_stops_the_run_by_name() -> None:
    watch = ExpertWatch(["math", "code"])
    half = SILENT_ASSIGNMENTS / 2
    watch.check(1, [half, half], [0.5, 0.0])
    with pytest.raises(SRDEError, match=f"step 2: expert 'code' got {SILENT_ASSIGNMENTS} token assignments"):
        watch.check(2, [half, half], [0.5, 0.0])


def test_a_gradient_or_a_lack_of_tokens_keeps_the_watch_quiet() -> None:
    watch = ExpertWatch(["math", "code"])
    for step in range(5):  # a gradient now and then starts the count anew
        watch.check(step, [SILENT_ASSIGNMENTS / 2, 0.0], [float(step % 2), 0.0])
    assert watch.silent[1] == 0.0


def test_sums_are_taken_in_one_collective_and_keep_names_and_shapes() -> None:
    tensors = {"a": torch.tensor([[1.5, 2.5]]), "b": torch.tensor(3), "c": torch.tensor([2**53 + 2])}
    calls: list[Tensor] = []

    def double(flat: Tensor) -> Tensor:
        calls.append(flat)
        return flat * 2

    with patch.object(step_metrics, "all_reduce_sum", double):
        result = sum_over_ranks(tensors, torch.device("cpu"))
    assert len(calls) == 1
    assert calls[0].dtype == torch.float64
    assert {name: tensor.tolist() for name, tensor in result.items()} == {
        "a": [[3.0, 5.0]],
        "b": 6.0,
        "c": [2.0**54 + 4],
    }
