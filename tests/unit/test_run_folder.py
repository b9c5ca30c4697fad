"""Bad input to `train`: one line, status 2, before anything long starts, and nothing half-written."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM

from srde_ds.cli.main import main
from srde_ds.config import resolve
from srde_ds.data.manifest import load_manifest
from srde_ds.data.tokenizer import load_tokenizer
from srde_ds.distributed import deepspeed_internals
from srde_ds.distributed import processes as topology
from srde_ds.errors import SRDEError
from srde_ds.training import run_folder
from srde_ds.training.run_folder import check_inputs, check_manifest, check_run_folder, open_run_folder, prepare_data
from srde_ds.training.run_lock import run_lock
from srde_ds.utils.environment import environment
from tests.checkpoint_helpers import save
from tests.cli_helpers import DOMAINS, POSITIONS, fails, flags, save_base, write_records
from tests.hybrids import qwen3_5

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Two bases that differ in their tokenizers, records, and rows of the first base."""
    folder = tmp_path_factory.mktemp("inputs")
    base, other = save_base(folder / "base"), save_base(folder / "other", template=None)
    train, held_out = write_records(folder / "train.jsonl"), write_records(folder / "held_out.jsonl", first=100)
    options = {
        "model_name": str(base),
        "jsonl_data": str(train),
        "eval_file": str(held_out),
        "domains": DOMAINS,
        "max_length": POSITIONS,
        "work_dir": str(folder),
    }
    assert main(["build_dataset", *flags(options)]) == 0
    return {
        "base": str(base),
        "other": str(other),
        "train": str(train),
        "held_out": str(held_out),
        "rows": str(folder / "tokenized"),
    }


