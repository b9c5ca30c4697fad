"""What weights know about their domains: measured at the end of training, by all ranks together."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from srde_ds.data.loader import validation_batches
from srde_ds.data.manifest import load_manifest, load_rows
from srde_ds.data.packing import NO_LABEL
from srde_ds.data.tokenizer import load_tokenizer
from srde_ds.distributed.processes import Topology
from srde_ds.model.adapter import load_adapter
from srde_ds.model.adapter_source import open_adapter
from srde_ds.model.policy import RoutingPolicy
from srde_ds.model.prompt_routing import experts_of_prompts
from srde_ds.training.domain_statistics import set_routers
from srde_ds.training.warm_start.from_statistics import router_of
from srde_ds.training.warm_start.token_sample import FULL_GROUP, special_token_ids
from srde_ds.weights.file import read_weights
from srde_ds.weights.origins import DomainStatistics, Origins
from srde_ds.weights.schema import FACTORS, support_hash
from tests.distributed.harness import Ranks
from tests.distributed.training_helpers import DOMAINS, ROWS_PER_STEP, Inputs, cut, latest, train_here
from tests.helpers import randomize, tiny_srde

STEPS = {"max_steps": 2, "warmup_steps": 0, "save_steps": 0, "eval_steps": 0}
# Routers are set at the end, so what trains them is refused.
UNTRAINED: dict[str, float] = dict.fromkeys(("router_lr", "load_balancing_weight", "router_z_weight"), 0.0)
BY_DOMAIN: dict[str, Any] = UNTRAINED | {"training_phases": "by_domain"}


def expected_statistics(inputs: Inputs, weights: Path, *, by_domain: bool = False) -> list[DomainStatistics]:
    """Over all rows, in one go, from tokens that are neither padding nor the beginning of other domains, nor special
    without predicting a label.

    Each token counts twice: with experts and without. The prompts' last tokens, the answers and all others weigh a
    third of a domain each.
    """
    model = load_adapter(weights, base=inputs.base).eval()
    rows = load_rows(inputs.dataset, "train", load_manifest(inputs.dataset))
    special = torch.tensor(special_token_ids(load_tokenizer(inputs.base, revision=None)))
    seen: list[list[Tensor]] = [[] for _ in model.layers]
    for layer in model.layers:
        layer.register_forward_pre_hook(lambda layer, args: seen[layer.layer].append(args[0].flatten(0, 1).double()))
    domains, usable, beginnings, groups = [], [], [], []
    for batch in validation_batches(rows, 4):
        for active in (True, False):
            kept = {key: batch[key] for key in ("input_ids", "position_ids", "token_mask")}
            own = batch["domain"][:, None] if by_domain and active else None
            model(**kept, policy=RoutingPolicy(active=active, forced_experts=own))
        predicts = F.pad(batch["labels"][:, 1:], (0, 1), value=NO_LABEL) != NO_LABEL
        plain = ~torch.isin(batch["input_ids"], special) | predicts
        real = batch["token_mask"] & plain & (batch["row_index"] >= 0)[:, None]
        domains.append(batch["domain"][:, None].expand_as(real).flatten())
        usable.append(real.flatten())
        groups.append((predicts.long() * (1 + (batch["labels"] != NO_LABEL))).flatten())
        ids, positions = batch["input_ids"].tolist(), batch["position_ids"].tolist()
        for row, places in zip(ids, positions, strict=True):
            beginnings += [tuple(row[s - place : s + 1]) for s, place in enumerate(places)]
    domain, used = torch.cat(domains), torch.cat(usable)
    owners: dict[tuple[int, ...], set[int]] = {}
    for beginning, own, use in zip(beginnings, domain.tolist(), used.tolist(), strict=True):
        if use:
            owners.setdefault(beginning, set()).add(own)
    used &= torch.tensor([len(owners.get(beginning, ())) == 1 for beginning in beginnings])
    domain, group = domain[used], torch.cat(groups)[used]
    weight = torch.zeros(len(domain), dtype=torch.float64)
    for index in range(len(DOMAINS)):
        for which in range(3):
            own = (domain == index) & (group == which)
            assert own.sum() > FULL_GROUP
            weight[own] = 1 / int(own.sum())
    twice = (weight.repeat(2), domain.repeat(2))
    return [_statistics(torch.cat([torch.cat(chunks[half::2])[used] for half in (0, 1)]), *twice) for chunks in seen]


def _statistics(inputs_ND: Tensor, weight_N: Tensor, domain_N: Tensor) -> DomainStatistics:
    """Plainly, of each domain's weighted inputs."""
    found = []
    for index in range(len(DOMAINS)):
        x_ND, w_N = inputs_ND[domain_N == index], weight_N[domain_N == index]
        w_N = w_N / w_N.sum()
        mean = w_N @ x_ND
        centred = (x_ND - mean) * w_N.sqrt()[:, None]
        _, lengths, directions = torch.linalg.svd(centred, full_matrices=False)
        found.append((mean, centred.square().sum(0).sqrt(), (lengths[:, None] * directions)[:FACTORS]))
    return DomainStatistics(*(torch.stack(parts).float() for parts in zip(*found, strict=True)))


