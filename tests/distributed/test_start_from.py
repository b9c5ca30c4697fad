"""Runs that go on with trained experts: all of them, with new ones, or with some locked bit for bit."""

from __future__ import annotations

import os
import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path
from pkgutil import resolve_name
from signal import SIGTERM
from typing import Any
from unittest.mock import patch

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from srde_ds.checkpoint import resume
from srde_ds.checkpoint.resume import load_run_state
from srde_ds.config import Config, resolve
from srde_ds.data.tokenizer import load_tokenizer
from srde_ds.errors import SRDEError
from srde_ds.model.adapter import load_adapter
from srde_ds.model.base_files import BaseFiles
from srde_ds.model.policy import RoutingPolicy
from srde_ds.training.run_inputs import check_start, read_run_inputs
from srde_ds.utils.files import file_hash
from srde_ds.weights.file import read_metadata, save_weights
from tests.data_helpers import sums, write_jsonl
from tests.distributed.harness import Ranks
from tests.distributed.training_helpers import (
    DOMAINS,
    ROWS_PER_STEP,
    Inputs,
    cut,
    latest,
    metrics,
    train_here,
    weights,
    without_clocks,
)
from tests.helpers import tokens

SHORT: dict[str, Any] = {"max_steps": 2, "warmup_steps": 0, "save_steps": 0, "eval_steps": 0}
AT_RANDOM = SHORT | {"support_strategy": "random"}
STANDSTILL: dict[str, Any] = {"muon_lr": 0, "learning_rate": 0, "router_lr": 0}
FORMS: dict[str, dict[str, Any]] = {
    "neuron": {},
    "own supports": {"support_scope": "per_expert"},
    "shared expert": {"shared_expert_density": 0.05},
    "element": {"granularity": "element", "density": 0.005, "use_muon": False, "support_scope": "per_expert"},
}