class Refusal:
    """Runs `train` in this process on good input with a few changes; it must be refused and leave nothing."""

    def __init__(self, inputs: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        self.inputs, self.folder, self.output, self.capsys = inputs, tmp_path, tmp_path / "run", capsys

    def __call__(self, *fragments: str, **changes: Any) -> str:
        options = {
            "model_name": self.inputs["base"],
            "jsonl_data": self.inputs["train"],
            "domains": DOMAINS,
            "max_length": POSITIONS,
            "num_experts": 2,
            "output_dir": str(self.output),
        }
        line = fails(self.capsys, ["train", *flags(options | changes)], *fragments)
        if "output_dir" not in changes:
            assert not self.output.exists() or not any(self.output.iterdir())
        return line

    def records(self, *lines: dict[str, Any] | str) -> str:
        """A JSONL of the good records and then these lines."""
        path = self.folder / "bad.jsonl"
        texts = [line if isinstance(line, str) else json.dumps(line) for line in lines]
        path.write_text(Path(self.inputs["train"]).read_text() + "".join(text + "\n" for text in texts))
        return str(path)


@pytest.fixture
def refused(inputs: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Refusal:
    return Refusal(inputs, tmp_path, capsys)


def test_missing_fields(refused: Refusal) -> None:
    refused("model_name is missing", "--model_name", model_name=None)
    refused("no training data", "--pretokenized_dir", "--jsonl_data", jsonl_data=None)


def test_two_sources_of_data(refused: Refusal, inputs: dict[str, str]) -> None:
    refused("jsonl_data=", "pretokenized_dir=", "Keep one", pretokenized_dir=inputs["rows"])
    both = {"jsonl_data": None, "pretokenized_dir": inputs["rows"], "eval_file": inputs["held_out"]}
    for more in ({}, {"dry_run": "true"}):
        refused("eval_file=", "pretokenized_dir=", "build_dataset", **both | more)


def test_a_tokenizer_with_more_tokens_than_the_base_embeds(
    refused: Refusal, inputs: dict[str, str], tmp_path: Path
) -> None:
    base = tmp_path / "larger"
    shutil.copytree(inputs["base"], base)
    tokenizer = load_tokenizer(base)
    tokenizer.add_tokens(["<one_more>"])
    tokenizer.save_pretrained(base)
    count = len(tokenizer)
    for more in ({}, {"dry_run": "true"}):
        refused(f"its tokenizer has {count} tokens, but its embedding has {count - 1}", model_name=str(base), **more)


def test_a_base_that_sees_earlier_documents_wants_one_in_a_row(
    refused: Refusal, inputs: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = tmp_path / "hybrid"
    tokenizer = load_tokenizer(inputs["base"])
    tokenizer.save_pretrained(base)
    AutoModelForCausalLM.from_config(qwen3_5(vocab_size=len(tokenizer))).save_pretrained(base)
    asked = {"model_name": str(base)}
    for more in ({}, {"dry_run": "true"}, {"jsonl_data": None, "pretokenized_dir": inputs["rows"]}):
        refused("documents in a packed row would see each other", "qwen3_5", "--packing false", **asked | more)
    options = {"jsonl_data": inputs["train"], "domains": DOMAINS, "max_length": POSITIONS, "packing": "false"}
    assert main(["build_dataset", *flags(options | asked | {"work_dir": str(tmp_path)})]) == 0
    manifest = load_manifest(tmp_path / "tokenized")
    assert not manifest.packing
    assert all(count.rows == count.documents == 6 for count in manifest.splits["train"].domains.values())
    given = {"pretokenized_dir": str(tmp_path / "tokenized"), "num_experts": 2, "output_dir": str(tmp_path / "run")}
    common = {"domains": DOMAINS, "max_length": POSITIONS, "dry_run": "true"}
    assert main(["train", *flags(common | asked | given)]) == 0
    capsys.readouterr()


def test_missing_files(refused: Refusal, tmp_path: Path) -> None:
    none = str(tmp_path / "none")
    refused(f"model_name='{none}'", "save_pretrained", model_name=none)
    refused(f"jsonl_data={none}", "no such file", jsonl_data=none)
    refused(f"eval_file={none}", "no such file", eval_file=none)
    refused(f"pretokenized_dir={none}", "no such folder", "build_dataset", jsonl_data=None, pretokenized_dir=none)
    refused(f"deepspeed_config={none}", "no such file", deepspeed_config=none)
    refused(f"deepspeed_config={tmp_path}", "not an ordinary file: give a JSON file", deepspeed_config=str(tmp_path))


def test_a_bad_deepspeed_config_is_found_before_the_base_is_loaded(refused: Refusal, tmp_path: Path) -> None:
    path = tmp_path / "zero2.json"
    path.write_text('{"zero_optimization": {"stage": 2}}')
    refused(str(path), "stage=2", "only stage 3", ds_config=str(path))


def test_bad_records_are_named_by_file_and_line(refused: Refusal) -> None:
    good = {"prompt": "a", "response": "b", "domain": "red"}
    refused("bad.jsonl:13", "not valid JSON", jsonl_data=refused.records('{"prompt": '))
    unknown = refused.records(good, good | {"domain": "rad"})
    refused("bad.jsonl:14", "'rad'", "red, green", "Did you mean 'red'?", jsonl_data=unknown)
    refused("bad.jsonl:13", "'response'", jsonl_data=refused.records({"prompt": "a", "domain": "red"}))


def test_domains_without_records(refused: Refusal) -> None:
    refused("no record of domain 'blue'", "leave it out of domains", domains=[*DOMAINS, "blue"])


@pytest.mark.parametrize(
    ("option", "options"),
    [
        ("supervised_experts=true", {"supervised_experts": True, "expert_pretrain_steps": 10}),
        ("warm_start=true", {"warm_start": True}),
        ("training_phases=by_domain", {"training_phases": "by_domain"}),
    ],
)
def test_domains_without_rows(inputs: dict[str, str], option: str, options: dict[str, Any]) -> None:
    """Their documents may all have been too long."""
    manifest = load_manifest(inputs["rows"])
    manifest.splits["train"].domains["green"].rows = 0
    with pytest.raises(SRDEError, match=f"{option}: domain 'green' has no training rows"):
        check_manifest(resolve({}, {"domains": DOMAINS} | options), manifest)
    check_manifest(resolve({}, {"domains": DOMAINS}), manifest)


def test_every_domain_has_a_share_where_only_its_rows_train_its_expert(refused: Refusal) -> None:
    options = {"training_phases": "by_domain", "max_steps": 20}
    for weights in ("red=1", "red=1; 20: red=1, green=1"):
        message = f"domain_weights={weights} with training_phases=by_domain: 'green' has no share"
        refused(message, domain_weights=weights, **options)


def test_long_documents(refused: Refusal) -> None:
    records = refused.records({"prompt": "?", "response": "x" * 500, "domain": "red"})
    refused("bad.jsonl:13", f"max_length={POSITIONS}", "too_long", jsonl_data=records, too_long="error")
    refused("longer than max_length=8", "--too_long truncate", max_length=8)


def test_a_folder_that_holds_no_rows(refused: Refusal, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    folder = {"jsonl_data": None, "pretokenized_dir": str(tmp_path / "empty")}
    refused("pretokenized_dir=", "build_dataset has not made it", **folder)


def test_rows_that_do_not_fit_the_run(refused: Refusal, inputs: dict[str, str], tmp_path: Path) -> None:
    rows = {"jsonl_data": None, "pretokenized_dir": inputs["rows"]}
    refused("pretokenized_dir=", "differs", "chat_template", "build it again", **rows, model_name=inputs["other"])
    refused("pretokenized_dir=", "domains=green,red", "same order", **rows, domains=DOMAINS[::-1])
    refused("max_length=64", f"--max_length {POSITIONS}", **rows, max_length=64)
    shutil.copytree(inputs["rows"], tmp_path / "rows")
    shutil.rmtree(tmp_path / "rows" / "train")
    refused("pretokenized_dir=", "cannot be read", jsonl_data=None, pretokenized_dir=str(tmp_path / "rows"))


def test_rows_longer_than_the_base_knows_positions(refused: Refusal) -> None:
    refused(f"max_length={POSITIONS + 1}", f"--max_length {POSITIONS}", max_length=POSITIONS + 1)


@pytest.mark.parametrize(("flag", "package"), [("use_wandb", "wandb"), ("use_trackio", "trackio")])
def test_a_tracker_that_is_not_installed(refused: Refusal, flag: str, package: str) -> None:
    with (
        patch.dict(sys.modules, {package: None}),
        patch.object(run_folder, "prepare_data", side_effect=AssertionError("long work began")),
    ):
        refused(f"{flag}=true", f"package '{package}' is missing", "pip install", **{flag: "true"})


def test_flash_attention_without_its_package(refused: Refusal) -> None:
    with patch.object(run_folder, "find_spec", return_value=None):
        refused("flash_attention=true", "'flash-attn' is missing", flash_attention="true")


def test_a_support_that_does_not_fit_is_found_before_the_base_is_loaded(refused: Refusal) -> None:
    refused("density=0.6", "lower density", density=0.6, support_scope="per_expert")


@pytest.mark.parametrize("name", ["completed.json", "latest"])
def test_an_earlier_run_is_not_overwritten(refused: Refusal, tmp_path: Path, name: str) -> None:
    folder = tmp_path / "earlier"
    folder.mkdir()
    (folder / name).write_text("kept")
    refused(f"output_dir={folder}", name, "--resume_from latest", output_dir=str(folder))
    assert [(path.name, path.read_text()) for path in folder.iterdir()] == [(name, "kept")]


def test_a_run_is_not_replaced_by_going_on_from_another(tmp_path: Path) -> None:
    save(tmp_path / "first", 5)
    save(tmp_path / "second", 7)
    place, second = tmp_path / "first/checkpoint-5", tmp_path / "second"
    message = rf"output_dir={second}: it holds an earlier run \(latest\), and resume_from={place} is of another one. "
    with pytest.raises(SRDEError, match=f"^{message}Continue it with --resume_from latest, or choose another"):
        check_run_folder(str(second), str(place))
    for folder in (tmp_path / "first", tmp_path / "third"):
        assert check_run_folder(str(folder), str(place)) == place
    assert check_run_folder(str(second), "latest") == second / "checkpoint-7"


def test_advice_leads_on(refused: Refusal, tmp_path: Path) -> None:
    """Whoever follows a message meets another one at most, not the first one again."""
    folder = tmp_path / "earlier"
    (folder / "checkpoint-3").mkdir(parents=True)  # a kill before `latest` was written
    refused(f"--resume_from {folder}/checkpoint-3", output_dir=str(folder))
    refused("choose another --output_dir, without --resume_from", output_dir=str(folder), resume_from="latest")
    (folder / "checkpoint-3").rmdir()
    (folder / "metrics.jsonl").write_text("{}")
    refused("leave out --resume_from to start anew", output_dir=str(folder), resume_from="latest")
    check_run_folder(str(folder), None)  # as that says


def test_metrics_without_a_checkpoint_are_kept_aside(tmp_path: Path) -> None:
    for text in ("first", "second"):
        (tmp_path / "metrics.jsonl").write_text(text)
        open_run_folder(resolve({}, {"output_dir": str(tmp_path)}))
        assert not (tmp_path / "metrics.jsonl").exists()
    assert [(tmp_path / f"metrics.attempt-{number}.jsonl").read_text() for number in (1, 2)] == ["first", "second"]
    (tmp_path / "metrics.jsonl").write_text("third")
    open_run_folder(resolve({}, {"output_dir": str(tmp_path), "resume_from": "latest"}))
    assert (tmp_path / "metrics.jsonl").read_text() == "third"


@pytest.mark.parametrize("more", [{}, {"dry_run": "true"}])
def test_folders_that_the_run_would_refuse(refused: Refusal, tmp_path: Path, more: dict[str, str]) -> None:
    refused("output_dir=''", "is empty", **more, output_dir=" ")
    link = tmp_path / "link"
    link.symlink_to(tmp_path / "none")
    refused("is a link to", "which does not exist", **more, output_dir=str(link))
    refused("File name too long", "--output_dir", **more, output_dir=str(tmp_path / ("x" * 300)))
    (tmp_path / "earlier").mkdir()
    (tmp_path / "earlier/latest").write_text("checkpoint-3")
    refused("holds an earlier run", **more, output_dir=str(tmp_path / "earlier"))
    with run_lock(tmp_path / "busy"):
        refused(f"process {os.getpid()} of host", "is training there", **more, output_dir=str(tmp_path / "busy"))
        refused("is training there", **more, output_dir=str(tmp_path / "busy"), resume_from="latest")


def test_a_latest_that_is_a_link_is_not_followed(refused: Refusal, tmp_path: Path) -> None:
    (tmp_path / "earlier").mkdir()
    (tmp_path / "elsewhere").write_text("checkpoint-3")
    (tmp_path / "earlier/latest").symlink_to(tmp_path / "elsewhere")
    refused("links are not followed", output_dir=str(tmp_path / "earlier"), resume_from="latest")


def test_metrics_that_are_a_link_are_not_cut(refused: Refusal, tmp_path: Path) -> None:
    folder, elsewhere = tmp_path / "earlier", tmp_path / "elsewhere"
    folder.mkdir()
    elsewhere.write_text("kept")
    (folder / "metrics.jsonl").symlink_to(elsewhere)
    for more in ({}, {"resume_from": "latest"}, {"dry_run": "true"}):
        refused(f"'{folder}/metrics.jsonl' is not a plain file", output_dir=str(folder), **more)
    (folder / "metrics.jsonl").unlink()
    os.mkfifo(folder / "metrics.jsonl")
    refused("is not a plain file", output_dir=str(folder))
    assert elsewhere.read_text() == "kept"


def test_a_latest_of_others_is_shown_as_text(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "checkpoint-3").mkdir()
    (tmp_path / "latest").write_text("\x1b[2Jcheckpoint-9\nx")
    config = resolve({}, {"output_dir": str(tmp_path), "resume_from": str(tmp_path / "checkpoint-3")})
    open_run_folder(config, 3, goes_on_here=True)
    assert capsys.readouterr().out == (
        "checkpoint-3 is the latest checkpoint from now on, in place of \\x1b[2Jcheckpoint-9\\nx.\n"
    )


def test_a_seed_is_shown_as_it_was_given(refused: Refusal) -> None:
    refused("seed=9007199254740993: must be at most", seed=2**53 + 1)


def test_an_output_folder_that_cannot_be_one(refused: Refusal, inputs: dict[str, str]) -> None:
    refused("output_dir=", "not a folder", output_dir=inputs["train"])
    refused("output_dir=", "not a folder", output_dir=inputs["train"] + "/run")
    with patch.object(os, "access", return_value=False):
        refused("not writable")


def test_a_checkpoint_that_is_not_there_leaves_the_run_as_it_was(refused: Refusal, tmp_path: Path) -> None:
    folder = tmp_path / "earlier"
    (folder / "checkpoint-3").mkdir(parents=True)
    (folder / "completed.json").write_text("{}")
    (folder / "config.yaml").write_text("{}")
    before = sorted((path.name, path.stat().st_mtime_ns) for path in folder.rglob("*"))
    refused("checkpoint", output_dir=str(folder), resume_from="latest")
    refused("checkpoint-3", output_dir=str(folder), resume_from=str(folder / "checkpoint-3"))
    assert sorted((path.name, path.stat().st_mtime_ns) for path in folder.rglob("*")) == before


def test_more_processes_than_gpus_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "2")
    monkeypatch.setenv("LOCAL_RANK", "2")
    monkeypatch.setenv("WORLD_SIZE", "3")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", "29500")
    # It takes the device too, and would refuse it without a remedy.
    monkeypatch.setattr(deepspeed_internals.deepspeed, "init_distributed", lambda **_: pytest.fail("joined"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(SRDEError, match="rank 2: this process sees 2 .*CUDA_VISIBLE_DEVICES=0,1.*--gpus-per-node"):
        topology.start_processes(60)


def test_a_port_that_is_taken_is_named() -> None:
    program = "from srde_ds.distributed.processes import start_processes; start_processes(60)"
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        alone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        command = [sys.executable, "-c", program]
        result = subprocess.run(command, cwd=ROOT, env=os.environ | alone, capture_output=True, text=True)
    assert result.returncode == 1 and f"LostContact: port {port} cannot be opened or reached" in result.stderr


def test_the_script_ends_with_status_2_and_one_line(inputs: dict[str, str], tmp_path: Path) -> None:
    options = {"model_name": inputs["base"], "jsonl_data": str(tmp_path / "none"), "max_length": POSITIONS}
    command = [sys.executable, "launch/train.py", *flags(options), "--output_dir", str(tmp_path / "run")]
    environment = os.environ | {"RANK": "1", "OMP_NUM_THREADS": "1"}
    result = subprocess.run([*command, "--top_kk", "1"], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert result.returncode == 2
    assert result.stderr.splitlines() == [
        "srde-ds: error: rank 1: unknown argument '--top_kk'. Did you mean '--top_k'? (see srde-ds train --help)"
    ]
    assert not (tmp_path / "run").exists()


def test_good_input_passes_and_its_folder_tells_where_it_came_from(inputs: dict[str, str], tmp_path: Path) -> None:
    config = resolve({}, {"model_name": inputs["base"], "pretokenized_dir": inputs["rows"], "max_length": POSITIONS})
    config.data.domains = DOMAINS
    config.training.output_dir = str(tmp_path / "run")
    check_inputs(config)
    rows = run_folder.data_folder(config.data, config.training.output_dir)
    assert run_folder.prepare_data(config) == rows == Path(inputs["rows"])
    open_run_folder(config)
    assert yaml.safe_load((tmp_path / "run/config.yaml").read_text()) == config.to_dict()
    written = json.loads((tmp_path / "run/environment.json").read_text())
    assert written == environment()
    assert set(written["versions"].values()).isdisjoint({"not installed"})
    assert written["command"] == sys.argv


def test_a_run_folder_that_is_opened_again_is_no_longer_complete(tmp_path: Path) -> None:
    config = resolve({}, {"output_dir": str(tmp_path)})
    for name in ("completed.json", "evaluation.json", "evaluation_items.jsonl"):
        (tmp_path / name).write_text(name)
    open_run_folder(config)
    kept = {path.name: path.read_text() for path in tmp_path.glob("*eval*")}
    assert kept == {f"earlier_{name}": name for name in ("evaluation.json", "evaluation_items.jsonl")}
    assert not (tmp_path / "completed.json").exists()


def test_rows_are_built_once_without_progress_bars_and_used_again(inputs: dict[str, str], tmp_path: Path) -> None:
    options = {"model_name": inputs["base"], "train_file": inputs["train"], "domains": DOMAINS, "max_length": POSITIONS}
    program = "import sys; from srde_ds.cli.main import main; sys.exit(main(sys.argv[1:]) or main(sys.argv[1:]))"
    command = [sys.executable, "-c", program, "build_dataset", *flags(options | {"work_dir": str(tmp_path)})]
    bars = {"HF_DATASETS_DISABLE_PROGRESS_BARS", "HF_HUB_DISABLE_PROGRESS_BARS"}
    environment = {name: value for name, value in os.environ.items() if name not in bars}
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert result.returncode == 0
    first, second = result.stdout.split(f"Dataset: {tmp_path}/tokenized\n")[:2]
    assert first == second
    assert first.startswith("train: ")
    assert result.stderr.splitlines() == [
        f"srde-ds: {inputs['train']}: 12 records, prompts and responses",
        "srde-ds: domains with fewer than 100 training records: red has 6, green has 6. An expert learns little from "
        "so few.",
        f"srde-ds: '{tmp_path}/tokenized' was built from the same files and options, so it is used as it is",
    ]


def test_a_dry_run_refuses_rows_that_a_run_would(
    inputs: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    good = {"model_name": inputs["base"], "pretokenized_dir": inputs["rows"], "domains": DOMAINS}
    good |= {"max_length": str(POSITIONS), "output_dir": str(tmp_path / "run")}
    assert main(["train", "--dry_run", *flags(good)]) == 0
    capsys.readouterr()
    for change, message in (
        ({"model_name": inputs["other"]}, "which differs from"),
        ({"domains": DOMAINS[::-1]}, "give the same names in the same order"),
        ({"max_length": str(POSITIONS // 2)}, f"Give --max_length {POSITIONS}"),
        ({"pretokenized_dir": str(tmp_path)}, "build_dataset"),
    ):
        fails(capsys, ["train", "--dry_run", *flags(good | change)], message)
    assert list(tmp_path.iterdir()) == []


def test_a_run_warns_of_very_uneven_domains(
    inputs: dict[str, str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    long = "".join(
        json.dumps({"prompt": f"say {n}", "response": "a b c " * 6, "domain": "red"}) + "\n" for n in range(20)
    )
    records = tmp_path / "uneven.jsonl"
    records.write_text(Path(inputs["train"]).read_text() + long)
    given = {"model_name": inputs["base"], "domains": DOMAINS, "max_length": POSITIONS}
    for number, (path, warned) in enumerate(((inputs["train"], False), (str(records), True))):
        caplog.clear()
        prepare_data(resolve({}, given | {"jsonl_data": path, "output_dir": str(tmp_path / str(number))}))
        assert ("divided very unevenly: red 9" in caplog.text) == warned
    caplog.clear()
    given |= {"jsonl_data": str(records), "output_dir": str(tmp_path / "1"), "loss_weighting": "domain"}
    prepare_data(resolve({}, given))
    assert "unevenly" not in caplog.text