def statistics(folder: Path) -> list[DomainStatistics]:
    file = read_weights(folder / "srde_weights.safetensors")
    return Origins.of(file.metadata, file.tensors).statistics


def assert_close(found: list[DomainStatistics], expected: list[DomainStatistics], tolerance: float) -> None:
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours.mean, theirs.mean, rtol=0, atol=tolerance)
        torch.testing.assert_close(ours.spread, theirs.spread, rtol=0, atol=tolerance)
        for mine, other in zip(ours.factors, theirs.factors, strict=True):  # signs are free, and small ones approximate
            torch.testing.assert_close(mine.T @ mine, other.T @ other, rtol=0, atol=max(100 * tolerance, 0.02))


@torch.no_grad()
def test_they_are_those_of_the_trained_model_for_any_number_of_processes(
    inputs: Inputs, one_rank: Ranks, two_ranks: Ranks, tmp_path: Path
) -> None:
    alone, both = tmp_path / "alone", tmp_path / "both"
    flags: dict[str, Any] = STEPS | {"domain_statistics_rows": 1000}
    assert one_rank(train_here, inputs.flags(alone, **flags, **cut(ROWS_PER_STEP, 1))) == [None]
    assert two_ranks(train_here, inputs.flags(both, **flags)) == [None, None]
    expected = expected_statistics(inputs, alone / "srde_weights.safetensors")
    assert_close(statistics(alone), expected, 1e-5)
    assert_close(statistics(both), statistics(alone), 1e-3)
    metadata = read_weights(both / "srde_weights.safetensors").metadata
    manifest = load_manifest(inputs.dataset).splits["train"]
    (entry,) = metadata.history
    assert list(metadata.domain_tokens) == DOMAINS and min(metadata.domain_tokens.values()) > 100
    assert (entry["verb"], entry["steps"], entry["domains"]) == ("train", 2, "red, green, blue")
    assert (entry["data"], entry["dataset"]) == ("train.jsonl", manifest.content_sha256)
    checkpoint = open_adapter(both / latest(both))  # a checkpoint knows what its run's weights do
    assert checkpoint.metadata == metadata
    assert torch.equal(checkpoint.tensors["layers.1.domain_mean"].load(), statistics(both)[1].mean)


@pytest.mark.parametrize(
    ("rows", "form"), [(0, {}), (1, {"granularity": "element", "density": 0.002, "use_muon": False})]
)
def test_how_many_rows_are_run(
    inputs: Inputs, two_ranks: Ranks, tmp_path: Path, rows: int, form: dict[str, Any]
) -> None:
    flags = inputs.flags(tmp_path / "run", **(STEPS | form | {"domain_statistics_rows": rows}))
    assert two_ranks(train_here, flags) == [None, None]
    file = read_weights(tmp_path / "run" / "srde_weights.safetensors")
    assert list(file.metadata.domain_tokens) == (DOMAINS if rows else [])
    assert all(count <= rows * 96 for count in file.metadata.domain_tokens.values())
    assert ("layers.0.domain_mean" in file.tensors) == bool(rows)
    assert file.metadata.support_hash == support_hash(
        [file.tensors[f"layers.{layer}.support"].load() for layer in range(2)]
    )


def test_a_domain_without_rows_is_left_out(inputs: Inputs) -> None:
    from srde_ds.training.warm_start.token_sample import all_tokens

    rows = load_rows(inputs.dataset, "train", load_manifest(inputs.dataset))
    sample = all_tokens(rows, domains=[*DOMAINS, "law"], rows_a_domain=2, special_ids=[], seed=0)
    assert set(np.unique(sample.domain)) == {0, 1, 2}
    assert len(sample.rows) <= 6 and len(np.unique(sample.rows)) == len(sample.rows)