@pytest.fixture(scope="module")
def law(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Records of a fourth domain alone."""
    return str(write_jsonl(tmp_path_factory.mktemp("law") / "law.jsonl", sums("law", range(24))))


def with_law(records: str) -> dict[str, Any]:
    return {"pretokenized_dir": None, "jsonl_data": records, "domains": [*DOMAINS, "law"], "num_experts": 4}


def of_experts(tensors: dict[str, Tensor], experts: list[int]) -> dict[str, Tensor]:
    """What belongs to these experts alone."""
    found = {}
    for name, tensor in tensors.items():
        kind = name.rpartition(".")[2]
        if kind == "free" and tensor.dim() == 3:
            found[name] = tensor.unflatten(1, (-1, 3))[:, experts]
        elif kind in ("free", "weight") or (kind == "support" and tensor.dim() == 2):
            found[name] = tensor[experts]
        elif kind == "support" or ".shared_expert." in name:
            found[name] = tensor
    return found


@pytest.mark.parametrize("form", list(FORMS))
def test_experts_that_are_not_trained_stay_bit_for_bit(
    inputs: Inputs, two_ranks: Ranks, law: str, tmp_path: Path, form: str
) -> None:
    first, second, options = tmp_path / "first", tmp_path / "second", SHORT | FORMS[form]
    assert two_ranks(train_here, inputs.flags(first, **options)) == [None, None]
    options |= with_law(law) | {"start_from": str(first), "train_experts": ["law"], "weight_decay": 0.5}
    options |= {"supervised_experts": True, "expert_pretrain_steps": 1, "max_steps": 6, "expert_parallel_size": 2}
    assert two_ranks(train_here, inputs.flags(second, **options)) == [None, None]
    before, after = weights(first), weights(second)
    old, kept = of_experts(before, [0, 1, 2]), of_experts(after, [0, 1, 2])
    assert old.keys() == kept.keys() and len(old) == (10 if form == "shared expert" else 6)
    assert all(torch.equal(old[name], kept[name]) for name in old)
    new = of_experts(after, [3])
    assert all(bool(new[f"layers.{layer}.deltas.free"].any()) for layer in range(2))
    if form in ("own supports", "element"):  # as many as the others', and places of its own
        assert not any(torch.equal(new["layers.0.support"][0], own) for own in old["layers.0.support"])
    metadata = read_metadata(second / "srde_weights.safetensors")
    assert metadata.expert_names == list(metadata.domain_tokens) == [*DOMAINS, "law"]
    assert [entry["domains"] for entry in metadata.history] == [", ".join(DOMAINS), ", ".join([*DOMAINS, "law"])]
    for layer in range(2):
        name = f"layers.{layer}.domain_mean"
        assert torch.equal(after[name][:3], before[name])


@torch.no_grad()
@pytest.mark.parametrize("form", [{}, {"num_atoms": 4, "support_scope": "per_expert", "support_strategy": "random"}])
def test_a_run_starts_where_the_weights_are(
    inputs: Inputs, two_ranks: Ranks, law: str, tmp_path: Path, form: dict[str, Any]
) -> None:
    """A run that changes nothing gives the weights that it started from, and its new expert is the base, if it may."""
    first, second = tmp_path / "first", tmp_path / "second"
    assert two_ranks(train_here, inputs.flags(first, **SHORT, **form, balancing_bias_rate=0.01)) == [None, None]
    start = {"start_from": str(first / "srde_weights.safetensors")}
    flags = inputs.flags(second, **SHORT, **form, **with_law(law), **start, **STANDSTILL)
    assert two_ranks(train_here, flags) == [None, None]
    one, other = (load_adapter(folder, base=inputs.base) for folder in (first, second))
    ids = tokens()
    for expert in DOMAINS:
        for model in (one, other):
            model.set_active_experts([expert])
        torch.testing.assert_close(other(ids).logits, one(ids).logits, rtol=1e-5, atol=1e-5)
    one.set_active_experts(None)
    other.set_active_experts(DOMAINS)
    torch.testing.assert_close(other(ids).logits, one(ids).logits, rtol=1e-5, atol=1e-5)
    assert torch.equal(other.layers[0].router.selection_bias[:3], one.layers[0].router.selection_bias)
    other.set_active_experts(["law"])
    with one.no_experts():  # with atoms, a new expert mixes those that are trained
        is_the_base = torch.allclose(other(ids).logits, one(ids).logits, rtol=1e-5, atol=1e-5)
        assert is_the_base == (not form)
    other.set_active_experts(None)
    choices: dict[int, Tensor] = {}
    ids = load_tokenizer(inputs.base)(Path(law).read_text(), return_tensors="pt").input_ids[:, :400]
    other(ids, policy=RoutingPolicy(choices=choices))
    shares = [float((best == 3).float().mean()) for best in (choices[layer][:, 0] for layer in range(2))]
    assert sum(shares) / 2 > 0.5  # by its routing vector, a new expert is the best one of its domain's tokens


def test_all_of_it_goes_on_and_resumes(inputs: Inputs, two_ranks: Ranks, tmp_path: Path) -> None:
    first, whole, halves = tmp_path / "first", tmp_path / "whole", tmp_path / "halves"
    assert two_ranks(train_here, inputs.flags(first, **SHORT)) == [None, None]
    options: dict[str, Any] = SHORT | {"max_steps": 4, "start_from": str(first), "lr_schedule": "constant"}
    assert two_ranks(train_here, inputs.flags(whole, **options)) == [None, None]
    before, after = weights(first), weights(whole)
    trained = [name for name in before if ".deltas." in name or name.endswith("router.weight")]
    assert all(not torch.equal(before[name], after[name]) for name in trained)
    assert metrics(whole)[0]["loss"] < metrics(first)[0]["loss"] and metrics(whole)[0]["step"] == 1
    assert two_ranks(train_here, inputs.flags(halves, **(options | {"max_steps": 2}))) == [None, None]
    assert two_ranks(train_here, inputs.flags(halves, **options, resume_from="latest")) == [None, None]
    name = "srde_weights.safetensors"
    assert (halves / name).read_bytes() == (whole / name).read_bytes()
    assert [entry["steps"] for entry in read_metadata(whole / name).history] == [2, 4]


def train_until(flags: dict[str, Any], target: str) -> str | None:
    """`train_here`, with a signal before this function is called."""
    original = resolve_name(target)

    def stopped(*arguments: Any) -> Any:
        os.kill(os.getpid(), SIGTERM)
        return original(*arguments)

    with patch(target, stopped):
        return train_here(flags)


@pytest.mark.parametrize("within", [True, False])
def test_a_stop_in_the_warm_start_or_after_it_changes_nothing(
    inputs: Inputs, one_rank: Ranks, started: Path, tmp_path: Path, within: bool
) -> None:
    """The routers' inputs depend on the routers here, so a finished warm start must not be repeated."""
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    options = AT_RANDOM | cut(ROWS_PER_STEP, 1) | {"start_from": str(started), "warm_start": True, "eval_steps": 2}
    assert one_rank(train_here, inputs.flags(whole, **options)) == [None]
    name = "warm_start_routers" if within else "Curriculum.begin_step"
    assert one_rank(train_until, inputs.flags(parts, **options), f"srde_ds.training.curriculum.{name}") == [None]
    assert latest(parts) == "checkpoint-0" and not metrics(parts)
    assert load_run_state(parts / "checkpoint-0")["warm_started"] != within
    assert one_rank(train_here, inputs.flags(parts, **options, resume_from="latest")) == [None]
    assert without_clocks(metrics(parts)) == without_clocks(metrics(whole))
    assert {"warm_start", "held_out_at_start", "data"} <= metrics(parts)[0].keys()
    name = "srde_weights.safetensors"
    assert (parts / name).read_bytes() == (whole / name).read_bytes()


@pytest.fixture(scope="module")
def started(inputs: Inputs, two_ranks: Ranks, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("started") / "run"
    assert two_ranks(train_here, inputs.flags(folder, **AT_RANDOM)) == [None, None]
    return folder


def resolved(started: Path, **options: Any) -> Config:
    return resolve({}, {"start_from": str(started)} | options, read_inputs=read_run_inputs)


@pytest.mark.parametrize("place", ["", "srde_weights.safetensors", "checkpoint-2"])
def test_options_follow_from_the_weights(started: Path, place: str) -> None:
    config = resolved(started / place)
    adapter = config.adapter
    assert (adapter.density, adapter.num_experts, adapter.top_k, adapter.support_strategy) == (0.05, 3, 2, "random")
    assert config.data.domains == DOMAINS and config.derived["density"] == "as in the weights of start_from"
    assert resolved(started, domain="law").data.domains == [*DOMAINS, "law"]
    assert resolved(started, domain="law").adapter.num_experts == 4
    before = check_start(config)
    assert before is not None and before.expert_names == DOMAINS


def train_and_count(flags: dict[str, Any], place: Path) -> tuple[str | None, dict[str, int]]:
    """`train_here`, and how often this rank has hashed each file of the checkpoint `place`."""
    hashed: Counter[str] = Counter()

    def counted(path: Path) -> str:
        if path.parent == place:
            hashed[path.name] += 1
        return file_hash(path)

    with patch.object(resume, "file_hash", counted):
        return train_here(flags), dict(hashed)


def test_a_checkpoint_is_read_once_by_one_rank(inputs: Inputs, two_ranks: Ranks, started: Path, tmp_path: Path) -> None:
    """Before the ranks have met, they read only what the options need."""
    place = shutil.copytree(started / "checkpoint-2", tmp_path / "gone/checkpoint-2")
    once = {path.name: 1 for path in place.iterdir() if path.name != "manifest.json"}
    options = AT_RANDOM | {"start_from": str(place)}
    (outcome, by_main), other = two_ranks(train_and_count, inputs.flags(tmp_path / "run", **options), place)
    assert (outcome, other) == (None, (None, {})) and by_main == once
    shutil.rmtree(place)
    goes_on = options | {"resume_from": "latest", "max_steps": 3}
    flags, saved = inputs.flags(tmp_path / "run", **goes_on), tmp_path / "run/checkpoint-2"
    (outcome, by_main), other = two_ranks(train_and_count, flags, saved)
    assert (outcome, other) == (None, (None, {})) and by_main == once
    own = resolved(place, output_dir=str(tmp_path / "run"), resume_from="latest")  # as the weights that are gone said
    assert (own.adapter.density, own.data.domains) == (0.05, DOMAINS) and check_start(own) is None


def test_damage_is_found_before_the_base_is_loaded(
    inputs: Inputs, two_ranks: Ranks, started: Path, tmp_path: Path
) -> None:
    place = shutil.copytree(started / "checkpoint-2", tmp_path / "checkpoint-2")
    shard = place / "shard-00001.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1] + b"x")
    messages = two_ranks(train_here, inputs.flags(tmp_path / "run", **AT_RANDOM, start_from=str(place)))
    for message in messages:
        assert f"start_from={place}: checkpoint '{place}' is damaged: 'shard-00001.safetensors'" in message
        assert "--weights" not in message
    assert not (tmp_path / "run/config.yaml").exists()


def test_a_part_of_the_experts_is_not_balanced(started: Path) -> None:
    """Its rows are of its own domains alone. With one expert a token nothing but the z-loss would move the routers."""
    every, two = resolved(started).losses, resolved(started, train_experts=["red"]).losses
    one = resolved(started, train_experts=["red"], top_k=1).losses
    weights = [(losses.load_balancing_weight, losses.router_z_weight) for losses in (every, two, one)]
    assert weights == [(0.01, 0.001), (0.0, 0.001), (0.0, 0.0)]
    given = resolved(started, train_experts=["red"], load_balancing_weight=0.02).losses
    assert given.load_balancing_weight == 0.02


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"density": 0.1}, "density=0.1: the weights of start_from=.* have density=0.05. Leave --density out"),
        ({"granularity": "element"}, "granularity=element"),
        ({"domains": ["red", "blue"]}, "must begin with the experts of start_from=.*, red,green,blue, in this order"),
        ({"train_experts": ["lore"], "domain": "law"}, "no expert 'lore' in red, green, blue, law"),
        ({"train_experts": ["red"], "warm_start": True}, "warm_start with train_experts=red"),
        ({"train_experts": ["red"], "balancing_bias_rate": 0.1}, "balancing_bias_rate with train_experts=red"),
        ({"train_experts": ["blue"], "progressive_unlock": "linear"}, "progressive_unlock .* would train nothing"),
        (
            {"train_experts": ["red"], "supervised_experts": True, "pretrain_objective": "sequential", "max_steps": 9},
            "pretrain_objective with train_experts=red: the steps of the others' domains would train nothing",
        ),
        ({"train_experts": ["red"], "num_atoms": 2}, "train_experts=red with num_atoms=2: the others share the atoms"),
        ({"train_experts": ["red"], "start_from": None}, "train_experts=red without start_from"),
        ({"initial_density": 0.2}, "initial_density with start_from="),
        ({"support_strategy": "gradient"}, "support_strategy with start_from="),
        (
            {"support_strategy": "magnitude"},
            "support_strategy=magnitude: all experts share the support of .* by random",
        ),
        ({"preset": "reference"}, "preset with start_from="),
        ({"start_from": "/none"}, "none"),
    ],
)
def test_options_that_do_not_fit_are_refused(started: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(SRDEError, match=message):
        check_start(resolved(started, **options))


def test_experts_whose_base_was_float16_in_training_fit_it(
    inputs: Inputs, two_ranks: Ranks, started: Path, tmp_path: Path
) -> None:
    files, place = BaseFiles(inputs.base), tmp_path / "experts.safetensors"
    rounded = files.identity(torch.float16)
    assert rounded["hash"] != files.identity()["hash"]
    source = started / "srde_weights.safetensors"
    save_weights(place, load_file(source), replace(read_metadata(source), base=rounded))
    flags = inputs.flags(tmp_path / "run", **AT_RANDOM, start_from=str(place))
    assert two_ranks(train_here, flags) == [None, None]


def test_another_base_is_refused(inputs: Inputs, one_rank: Ranks, started: Path, tmp_path: Path) -> None:
    from tests.helpers import tiny_llama

    tokenizer, other = load_tokenizer(inputs.base), tmp_path / "base"
    sizes: dict[str, Any] = {"hidden_size": 30, "num_attention_heads": 3, "num_key_value_heads": 3}
    tiny_llama(seed=9, vocab_size=len(tokenizer), **sizes).save_pretrained(other)
    tokenizer.save_pretrained(other)
    flags = inputs.flags(tmp_path / "run", **AT_RANDOM, model_name=str(other), start_from=str(started))
    (message,) = one_rank(train_here, flags)
    assert "start_from=" in message and "Give the base that they were trained on" in message
