"""The evaluate verb on files, and the report of a run."""

from __future__ import annotations

import errno
import importlib
import json
import shutil
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import yaml

from srde_ds.cli.main import main
from srde_ds.config import resolve
from srde_ds.data.records import Record
from srde_ds.errors import SRDEError
from srde_ds.evaluation import results as results_module
from srde_ds.evaluation.command import default_output, evaluate_command
from srde_ds.evaluation.compare import items_hash
from srde_ds.evaluation.options import EvaluateOptions
from srde_ds.evaluation.report import examples, write_report
from srde_ds.evaluation.run_files import MOST_LINES, read_metrics
from tests.evaluation_helpers import records, save_model, scored_records, write_jsonl


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    write_jsonl(folder / "held_out.jsonl", records())
    run = save_model(folder).parent
    (run / "config.yaml").write_text(yaml.safe_dump(resolve({}, {"loss_weighting": "domain"}).to_dict()))
    lines = [
        {"step": s, "loss": 3.0 / s, "tokens": 100 * s, "tokens_per_second": 50.0, "tokens_per_expert": [1, 2, 3]}
        for s in range(1, 6)
    ]
    lines[0]["held_out_at_start"] = {"math": 4.0, "logic": 5.0}
    counts = {"documents": 9, "too_long": 3, "dropped": 2, "response_tokens": 1200}
    lines[0]["data"] = {"train": {"math": counts, "logic": counts | {"response_tokens": 400}}}
    lines[-1]["held_out"] = {"math": 1.0, "logic": 2.0}
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    environment = {"machine": "a box", "python": "3", "git_revision": None, "world_size": 2, "versions": {"torch": "9"}}
    (run / "environment.json").write_text(json.dumps(environment))
    return run


def _options(run: Path, **changes: Any) -> EvaluateOptions:
    options: dict[str, Any] = {
        "weights": str(run),
        "eval_file": str(run.parent / "held_out.jsonl"),
        "base": None,
        "seed": 1,
    }
    options |= {
        "compare_baseline": True,
        "each_expert": False,
        "run_code": False,
        "sandbox": "bubblewrap",
        "allow_download": False,
        "max_samples": 8,
        "max_new_tokens": 4,
        "batch_size": 4,
        "bf16": False,
    }
    return EvaluateOptions(**options | {"output_file": None} | changes)


