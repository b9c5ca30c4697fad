"""The routers' warm start on one and several processes, and the helpers of srde_ds/parallel that it uses."""

from __future__ import annotations

import gc
import time
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path
from typing import Any
from unittest.mock import patch

import datasets
import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from srde_ds.config import resolve
from srde_ds.data.build.from_files import RowsOfFiles, build_dataset
from srde_ds.data.manifest import load_manifest, load_rows
from srde_ds.errors import SRDEError
from srde_ds.model.attention import DOCUMENT_ATTENTION
from srde_ds.model.base import load_base
from srde_ds.model.policy import RoutingPolicy
from srde_ds.model.seeding import seeded_generator
from srde_ds.training.warm_start.clustering import TARGET_GAP, RouterFit, fit_router
from tests.data_helpers import tiny_tokenizer
from tests.distributed.harness import Ranks, run_distributed
from tests.distributed.test_domain_statistics import assert_close
from tests.distributed.training_helpers import DOMAINS, MAX_LENGTH, SEED, TEMPLATE, Inputs

METHODS = ["discriminant", "kmeans", "domain_means", "random"]
SAMPLES = 24


@contextmanager
def running_engine(flags: dict[str, Any]) -> Iterator[tuple[Any, Any, Any]]:
    """Engine, config and topology in this process of a group."""
    from srde_ds.distributed.engine import build_engine, build_model
    from srde_ds.distributed.processes import start_processes

    config = resolve({}, flags)
    topology = start_processes(60)
    model = build_model(config, topology)
    try:
        yield build_engine(model, config, topology), config, topology
    finally:
        del model
        gc.collect()  # engines hold cycles


def whole_shape(parameter: Any) -> tuple[int, ...]:
    cut = getattr(parameter, "srde_cut", None)
    return parameter.srde_shape if cut is None else cut.global_shape


def random_trainables(engine: Any) -> dict[str, Tensor]:
    """Values for all trainables, the same however they are placed."""
    return {
        name: 0.2 * torch.randn(whole_shape(parameter), generator=seeded_generator(7, name))
        for name, parameter in engine.model.trainable_parameters()
    }


def routers(engine: Any) -> list[Tensor]:
    from srde_ds.distributed.engine import gather

    found = []
    for layer in engine.model.layers:
        with gather([layer.router.weight]):
            found.append(layer.router.weight.detach().clone())
    return found


def training_rows(config: Any) -> datasets.Dataset:
    return load_rows(config.data.pretokenized_dir, "train", load_manifest(config.data.pretokenized_dir))


def best_expert_shares(engine: Any, rows: datasets.Dataset) -> list[float]:
    """By layer, over all real tokens of all rows: how many go first to their domain's expert."""
    from srde_ds.data.loader import validation_batches

    model = engine.model
    right = torch.zeros(len(model.layers))
    tokens = 0
    engine.deepspeed.eval()
    for batch in validation_batches(rows, 4):
        recorded: dict[int, Tensor] = {}
        with torch.no_grad():
            engine.forward(batch, RoutingPolicy(choices=recorded))
        mask = batch["token_mask"].flatten()
        domain = batch["domain"][:, None].expand_as(batch["input_ids"]).flatten()[mask]
        tokens += int(mask.sum())
        for layer, choices in recorded.items():
            right[layer] += (choices[mask, 0] == domain).sum()
    return (right / tokens).tolist()


def flags_of(inputs: Inputs, folder: Path, **changes: Any) -> dict[str, Any]:
    warm: dict[str, Any] = {"warm_start": True, "warm_start_method": "kmeans", "warm_start_samples": SAMPLES}
    warm |= {"supervised_experts": True, "expert_pretrain_steps": 1}
    return inputs.flags(folder, **(warm | changes))


