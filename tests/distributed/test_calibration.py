"""Supports by activation and gradient: those of a dense model with direct gradients, on any number of ranks."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoModelForCausalLM

from srde_ds.config import Config, resolve
from srde_ds.data.loader import collate
from srde_ds.errors import SRDEError
from srde_ds.model.supports.selection import support_size
from srde_ds.training.calibration import choose_rows
from tests.distributed.engine_helpers import run_steps, state, training_rows
from tests.distributed.harness import Ranks
from tests.distributed.training_helpers import DOMAINS, Inputs, cut

FORMS = [(granularity, scope) for granularity in ("neuron", "element") for scope in ("shared", "per_expert")]
STRATEGIES = ("activation", "gradient")
ROLES = ("gate_proj", "up_proj", "down_proj")


def flags(inputs: Inputs, folder: Path, **changes: Any) -> dict[str, Any]:
    """Four experts for three domains, and a number of rows that two ranks do not divide."""
    values = {"use_muon": False, "num_experts": 4, "calibration_rows": 5, "support_strategy": "gradient"}
    values |= cut(8, 1)
    return inputs.flags(folder, **(values | changes))


@contextmanager
def one_gradient_at_a_time() -> Iterator[list[int]]:
    """Fails if the gradient of one weight matrix is still there when the next one comes; yields the sizes of all."""
    from srde_ds.training import calibration

    held: list[weakref.ref[Tensor]] = []
    sizes: list[int] = []

    def watching(add: Callable[..., None]) -> Callable[..., None]:
        def watched(scores: Any, layer: int, role: str, squares: Tensor) -> None:
            assert not any(reference() is not None for reference in held)
            held.append(weakref.ref(squares))
            sizes.append(squares.numel())
            add(scores, layer, role, squares)

        return watched

    with ExitStack() as patches:
        for kind in (calibration._SummedGradientScores, calibration._ElementGradientScores):
            patches.enter_context(patch.object(kind, "_add", watching(kind._add)))
        yield sizes


def calibrated(options: dict[str, Any]) -> dict[str, list[Tensor]]:
    """The supports of all layers by each strategy."""
    from srde_ds.distributed.engine import build_engine, build_model
    from srde_ds.distributed.processes import start_processes
    from srde_ds.model.base_shape import base_shape
    from srde_ds.training.calibration import calibrate_supports

    config = resolve({}, options)
    topology = start_processes(60)
    engine = build_engine(build_model(config, topology), config, topology)
    found = {}
    for strategy in STRATEGIES:
        config = resolve({}, options | {"support_strategy": strategy})
        with one_gradient_at_a_time() as sizes:
            calibrate_supports(engine, config, topology, training_rows(config))
        matrices = {hidden * intermediate for hidden, intermediate in base_shape(config).blocks}
        assert set(sizes) == (matrices if strategy == "gradient" else set())
        found[strategy] = [layer.support.clone() for layer in engine.model.layers]
    return found


def dense_supports(config: Config) -> list[Tensor]:
    """From the whole base, with the gradients of its weights."""
    groups = choose_rows(config, training_rows(config))
    per_group = [dense_squares(config, rows, range(len(rows))) for rows in groups]
    everything = [[sum(parts) for parts in zip(*layers, strict=True)] for layers in zip(*per_group, strict=True)]
    own = per_group + [everything] * (config.adapter.num_experts - len(DOMAINS))
    supports = torch.stack([torch.stack([best(config, weights) for weights in group]) for group in own])
    return list(supports[0] if config.adapter.support_scope == "shared" else supports.transpose(0, 1))


def dense_squares(config: Config, rows: Any, indices: range) -> list[list[Tensor]]:
    """Squared scores of gate, up and down of each layer, summed over rows."""
    base = AutoModelForCausalLM.from_pretrained(str(config.model.model_name))
    parts = [[getattr(layer.mlp, role) for role in ROLES] for layer in base.model.layers]
    inputs: dict[Any, Tensor] = {}
    for part in sum(parts, []):
        part.register_forward_hook(lambda module, args, _: inputs.update({module: args[0].detach()}))
    squares = [[torch.zeros_like(part.weight) for part in layer] for layer in parts]
    for index in indices:
        row = collate(rows.with_format("numpy"), [index])
        logits = base(row["input_ids"], position_ids=row["position_ids"], use_cache=False).logits[0, :-1]
        loss = F.cross_entropy(logits, row["labels"][0, 1:], ignore_index=-100, reduction="sum")
        weights = [part.weight for layer in parts for part in layer]
        gradients = iter(torch.autograd.grad(loss, weights))
        for layer, sums in zip(parts, squares, strict=True):
            for part, total in zip(layer, sums, strict=True):
                gradient = next(gradients)
                if config.adapter.support_strategy == "activation":
                    gradient = inputs[part][0][row["token_mask"][0]].norm(dim=0)
                total += (part.weight.detach() * gradient).square()
    return squares


def best(config: Config, squares: list[Tensor]) -> Tensor:
    gate, up, down = squares
    scores = torch.cat([gate.flatten(), up.flatten(), down.flatten()])
    if config.adapter.granularity == "neuron":
        scores = gate.sum(1) + up.sum(1) + down.sum(0)
    size = support_size(config.adapter, gate.shape[1], gate.shape[0])
    return scores.argsort(descending=True)[:size].sort().values


@pytest.mark.parametrize(("granularity", "scope"), FORMS)
def test_supports_are_those_of_the_dense_model_on_any_number_of_ranks(
    inputs: Inputs, one_rank: Ranks, two_ranks: Ranks, tmp_path: Path, granularity: str, scope: str
) -> None:
    options = flags(inputs, tmp_path, granularity=granularity, support_scope=scope)
    alone = one_rank(calibrated, options)[0]
    for strategy in STRATEGIES:
        expected = dense_supports(resolve({}, options | {"support_strategy": strategy}))
        for found, support in zip(alone[strategy], expected, strict=True):
            assert found.tolist() == support.tolist()
        if scope == "per_expert":
            assert all(len(support.unique(dim=0)) > 1 for support in alone[strategy])
    changes: list[dict[str, Any]] = [{}, {"expert_parallel_size": 2, "gradient_checkpointing": True}]
    for change in changes:
        for found in two_ranks(calibrated, options | cut(8, 2) | change):
            for strategy in STRATEGIES:
                assert [s.tolist() for s in found[strategy]] == [s.tolist() for s in alone[strategy]]


def states_with_and_without_calibration(options: dict[str, Any]) -> list[list[Any]]:
    """Two steps after a calibration, and two with its supports given."""
    from srde_ds.distributed.engine import build_engine, build_model
    from srde_ds.distributed.processes import start_processes
    from srde_ds.training.calibration import calibrate_supports

    config = resolve({}, options)
    topology = start_processes(60)
    supports, states = None, []
    for _ in range(2):
        engine = build_engine(build_model(config, topology, supports=supports), config, topology)
        if supports is None:
            calibrate_supports(engine, config, topology, training_rows(config))
            supports = [layer.support.clone() for layer in engine.model.layers]
        assert engine.model.training and engine.model.routing.policy.active
        run_steps(engine, config, topology, steps=2)
        states.append(state(engine))
    return states


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("granularity", ["neuron", "element"])
def test_calibration_leaves_nothing_behind(
    inputs: Inputs, two_ranks: Ranks, tmp_path: Path, granularity: str, checkpointing: bool
) -> None:
    options = flags(inputs, tmp_path, granularity=granularity, gradient_checkpointing=checkpointing)
    for after, without in two_ranks(states_with_and_without_calibration, options):
        assert len(after) == len(without) > 0
        for piece, other in zip(after, without, strict=True):
            assert (piece.name, piece.kind, piece.offset) == (other.name, other.kind, other.offset)
            assert torch.equal(piece.data, other.data), (piece.name, piece.kind)
        assert any(piece.kind == "exp_avg" and bool(piece.data.any()) for piece in after)


def test_rows_are_drawn_by_seed_from_each_experts_domain(inputs: Inputs, tmp_path: Path) -> None:
    options = flags(inputs, tmp_path, support_scope="per_expert")
    config = resolve({}, options)
    rows = training_rows(config)
    groups = choose_rows(config, rows)
    assert [set(group["domain"]) for group in groups] == [{0}, {1}, {2}]
    assert all(len(group) == 5 for group in groups)
    again, other = (choose_rows(resolve({}, options | {"seed": seed}), rows) for seed in (42, 43))
    assert [group["input_ids"] for group in again] == [group["input_ids"] for group in groups]
    assert [group["input_ids"] for group in other] != [group["input_ids"] for group in groups]
    (few,) = choose_rows(resolve({}, options | {"support_scope": "shared", "calibration_rows": 1000}), rows)
    assert len(few) == len(rows)


def test_a_domain_without_rows_is_named(inputs: Inputs, tmp_path: Path) -> None:
    config = resolve({}, flags(inputs, tmp_path, support_scope="per_expert"))
    rows = training_rows(config)
    rows = rows.select([i for i, domain in enumerate(rows["domain"]) if domain != 1])
    with pytest.raises(SRDEError, match="support_strategy=gradient, support_scope=per_expert: domain 'green' has no"):
        choose_rows(config, rows)
    config.adapter.support_scope = "shared"
    assert len(choose_rows(config, rows)) == 1


def calibrate_without_responses(options: dict[str, Any]) -> str:
    from srde_ds.distributed.engine import build_engine, build_model
    from srde_ds.distributed.processes import start_processes
    from srde_ds.training.calibration import calibrate_supports

    config = resolve({}, options)
    topology = start_processes(60)
    engine = build_engine(build_model(config, topology), config, topology)
    rows = training_rows(config).map(lambda row: {"labels": [-100] * len(row["labels"])}, keep_in_memory=True)
    with pytest.raises(SRDEError) as error:
        calibrate_supports(engine, config, topology, rows)
    return str(error.value)


def test_rows_without_responses_are_refused(inputs: Inputs, two_ranks: Ranks, tmp_path: Path) -> None:
    for message in two_ranks(calibrate_without_responses, flags(inputs, tmp_path)):
        assert message.startswith("layer 0: its scores on the calibration rows are all zero")


def row_sums(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Both kinds of sums of `rows` and once more of the first half, on this rank."""
    import torch.distributed as dist

    from srde_ds.distributed.reproducible_sums import ReproducibleSum, ShardedReproducibleSum

    rank, world_size, cpu = dist.get_rank(), dist.get_world_size(), torch.device("cpu")
    sums = [(ReproducibleSum(rows.shape[1], cpu), ShardedReproducibleSum(rows.shape[1])) for _ in range(2)]
    for (plain, sharded), part in zip(sums, (rows, rows[: len(rows) // 2]), strict=True):
        for mine in part[rank::world_size]:
            plain.add(mine)
            sharded.add(mine)
    (plain, sharded), (other, other_sharded) = sums
    plain.merge(other)
    sharded.merge(other_sharded)
    assert sharded.part.numel() == -(-rows.shape[1] // world_size)
    return plain.total, sharded.whole(cpu)


def test_sums_over_rows_are_the_same_bit_for_bit_on_any_number_of_ranks(two_ranks: Ranks, four_ranks: Ranks) -> None:
    rows = torch.randn(16, 1001, generator=torch.Generator().manual_seed(0))
    plain, sharded = (
        sum(rows.to(dtype), torch.zeros(1001)) + sum(rows[:8].to(dtype), torch.zeros(1001))
        for dtype in (torch.float64, torch.float32)
    )
    assert not torch.equal(sum(rows.flip(0), torch.zeros(1001)), sum(rows, torch.zeros(1001)))  # the order matters
    for found in two_ranks(row_sums, rows) + four_ranks(row_sums, rows):
        assert torch.equal(found[0], plain) and torch.equal(found[1], sharded)