def test_evaluate_writes_figures_items_and_table(
    run_folder: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("INFO"):
        result = evaluate_command(_options(run_folder))
    assert json.loads((run_folder / "evaluation.json").read_text()) == result
    items = (run_folder / "evaluation_items.jsonl").read_text().splitlines()
    assert len(items) == result["overall"]["srde"]["items"] == 8
    assert {"base", "srde", "prompt", "answer"} <= set(json.loads(items[0]))
    longer = "4 of 7 reference responses are longer than max_new_tokens=4: an answer that is cut off before it"
    assert longer in caplog.text and "The longest needs --max_new_tokens 6." in caplog.text
    cut = sum(json.loads(line)["srde"].get("cut", False) for line in items)
    assert cut and f"srde: answers that reached max_new_tokens ('cut' in the items): {cut}" in caplog.text
    for line in map(json.loads, items):
        told = line["srde"].get("answer_tokens")
        assert "answer_tokens" not in line["base"] and (told is None) == (line["scoring"] is None)
        if told is not None:
            assert "".join(told) == line["srde"]["prediction"]
            shares = line["srde"]["answer_experts"]
            assert len(told) - 1 <= len(shares) <= len(told) and all(abs(sum(row) - 100) <= 2 for row in shares)
    assert (result["run"]["dtype"], result["run"]["base_quantization"]) == ("float32", "none")
    assert result["run"]["items_sha256"] == items_hash([json.loads(line) for line in items])
    printed = capsys.readouterr().out
    assert "overall" in printed and "evaluation.json" in printed
    assert not list(run_folder.glob("*.tmp"))


def test_the_longest_answer_follows_from_the_context(run_folder: Path) -> None:
    result = evaluate_command(_options(run_folder, max_new_tokens=None, max_samples=1))
    assert result["run"]["max_new_tokens"] == 64  # the context is 256
    with patch("srde_ds.evaluation.command.answer_length", lambda model, given, most: given or most // 16):
        assert evaluate_command(_options(run_folder, max_new_tokens=None))["run"]["max_new_tokens"] == 4


def test_report_is_made_of_the_run(run_folder: Path) -> None:
    result = evaluate_command(_options(run_folder, each_expert=True))
    page = write_report(run_folder)
    text = page.read_text()
    for name in ("loss.png", "expert_usage.png", "expert_usage_by_layer.png", "speed.png"):
        assert f"({name})" in text
        assert (run_folder / name).read_bytes().startswith(b"\x89PNG")
    math = result["domains"]["math"]
    assert f"| math | 4 | {math['base']['loss']:.3f} → {math['srde']['loss']:.3f} |" in text
    assert "**logic**" in text and "- expected: `0`" in text and "- base (" in text and "- srde (" in text
    losses = " | ".join(f"{loss:.3f}" for loss in result["each_expert"]["loss"][2])
    assert f"| code alone | {losses} |" in text and "| as routed | " in text and "## By source" not in text
    assert "| train | math | 9 | 2 | 1 | 1,200 | 75.0% |" in text and "| loss_weighting | domain |" in text
    assert "each domain counts equally" in text and "Held out: the mean over the response tokens" in text
    assert "| machine | a box |" in text and "| torch | 9 |" in text
    assert "5 steps, 500 tokens, 50 tokens/s" in text
    assert examples(page).startswith("**math**") and "Speed" not in examples(page)


def test_without_matplotlib_only_the_report_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    for name in ("evaluation.command", "evaluation.report", "evaluation.plots", "pages.figures"):
        monkeypatch.delitem(sys.modules, f"srde_ds.{name}", raising=False)
    importlib.import_module("srde_ds.evaluation.command")
    with pytest.raises(SRDEError, match="matplotlib.* is missing"):
        importlib.import_module("srde_ds.evaluation.report")


def test_report_names_what_is_missing(run_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(SRDEError, match=r"no such file .*metrics.jsonl': train first"):
        write_report(tmp_path)
    (tmp_path / "metrics.jsonl").write_bytes((run_folder / "metrics.jsonl").read_bytes())
    with pytest.raises(SRDEError, match="evaluate first"):
        write_report(tmp_path)
    (tmp_path / "evaluation.json").write_text("{")
    with pytest.raises(SRDEError, match="not valid JSON"):
        write_report(tmp_path)
    (tmp_path / "evaluation.json").write_text('{"overall": {}, "domains": {}}')
    with pytest.raises(SRDEError, match="earlier version: evaluate again"):
        write_report(tmp_path)


def test_programs_are_run_only_if_that_is_asked_for(run_folder: Path, tmp_path: Path, caplog: Any) -> None:
    eval_file = tmp_path / "held_out.jsonl"
    write_jsonl(eval_file, scored_records()[-4:])
    flags = [f"--checkpoint={run_folder}", f"--eval_file={eval_file}", "--max_new_tokens=2", "--local_rank=0"]
    flags += ["--bf16=false", f"--output_file={tmp_path / 'evaluation.json'}"]
    for more, scored in (([], 3), (["--run_code"], 4), (["--run_code", "--sandbox", "none"], 4)):
        caplog.clear()
        assert main(["evaluate", *flags, *more]) == 0
        result = json.loads((tmp_path / "evaluation.json").read_text())
        assert result["overall"]["srde"]["scored"] == scored
        assert result["run"]["sandbox"] == (None if not more else "none" if "none" in more else "bubblewrap")
        assert ("items with tests that are not scored: 1." in caplog.text) == (not more)
        assert ("can read, change and send all that you can" in caplog.text) == ("none" in more)


def test_without_a_sandbox_programs_are_refused_before_anything_loads(
    run_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    options = _options(run_folder, weights="/nowhere", run_code=True)
    with pytest.raises(SRDEError, match=r"'bwrap' is missing.*--sandbox none"):
        evaluate_command(options)
    with pytest.raises(SRDEError, match="no such file or folder"):
        evaluate_command(replace(options, sandbox="none"))


def test_results_are_written_as_they_come(run_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    judged = 0

    def judge(prediction: str, record: Record, scoring: str, sandbox: str | None = None, *, cut: bool) -> bool:
        nonlocal judged
        judged += 1
        if judged == 3:
            raise KeyboardInterrupt
        return True

    monkeypatch.setattr(results_module, "is_right", judge)
    options = _options(run_folder, output_file=str(tmp_path / "out/evaluation.json"))
    part, elsewhere = tmp_path / "out/evaluation_items.part0.jsonl", tmp_path / "elsewhere"
    part.parent.mkdir()
    elsewhere.write_text("kept")
    part.symlink_to(elsewhere)  # in a folder of somebody else's
    with pytest.raises(KeyboardInterrupt):
        evaluate_command(options)
    assert elsewhere.read_text() == "kept" and not part.is_symlink()
    lines = [json.loads(line) for line in part.read_text().splitlines()]
    assert len(lines) >= 2 and all(line["model"] == "srde" for line in lines)
    assert {"item", "loss", "prediction", "correct"} <= set(lines[0])
    evaluate_command(options)
    assert sorted(path.name for path in part.parent.iterdir()) == ["evaluation.json", "evaluation_items.jsonl"]


def test_output_goes_beside_what_was_evaluated(run_folder: Path) -> None:
    assert default_output(str(run_folder)) == run_folder / "evaluation.json"
    assert default_output(str(run_folder / "srde_weights.safetensors")) == run_folder / "evaluation.json"
    (run_folder / "checkpoint-30").mkdir()
    assert default_output(str(run_folder / "checkpoint-30")) == run_folder / "evaluation-30.json"
    assert default_output("someone/experts") == Path("evaluation.json")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"weights": "/nowhere"}, "no such file or folder"),
        ({"eval_file": "/nowhere.jsonl"}, "no such file"),
        ({"base": "/nowhere"}, "/nowhere"),
        ({"output_file": f"{__file__}/evaluation.json"}, "is not a folder"),
        ({"output_file": str(Path(__file__).parent)}, "it is a folder"),
        ({"max_samples": 0}, "max_samples=0"),
        ({"max_new_tokens": 1000}, "exceed the base's context of 256"),
    ],
)
def test_bad_input_is_one_line(run_folder: Path, tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    output = tmp_path / "out" / "evaluation.json"
    with pytest.raises(SRDEError, match=message) as error:
        evaluate_command(_options(run_folder, **{"output_file": str(output)} | changes))
    assert "\n" not in str(error.value)
    assert not output.parent.exists()


def test_a_hostile_config_of_the_run_is_refused_in_time(run_folder: Path, tmp_path: Path) -> None:
    run = shutil.copytree(run_folder, tmp_path / "run")
    aliases = "".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 12))
    (run / "config.yaml").write_text(f"a0: &a0 [x]\n{aliases}")  # a bomb: 9^11 values
    started = time.process_time()
    options = _options(run, eval_file=str(run_folder.parent / "held_out.jsonl"))
    with pytest.raises(SRDEError, match=f"config: '{run / 'config.yaml'}', line .*aliases written out") as error:
        evaluate_command(options)
    assert time.process_time() - started < 20 and "\n" not in str(error.value)