def warm_started(flags: dict[str, Any]) -> dict[str, Any]:
    """Warm start of an engine whose trainables are random: report, routers before and after, and the whole state."""
    from srde_ds.distributed import zero_placement as placement
    from srde_ds.training.warm_start.routers import warm_start_routers

    with running_engine(flags) as (engine, config, topology):
        engine.set_trainables(random_trainables(engine))
        pieces = placement.state_slices(engine.deepspeed, engine.model, engine.optimizer)
        for piece in pieces:
            if piece.kind != "master":
                piece.data.fill_(0.5)
        before, masters = routers(engine), {p.name: p.data.clone() for p in pieces if p.kind == "master"}
        for layer in engine.model.layers:
            layer.router.load_selection_bias(torch.linspace(-0.5, 0.5, layer.router.selection_bias.numel()))
        report = warm_start_routers(engine, config, topology, training_rows(config))
        assert not any(bool(layer.router.selection_bias.any()) for layer in engine.model.layers)  # of other routers
        after = routers(engine)
        for piece in pieces:
            router = piece.name.endswith("router.weight")
            if piece.kind == "master" and router:
                # fp32, not rounded to the training dtype
                own = after[int(piece.name.split(".")[1])].flatten()[piece.offset : piece.offset + piece.data.numel()]
                torch.testing.assert_close(piece.data.to(own.dtype), own, rtol=0, atol=0)
            elif piece.kind == "master":
                torch.testing.assert_close(piece.data, masters[piece.name], rtol=0, atol=0)
            else:
                assert bool((piece.data == (0.0 if router else 0.5)).all()), f"{piece.name} {piece.kind}"
        assert engine.deepspeed.training and engine.model.routing.policy.forced_experts is None
        return {"report": asdict(report), "before": before, "after": after}


def assert_equal_results(found: list[dict[str, Any]], expected: dict[str, Any], *, tolerance: float) -> None:
    for result in found:
        assert result["report"]["cluster_sizes"] == expected["report"]["cluster_sizes"]
        assert result["report"]["samples"] == expected["report"]["samples"]
        for ours, theirs in zip(result["after"], expected["after"], strict=True):
            assert float((ours - theirs).abs().max()) <= tolerance * float(theirs.abs().max())