@torch.no_grad()
def test_experts_of_their_domains_alone_get_routers_at_the_end(
    inputs: Inputs, one_rank: Ranks, two_ranks: Ranks, tmp_path: Path
) -> None:
    alone, both = tmp_path / "alone", tmp_path / "both"
    flags: dict[str, Any] = STEPS | BY_DOMAIN | {"domain_statistics_rows": 1000}
    assert one_rank(train_here, inputs.flags(alone, **flags, **cut(ROWS_PER_STEP, 1))) == [None]
    assert two_ranks(train_here, inputs.flags(both, **flags)) == [None, None]
    found = statistics(alone)
    assert_close(found, expected_statistics(inputs, alone / "srde_weights.safetensors", by_domain=True), 1e-5)
    for layer, own in enumerate(found):
        name = f"layers.{layer}.router.weight"
        ours, theirs = (read_weights(run / "srde_weights.safetensors").tensors[name].load() for run in (alone, both))
        torch.testing.assert_close(ours, router_of(own, seed=42, layer=layer))
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0.02 * float(ours.abs().max()))
    lines = [json.loads(line) for line in (alone / "metrics.jsonl").read_text().splitlines()]
    assert [line["phase"] for line in lines] == ["by domain"] * 2
    model = load_adapter(alone / "srde_weights.safetensors", base=inputs.base).eval()
    rows = load_rows(inputs.dataset, "train", load_manifest(inputs.dataset))
    right = texts = 0
    for batch in validation_batches(rows, 1):
        prompt = (batch["position_ids"].cumsum(1) >= 0) & ((batch["labels"] != NO_LABEL).cumsum(1) == 0)
        expert = experts_of_prompts(model, batch["input_ids"], prompt, policy=RoutingPolicy())
        right, texts = right + int(expert[0, 0] == batch["domain"][0]), texts + 1
    assert right > 0.9 * texts > 10


def routers_set_from_equal_statistics(known: int) -> tuple[str, bool]:
    """What is said for three experts, of which `known` have statistics, and whether the routers are as before."""
    model = randomize(tiny_srde(num_experts=3))
    before = [layer.router.weight.clone() for layer in model.layers]
    same = torch.ones(known, model.layers[0].hidden)
    alike = DomainStatistics.independent(same, torch.zeros_like(same))
    model.origins = Origins([], {name: 10 for name in model.expert_names[:known]}, [alike] * len(model.layers))
    engine: Any = SimpleNamespace(model=model)
    said = set_routers(engine, Topology(dist.get_rank(), dist.get_world_size(), torch.device("cpu")), seed=0)
    return said, all(torch.equal(layer.router.weight, own) for layer, own in zip(model.layers, before, strict=True))


def test_selection_biases_of_earlier_routers_go(inputs: Inputs, one_rank: Ranks, tmp_path: Path) -> None:
    before, after = tmp_path / "before", tmp_path / "after"
    biased = STEPS | {"balancing_bias_rate": 0.5, "max_steps": 3}
    assert one_rank(train_here, inputs.flags(before, **biased, **cut(ROWS_PER_STEP, 1))) == [None]
    assert "layers.0.router_bias" in read_weights(before / "srde_weights.safetensors").tensors
    flags = inputs.flags(after, **STEPS, **BY_DOMAIN, start_from=str(before), top_k=2)
    assert one_rank(train_here, flags | cut(ROWS_PER_STEP, 1)) == [None]
    assert "layers.0.router_bias" not in read_weights(after / "srde_weights.safetensors").tensors


def test_a_run_that_ends_early_does_not_pretend_that_its_routers_are_set(
    inputs: Inputs, one_rank: Ranks, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = tmp_path / "run"
    flags = inputs.flags(run, **STEPS | BY_DOMAIN | {"save_steps": 1}, **cut(ROWS_PER_STEP, 1))
    assert one_rank(train_here, flags) == [None]
    early, last = run / "checkpoint-1", run / "checkpoint-2"
    (refused,) = one_rank(train_here, flags | {"max_steps": 1, "resume_from": str(early)})
    assert refused is not None and "routers are not set" in refused and "Give --max_steps 2 or more" in refused
    assert one_rank(train_here, flags | {"resume_from": str(last)}) == [None]  # a finished run
    open_adapter(early)
    assert "checkpoint-1': training_phases=by_domain sets the routers after the last step" in caplog.text
    caplog.clear()
    for finished in (last, run):
        assert open_adapter(finished).metadata.history[-1]["routing"] == "by domain"
    assert not caplog.text


@pytest.mark.parametrize(("known", "problem"), [(2, "there are no statistics of the domain"), (3, "are too similar")])
def test_without_statistics_that_differ_the_routers_stay_and_it_is_said(
    two_ranks: Ranks, known: int, problem: str
) -> None:
    for said, same in two_ranks(routers_set_from_equal_statistics, known):
        assert problem in said and same