def test_an_unknown_domain_is_named(run_folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "held_out.jsonl"
    path.write_text('{"domain": "maths", "prompt": "a", "response": "b"}\n')
    with pytest.raises(SRDEError, match="unknown domain 'maths'"):
        evaluate_command(_options(run_folder, eval_file=str(path)))


def test_training_records_of_a_file_of_all_splits_are_left_out(
    run_folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    lines = [json.loads(line) for line in (run_folder.parent / "held_out.jsonl").read_text().splitlines()]
    marked = [line | {"split": split} for line, split in zip(lines[:3], ("train", "test", "validation"), strict=True)]
    path = tmp_path / "all.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in marked))
    caplog.set_level("INFO")
    result = evaluate_command(_options(run_folder, eval_file=str(path), output_file=str(tmp_path / "e.json")))
    assert result["overall"]["srde"]["items"] == 2
    assert f"{path}: 2 held-out items; left out as training items: 1" in caplog.text
    assert "--max_samples" not in caplog.text
    options = _options(run_folder, eval_file=str(path), output_file=str(tmp_path / "e.json"), max_samples=1)
    assert evaluate_command(options)["overall"]["srde"]["items"] == 1
    assert f"{path}: 1 of 2 items are taken (--max_samples)" in caplog.text


def test_the_loss_is_over_the_turns_that_the_run_was_trained_on(
    run_folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    turns = [{"role": role, "content": "red blue"} for role in ("user", "assistant", "user", "assistant")]
    path = tmp_path / "talks.jsonl"
    path.write_text(json.dumps({"domain": "math", "messages": turns, "answer": "red"}))

    def tokens(run: Path, **how: Any) -> int:
        result = evaluate_command(_options(run, eval_file=str(path), output_file=str(tmp_path / "e.json"), **how))
        assert result["run"]["train_on"] == how.get("train_on", "all" if run == run_folder else "last")
        return int(result["overall"]["srde"]["tokens"])

    last, built = tmp_path / "last", tmp_path / "built"
    for folder in (last, built):
        shutil.copytree(run_folder, folder)
    (last / "config.yaml").write_text(yaml.safe_dump(resolve({}, {"train_on": "last"}).to_dict()))
    manifest = {"format_version": 1, "max_length": 8, "too_long": "drop", "seed": 0, "domains": ["math"], "splits": {}}
    manifest |= {"tokenizer": {"name": "a"}, "train_on": "last"}
    (built / "tokenized").mkdir()
    (built / "tokenized" / "manifest.json").write_text(json.dumps(manifest))  # rows that build_dataset made
    assert tokens(run_folder) == tokens(last, train_on="all") > tokens(last) == tokens(run_folder, train_on="last")
    assert tokens(built) == tokens(last)
    gone = resolve({}, {"train_on": "last", "pretokenized_dir": str(tmp_path / "gone")})
    (last / "config.yaml").write_text(yaml.safe_dump(gone.to_dict()))
    assert tokens(last) == tokens(built)
    assert f"{tmp_path}/gone: the run's rows are no longer there; its config.yaml says train_on=last" in caplog.text


def test_a_week_of_metrics_makes_a_short_report(tmp_path: Path) -> None:
    path, count = tmp_path / "metrics.jsonl", 500_000
    with open(path, "w") as file:
        for step in range(1, count + 1):
            more = ', "held_out": {"red": 1.0}' if step % 50_000 == 7 else ""
            file.write(f'{{"step": {step}, "loss": 1.0{more}}}\n')
    lines = read_metrics(path)
    steps = [line["step"] for line in lines]
    assert steps[0] == 1 and steps[-1] == count and steps == sorted(set(steps))
    assert len(steps) <= MOST_LINES + 11 and sum("held_out" in line for line in lines) == 10
    # Whatever is left out, the phases keep their borders.
    borders, count = {1: "pretraining", 1001: "routers", 1004: "routed"}, 12_000
    with open(path, "w") as file:
        for step in range(1, count + 1):
            phase = borders[max(border for border in borders if border <= step)]
            file.write(f'{{"step": {step}, "phase": "{phase}", "unlocked_experts": [0, {step // 6000}]}}\n')
    steps = [line["step"] for line in read_metrics(path, most=100)]
    assert {1000, 1001, 1003, 1004, 5999, 6000} < set(steps) and len(steps) <= 108
    path.write_text("".join(f'{{"step": {step}}}\n' for step in range(1, 8)))
    assert [line["step"] for line in read_metrics(path)] == list(range(1, 8))


def test_a_report_that_cannot_be_written_leaves_the_former_one(
    run_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    evaluate_command(_options(run_folder))
    write_report(run_folder)
    before = _files(run_folder)

    def full(*arguments: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("srde_ds.evaluation.report.plot_speed", full)
    assert main(["report", "--run", str(run_folder)]) == 2
    assert _files(run_folder) == before


def _files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
