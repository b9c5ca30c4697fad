"""Defaults that follow from the base, from the rows and from the run that goes on."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from srde_ds.api import build_dataset
from srde_ds.checkpoint.layout import RUN_STATE
from srde_ds.config import Config, resolve
from srde_ds.errors import SRDEError
from srde_ds.training.run_inputs import read_base_inputs, read_run_inputs
from srde_ds.weights.locate import LATEST
from tests.cli_helpers import DOMAINS, POSITIONS, save_base, write_records


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_base(tmp_path_factory.mktemp("base"))


def resolved(**options: Any) -> Config:
    return resolve({}, options, read_inputs=read_run_inputs)


def saved_run(folder: Path, **options: Any) -> Path:
    checkpoint = folder / "checkpoint-7"
    checkpoint.mkdir(parents=True)
    (folder / LATEST).write_text(checkpoint.name)
    (checkpoint / RUN_STATE).write_text(json.dumps({"config": resolve({}, options).to_dict()}))
    return checkpoint


def test_rows_are_no_longer_than_the_context_of_the_base(base: Path) -> None:
    assert resolved(model_name=str(base)).data.max_length == POSITIONS
    assert resolved(model_name=str(base), max_length=POSITIONS + 1).data.max_length == POSITIONS + 1  # refused later
    assert resolved().data.max_length == 2048
    with pytest.raises(SRDEError, match="model_name="):
        resolved(model_name="/none")


def test_a_tokenizer_alone_has_no_context(base: Path, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text((base / "tokenizer.json").read_text())
    config = resolve({}, {"model_name": str(tmp_path)}, read_inputs=read_base_inputs)
    assert config.data.max_length == 2048
    assert resolve({}, {"model_name": str(base)}, read_inputs=read_base_inputs).data.max_length == POSITIONS


def test_length_and_domains_of_rows_that_are_there(base: Path, tmp_path: Path) -> None:
    data = write_records(tmp_path / "train.jsonl")
    how: dict[str, Any] = {"too_long": "error", "train_on": "last", "packing": False}
    rows = build_dataset(data, model_name=base, output=tmp_path / "rows", domains=DOMAINS, max_length=64, **how)
    config = resolved(model_name=str(base), pretokenized_dir=str(rows))
    assert (config.data.max_length, config.data.domains, config.adapter.num_experts) == (64, DOMAINS, 2)
    assert resolved(model_name=str(base), pretokenized_dir=str(rows), max_length=32).data.max_length == 32
    assert (config.data.too_long, config.data.train_on, config.data.packing) == ("error", "last", False)
    assert resolved(model_name=str(base), pretokenized_dir=str(rows), packing=False).data.train_on == "last"
    for option, value in {"too_long": "drop", "train_on": "all", "packing": True}.items():
        told = rf"^{option}={value} with pretokenized_dir={rows}: its rows were built with .*Leave --{option} out"
        with pytest.raises(SRDEError, match=told):
            resolved(pretokenized_dir=str(rows), **{option: value})
    for option, given in {"format": "alpaca", "columns": "a=b", "encoding": "gbk", "on_bad_record": "skip"}.items():
        with pytest.raises(SRDEError, match=f"^{option}={given} with pretokenized_dir={rows}: says how records are"):
            resolved(pretokenized_dir=str(rows), **{option: given})
    with pytest.raises(SRDEError, match="^pretokenized_dir=.*no such folder"):
        resolved(pretokenized_dir=str(tmp_path / "none"))


def test_a_schedule_does_not_change_when_its_run_goes_on(tmp_path: Path) -> None:
    old = {"max_steps": 300, "warmup_steps": 50, "supervised_experts": True, "expert_pretrain_steps": 9}
    checkpoint = saved_run(tmp_path, **old)
    for resume_from in (str(tmp_path), str(checkpoint), "latest"):
        again = {"max_steps": 600, "output_dir": str(tmp_path), "resume_from": resume_from}
        config = resolved(**again, supervised_experts=True)
        assert (config.optimizer.warmup_steps, config.curriculum.expert_pretrain_steps) == (50, 9)
        assert resolved(**again, warmup_steps=3).optimizer.warmup_steps == 3
    assert resolved(max_steps=600).optimizer.warmup_steps == 30
    assert resolved(max_steps=600, resume_from=str(tmp_path / "none")).optimizer.warmup_steps == 30  # refused later


def test_a_rate_whose_default_was_another_one_stays(tmp_path: Path) -> None:
    saved_run(tmp_path, granularity="block", learning_rate=0.001)
    assert resolved(granularity="block", resume_from=str(tmp_path)).optimizer.learning_rate == 0.001
    assert resolved(granularity="block").optimizer.learning_rate == 0.015


def test_a_run_from_before_parts_of_neurons_stays_as_it_was(tmp_path: Path) -> None:
    checkpoint = saved_run(tmp_path, neuron_parts=1)
    state = json.loads((checkpoint / RUN_STATE).read_text())
    del state["config"]["adapter"]["neuron_parts"]
    (checkpoint / RUN_STATE).write_text(json.dumps(state))
    config = resolved(resume_from=str(tmp_path))
    assert (config.adapter.neuron_parts, config.adapter.support_strategy) == (1, "magnitude")
    assert config.optimizer.use_muon
    assert resolved().adapter.neuron_parts == 4


def test_a_run_of_parts_goes_on_with_them(tmp_path: Path) -> None:
    saved_run(tmp_path, neuron_parts=2, support_strategy="magnitude", use_muon=True)
    config = resolved(resume_from=str(tmp_path), muon_lr=0.01)
    assert (config.adapter.neuron_parts, config.adapter.support_strategy) == (2, "magnitude")
    assert config.optimizer.use_muon


def test_the_hidden_size_of_the_base_decides_on_parts_and_rate(base: Path, tmp_path: Path) -> None:
    def config_for(hidden: int) -> Config:
        place = tmp_path / str(hidden)
        shutil.copytree(base, place)
        sizes = json.loads((place / "config.json").read_text()) | {"hidden_size": hidden, "num_attention_heads": 2}
        (place / "config.json").write_text(json.dumps(sizes))
        return resolved(model_name=str(place))

    assert [config_for(hidden).adapter.neuron_parts for hidden in (30, 32)] == [1, 4]
    rates = [config_for(hidden).optimizer.learning_rate for hidden in (64, 576, 1152, 5120)]
    assert rates == [0.015, 0.015, 0.0075, 0.0017]


def test_options_are_taken_from_a_folder_that_a_kill_left_half_renamed(tmp_path: Path) -> None:
    """Its weights may be those of a `start_from` that is gone."""
    checkpoint = saved_run(tmp_path, density=0.05, granularity="block", top_k=1, domains="a,b")
    checkpoint.rename(checkpoint.with_name(f"{checkpoint.name}.old"))
    for resume_from in (str(tmp_path), str(checkpoint), "latest"):
        config = resolved(output_dir=str(tmp_path), resume_from=resume_from, start_from="gone")
        adapter = config.adapter
        assert (adapter.density, adapter.granularity, adapter.top_k) == (0.05, "block", 1)
        assert config.data.domains == ["a", "b"]


def test_a_schedule_that_was_not_in_use_is_not_taken_over(tmp_path: Path) -> None:
    saved_run(tmp_path, max_steps=300)
    config = resolved(max_steps=300, supervised_experts=True, initial_density=0.05, resume_from=str(tmp_path))
    assert (config.curriculum.expert_pretrain_steps, config.curriculum.density_warmup_steps) == (15, 150)


def test_a_state_of_something_else_is_refused(tmp_path: Path) -> None:
    checkpoint = saved_run(tmp_path)
    for state in ({"config": 3}, {"config": {"optimizer": 3}}, {}):
        (checkpoint / RUN_STATE).write_text(json.dumps(state))
        with pytest.raises(SRDEError, match="resume_from=.*not a run state"):
            resolved(resume_from=str(tmp_path))
    (checkpoint / RUN_STATE).write_text(json.dumps({"config": {"optimizer": {"warmup_steps": "many"}}}))
    with pytest.raises(SRDEError, match="warmup_steps='many'"):
        resolved(resume_from=str(tmp_path))