@pytest.fixture(scope="module")
def alone(inputs: Inputs, one_rank: Ranks, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """Results of one process by method."""
    folder = tmp_path_factory.mktemp("alone")
    return {m: one_rank(warm_started, flags_of(inputs, folder, warm_start_method=m))[0] for m in METHODS}


def test_one_process(alone: dict[str, dict[str, Any]]) -> None:
    shares = {}
    for method, result in alone.items():
        report = result["report"]
        assert report["method"] == method
        assert report["samples"] == {domain: SAMPLES for domain in DOMAINS}
        assert [sum(sizes) for sizes in report["cluster_sizes"]] == [3 * SAMPLES] * 2
        assert all(0 <= value <= 1 for value in report["normalized_mutual_information"])
        for before, after in zip(result["before"], result["after"], strict=True):
            assert before.shape == after.shape == (3, 30)
            assert float((before - after).abs().max()) > 0.01
        shares[method] = np.mean(report["own_domain_share"])
    assert min(shares["discriminant"], shares["domain_means"]) > shares["random"] + 0.1


@pytest.mark.parametrize("method", METHODS)
def test_two_processes_give_the_same_bits(
    inputs: Inputs, alone: dict[str, dict[str, Any]], two_ranks: Ranks, tmp_path: Path, method: str
) -> None:
    found = two_ranks(warm_started, flags_of(inputs, tmp_path, warm_start_method=method))
    assert_equal_results(found, alone[method], tolerance=0)


@pytest.mark.parametrize(("world_size", "transport"), [(2, "tokens"), (2, "deltas"), (4, "tokens")])
def test_expert_parallelism_changes_rounding_alone(
    inputs: Inputs,
    alone: dict[str, dict[str, Any]],
    two_ranks: Ranks,
    four_ranks: Ranks,
    tmp_path: Path,
    world_size: int,
    transport: str,
) -> None:
    flags = flags_of(inputs, tmp_path, expert_parallel_size=2, expert_transport=transport)
    found = (two_ranks if world_size == 2 else four_ranks)(warm_started, flags)
    assert_equal_results(found, alone["kmeans"], tolerance=1e-4)


@pytest.mark.parametrize(
    "changes",
    [
        {"granularity": "element", "num_atoms": 4, "support_scope": "per_expert"},
        {"num_atoms": 4, "bf16": True, "gradient_checkpointing": True, "batch_size": 2},
        {"num_experts": 5, "expert_parallel_size": 2},
        {"deepspeed_config": None},  # keeps these small parameters whole on every rank
    ],
    ids=["elements", "bf16-atoms-checkpointing", "more-experts", "persistent"],
)
def test_other_configurations(inputs: Inputs, two_ranks: Ranks, tmp_path: Path, changes: dict[str, Any]) -> None:
    first, second = two_ranks(warm_started, flags_of(inputs, tmp_path, **changes))
    assert first["report"] == second["report"]
    assert [sum(sizes) for sizes in first["report"]["cluster_sizes"]] == [3 * SAMPLES] * 2
    for ours, theirs in zip(first["after"], second["after"], strict=True):
        assert torch.equal(ours, theirs) and bool(ours.isfinite().all())


def inputs_under_routing(flags: dict[str, Any]) -> dict[str, Any]:
    """What the second layer's router gets in a warm start with these flags; every expert's deltas are large."""
    from srde_ds.training.warm_start import routers as warm_start

    seen: list[np.ndarray] = []

    def keep(inputs: np.ndarray, *args: Any, **kwargs: Any) -> RouterFit:
        seen.append(inputs)
        return fit_router(inputs, *args, **kwargs)

    with running_engine(flags) as (engine, config, topology), patch.object(warm_start, "fit_router", keep):
        engine.set_trainables(random_trainables(engine))
        warm_start.warm_start_routers(engine, config, topology, training_rows(config))
    return {"seen": seen}


def test_inputs_are_those_with_trained_experts_each_on_its_domain(
    inputs: Inputs, one_rank: Ranks, tmp_path: Path
) -> None:
    """The first layer's inputs do not depend on experts, the second's do: on those that the routing gives."""
    supervised = flags_of(inputs, tmp_path)
    alone = {
        key: value for key, value in supervised.items() if key not in ("supervised_experts", "expert_pretrain_steps")
    }
    forced, routed = (one_rank(inputs_under_routing, flags)[0]["seen"] for flags in (supervised, alone))
    np.testing.assert_array_equal(forced[0], routed[0])
    assert np.abs(forced[1] - routed[1]).max() > 0.01


def planted_base(folder: Path, base: str) -> Path:
    """The shared tiny base with embeddings of tokens 30-59, 60-89 and 90-119 around three directions."""
    from srde_ds.data.tokenizer import load_tokenizer

    model = load_base(base, dtype=torch.float32)
    generator = torch.Generator().manual_seed(0)
    centres = torch.linalg.qr(torch.randn(30, 3, generator=generator))[0].T
    with torch.no_grad():
        embedding: Any = model.get_input_embeddings().weight
        for domain, centre in enumerate(centres):
            first = 30 * (domain + 1)
            embedding[first : first + 30] = centre + 0.05 * torch.randn(30, 30, generator=generator)
    model.save_pretrained(folder)
    load_tokenizer(base).save_pretrained(folder)
    return folder


def planted_rows() -> datasets.Dataset:
    generator = np.random.default_rng(0)
    domain = np.repeat(np.arange(3), 8)
    columns: dict[str, Any] = {
        "input_ids": generator.integers(0, 30, (24, 32)) + 30 * (domain[:, None] + 1),
        "labels": np.full((24, 32), 5),
        "position_ids": np.tile(np.arange(32), (24, 1)),
        "domain": domain,
        "length": np.full(24, 28),
    }
    return datasets.Dataset.from_dict(columns)


def warm_started_on_planted_rows(flags: dict[str, Any]) -> dict[str, Any]:
    from srde_ds.training.warm_start.routers import warm_start_routers

    rows = planted_rows()
    with running_engine(flags) as (engine, config, topology):
        before = best_expert_shares(engine, rows)
        report = warm_start_routers(engine, config, topology, rows)
        return {"report": asdict(report), "before": before, "after": best_expert_shares(engine, rows)}


@pytest.mark.parametrize("method", METHODS)
def test_planted_domains_are_recovered(inputs: Inputs, two_ranks: Ranks, tmp_path: Path, method: str) -> None:
    base = planted_base(tmp_path / "base", inputs.base)
    flags = flags_of(inputs, tmp_path / "run", model_name=str(base), warm_start_method=method)
    for result in two_ranks(warm_started_on_planted_rows, flags):
        nmi, share = result["report"]["normalized_mutual_information"], result["report"]["own_domain_share"]
        if method == "random":
            assert max(nmi) < 0.9 and max(result["after"]) < 0.9
        else:
            assert max(result["before"]) < 0.9
            assert min(nmi) > 0.99 and min(share) > 0.99 and min(result["after"]) > 0.99


def measured_with(attention: str, flags: dict[str, Any]) -> dict[str, Any]:
    """Statistics and routers with this attention, and whether each forward told the base its documents."""
    from srde_ds.training.domain_statistics import measure_domains
    from srde_ds.training.warm_start.routers import warm_start_routers

    told = set()

    def look(base: Any, args: Any, inputs: dict[str, Any]) -> None:
        told.add("documents" in inputs and inputs["attention_mask"].shape == (1, 1, 1, 1))

    with running_engine(flags) as (engine, config, topology):
        base, rows = engine.model.base, training_rows(config)
        base.register_forward_pre_hook(look, with_kwargs=True)
        base.config._attn_implementation = attention
        engine.set_trainables(random_trainables(engine))
        measure_domains(engine, config, topology, rows)
        warm_start_routers(engine, config, topology, rows)
        return {"told": told, "statistics": engine.model.origins.statistics, "routers": routers(engine)}


@pytest.mark.parametrize("packing", [True, False])
def test_long_rows_are_measured_without_a_mask_over_all_pairs(
    inputs: Inputs, two_ranks: Ranks, tmp_path: Path, packing: bool
) -> None:
    rows = RowsOfFiles(inputs.jsonl, None, DOMAINS, max_length=MAX_LENGTH, too_long="error", seed=SEED, packing=packing)
    build_dataset(rows, tmp_path / "dataset", tiny_tokenizer(TEMPLATE))
    changes = {"pretokenized_dir": str(tmp_path / "dataset"), "packing": packing, "eval_steps": 0}
    flags = flags_of(inputs, tmp_path / "run", **changes)
    masked = two_ranks(measured_with, "sdpa", flags)[0]
    for found in two_ranks(measured_with, DOCUMENT_ATTENTION, flags):
        assert (found["told"], masked["told"]) == ({True}, {False})
        assert_close(found["statistics"], masked["statistics"], 1e-5)
        for ours, theirs in zip(found["routers"], masked["routers"], strict=True):
            assert float((ours - theirs).abs().max()) <= 1e-4 * float(theirs.abs().max())


def layers_in_memory(flags: dict[str, Any]) -> dict[str, Any]:
    """How many layers' inputs this rank still holds when the next ones are gathered, and how many rows come."""
    from srde_ds.distributed.processes import gather_to_main
    from srde_ds.training.warm_start import routers as warm_start

    alive: list[int] = []
    gathered: list[int | None] = []
    held: list[weakref.ref[Any]] = []

    def gather(*args: Any) -> Tensor | None:
        alive.append(sum(reference() is not None for reference in held))
        rows = gather_to_main(*args)
        gathered.append(None if rows is None else len(rows))
        held.extend([] if rows is None else [weakref.ref(rows)])
        return rows

    def fit(inputs: np.ndarray, *args: Any, **kwargs: Any) -> RouterFit:
        held.append(weakref.ref(inputs))
        return fit_router(inputs, *args, **kwargs)

    with (
        running_engine(flags) as (engine, config, topology),
        patch.object(warm_start, "gather_to_main", gather),
        patch.object(warm_start, "fit_router", fit),
    ):
        warm_start.warm_start_routers(engine, config, topology, training_rows(config))
    return {"alive": alive, "gathered": gathered, "arrays": len(held)}


def test_rank_0_holds_one_layer_at_a_time(inputs: Inputs, two_ranks: Ranks, tmp_path: Path) -> None:
    main, other = two_ranks(layers_in_memory, flags_of(inputs, tmp_path))
    assert main == {"alive": [0, 0], "gathered": [3 * SAMPLES] * 2, "arrays": 4}
    assert other == {"alive": [0, 0], "gathered": [None, None], "arrays": 0}


def warm_start_with_failure(flags: dict[str, Any], kind: str) -> str:
    from srde_ds.training.warm_start import routers as warm_start

    def fail(*args: Any, **kwargs: Any) -> RouterFit:
        raise SRDEError("planted") if kind == "user" else RuntimeError("planted bug")

    with running_engine(flags) as (engine, config, topology), patch.object(warm_start, "fit_router", fail):
        try:
            warm_start.warm_start_routers(engine, config, topology, training_rows(config))
        except (SRDEError, RuntimeError) as error:
            return f"{type(error).__name__}: {error}"
    return ""


def test_errors_on_rank_0_reach_all_ranks(inputs: Inputs, two_ranks: Ranks, tmp_path: Path) -> None:
    flags = flags_of(inputs, tmp_path)
    assert two_ranks(warm_start_with_failure, flags, "user") == ["SRDEError: planted"] * 2
    main, other = two_ranks(warm_start_with_failure, flags, "bug")
    assert main == "RuntimeError: planted bug"
    assert other == "SRDEError: rank 0: an unforeseen error, see its traceback (RuntimeError)"


TIMEOUT, SLOW = 3, 5  # seconds


def set_timeout(seconds: float) -> None:
    dist.distributed_c10d._set_pg_timeout(timedelta(seconds=seconds))


def slow_warm_start(flags: dict[str, Any]) -> float:
    """Clustering one layer takes longer than a collective may wait; the seconds that all layers took."""
    from srde_ds.training.warm_start import routers as warm_start

    def slow(*args: Any, layer: int, **kwargs: Any) -> RouterFit:
        time.sleep(SLOW if layer == 0 else 0)
        return fit_router(*args, layer=layer, **kwargs)

    def cluster_layers(*args: Any) -> list[RouterFit]:
        set_timeout(TIMEOUT)
        seconds.append(time.monotonic())
        fits = original(*args)
        seconds.append(time.monotonic())
        set_timeout(60)
        return fits

    seconds: list[float] = []
    original = warm_start.cluster_layers
    with (
        running_engine(flags) as (engine, config, topology),
        patch.object(warm_start, "fit_router", slow),
        patch.object(warm_start, "cluster_layers", cluster_layers),
    ):
        warm_start.warm_start_routers(engine, config, topology, training_rows(config))
    return seconds[1] - seconds[0]


def slow_main_rank() -> str:
    """What a rank sees that waits in one collective; rank 0 does not communicate before it must."""
    from srde_ds.distributed.processes import start_processes
    from srde_ds.utils.together import on_main_rank

    topology = start_processes(60)
    set_timeout(TIMEOUT)
    try:
        on_main_rank(lambda: time.sleep(SLOW), topology)
    except RuntimeError as error:
        return str(error)
    return "" if topology.is_main else "no timeout"


def test_clustering_may_take_longer_than_a_collective_waits(inputs: Inputs, tmp_path: Path) -> None:
    assert all(seconds > SLOW for seconds in run_distributed(slow_warm_start, 2, flags_of(inputs, tmp_path)))
    # The same wait inside one collective fails, so the test above can.
    _, other = run_distributed(slow_main_rank, 2)
    assert "imed out" in other


def written(flags: dict[str, Any]) -> dict[str, Any]:
    """Every trainable set to given values: what state_slices and the gathered parameters hold then."""
    from srde_ds.distributed import zero_placement as placement
    from srde_ds.distributed.engine import gather

    with running_engine(flags) as (engine, _, _):
        values = random_trainables(engine)
        engine.set_trainables(values)
        pieces = placement.state_slices(engine.deepspeed, engine.model, engine.optimizer)
        masters = {name: torch.full(value.shape, torch.nan) for name, value in values.items()}
        for piece in pieces:
            if piece.kind == "master":
                strides = (1,) if piece.data.dim() == 1 else (piece.stride, 1)
                masters[piece.name].as_strided(piece.data.shape, strides, piece.offset).copy_(piece.data)
        errors = []
        for bad in ({"layers.0.router.bias": torch.zeros(3)}, {"layers.0.router.weight": torch.zeros(3, 2)}):
            with pytest.raises(SRDEError) as caught:
                engine.set_trainables(bad)
            errors.append(str(caught.value))
        parameters = {}
        for name, parameter in engine.model.trainable_parameters():
            with gather([parameter]):
                own: Any = parameter
                real = own.detach()[: own.srde_shape[0]]
                cut = getattr(own, "srde_cut", None)
                if cut is not None:
                    real = real.narrow(cut.axis, 0, cut.entries)
                    values[name] = values[name].narrow(cut.axis, cut.first, cut.entries)
                parameters[name] = float((real - values[name]).abs().max()) if real.numel() else 0.0
        return {"masters": masters, "parameters": parameters, "errors": errors}


@pytest.mark.parametrize("changes", [{}, {"expert_parallel_size": 2}, {"num_atoms": 4, "expert_parallel_size": 2}])
def test_set_trainables_reaches_masters_and_parameters(
    inputs: Inputs, four_ranks: Ranks, tmp_path: Path, changes: dict[str, Any]
) -> None:
    results = four_ranks(written, inputs.flags(tmp_path, **changes))
    for name in results[0]["masters"]:
        parts = torch.stack([result["masters"][name] for result in results])
        expected = 0.2 * torch.randn(parts.shape[1:], generator=seeded_generator(7, name))
        assert bool((parts.isfinite().sum(0) == 1).all()), name  # each value on one rank
        assert torch.equal(parts.nan_to_num(0).sum(0), expected), name
    for result in results:
        assert max(result["parameters"].values()) == 0
        assert result["errors"][0].startswith("'layers.0.router.bias' is not a trainable of this model")
        assert result["errors"][1] == "'layers.0.router.weight': shape [3, 2], expected [3, 30]."


def test_gap_is_written_into_the_routers(alone: dict[str, dict[str, Any]]) -> None:
    """Centred weights of a length that gives logits of the target's order on these inputs."""
    for result in alone.values():
        for weight in result["after"]:
            assert float(weight.mean(0).abs().max()) < 1e-5 * float(weight.abs().max())
            assert 0.05 * TARGET_GAP < float(weight.norm(dim=1).max()) < 50 * TARGET_GAP
