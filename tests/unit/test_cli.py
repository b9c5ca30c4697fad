"""The verbs: flags, help, dry runs and exit status."""

from __future__ import annotations

import logging
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import yaml

import srde_ds
from srde_ds.cli.flags import Parser
from srde_ds.cli.main import VERBS, main
from srde_ds.cli.train import train_config
from srde_ds.config import Config, resolve
from tests.cli_helpers import POSITIONS, fails, flags
from tests.helpers import tiny_llama

ROOT = Path(__file__).parents[2]
FIELDS = [field for section in fields(Config) for field in fields(getattr(Config(), section.name))]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A configuration without weights: enough for a dry run."""
    folder = tmp_path_factory.mktemp("base")
    tiny_llama().config.save_pretrained(folder)
    return str(folder)


def help_of(verb: str, capsys: pytest.CaptureFixture[str], flag: str = "--help-all") -> str:
    with pytest.raises(SystemExit) as ended:
        main([verb, flag])
    assert ended.value.code == 0
    return capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ([], True),
        (["--bf16"], True),
        (["--bf16", "true"], True),
        (["--bf16", "false"], False),
        (["--bf16=0"], False),
        (["--bf16", "No"], False),
        (["--bf16", "--max_steps", "90"], True),
    ],
)
def test_boolean_flags_take_an_optional_value(arguments: list[str], expected: bool) -> None:
    assert train_config(arguments)[0].model.bf16 is expected


def test_boolean_flags_of_other_verbs(capsys: pytest.CaptureFixture[str]) -> None:
    seen: dict[str, Any] = {}
    with patch("srde_ds.inference.command.inference_command", lambda options, _: seen.update(vars(options))):
        assert main(["inference", "--srde_weights", "w", "--prompt", "x", "--stream", "--bf16", "false"]) == 0
        assert (seen["stream"], seen["bf16"], seen["interactive"]) == (True, False, False)
        assert main(["inference", "--stream", "w", "--prompt", "x"]) == 0  # the word after it is the weights
        assert (seen["stream"], seen["weights"]) == (True, "w")
    fails(capsys, ["inference", "w", "--stream=maybe"], "stream='maybe'", "true or false")
    fails(capsys, ["train", "--bf16", "maybe"], "bf16='maybe'", "true or false")


def test_two_names_of_an_option_with_different_values_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["inference", "w", "--prompt", "x", "--max_tokens", "4"]
    fails(capsys, [*words, "--max_new_tokens=8"], "max_tokens='4' and max_new_tokens='8' are two names of one option")
    with patch("srde_ds.inference.command.inference_command") as command:
        assert main([*words, "--max_new_tokens", "4"]) == 0
        assert main([*words, "--max_tokens", "8"]) == 0  # of one name, the last value counts
    assert [call.args[0].max_new_tokens for call in command.call_args_list] == [4, 8]


def test_every_verb_takes_weights_by_the_same_names(capsys: pytest.CaptureFixture[str]) -> None:
    seen: list[Any] = []
    commands = {
        ("evaluate", "--eval_file", "e"): "srde_ds.evaluation.command.evaluate_command",
        ("inference", "--prompt", "x"): "srde_ds.inference.command.inference_command",
        ("convert",): "srde_ds.export.command.convert_command",
    }
    for (verb, *others), function in commands.items():
        with patch(function, lambda options, *_: seen.append(options)):
            for words in (["w"], *([flag, "w"] for flag in ("--weights", "--checkpoint", "--srde_weights", "--run"))):
                for arguments in ([*words, *others], [*others, *words]):
                    assert main([verb, *arguments]) == 0
                    assert seen.pop().weights == "w"
        fails(capsys, [verb, *others], "weights is missing: give WEIGHTS or --weights", f"{verb} --help")
        fails(capsys, [verb, "v", *others, "--weights", "w"], "weights is given twice: 'v' and 'w'")
        fails(capsys, [verb, "v", "w", *others], "unknown argument 'v'")
    with patch("srde_ds.evaluation.run_page.write_run_page", lambda run, target: seen.append(run)):
        for words in (["w"], *([flag, "w"] for flag in ("--run", "--weights", "--checkpoint", "--srde_weights"))):
            assert main(["report", *words]) == 0
            assert seen.pop() == "w"


def test_two_names_of_one_option(capsys: pytest.CaptureFixture[str]) -> None:
    seen: list[Any] = []
    with patch("srde_ds.evaluation.command.evaluate_command", lambda options, _: seen.append(options)):
        for tokens, output in (("--max_tokens", "--output"), ("--max_new_tokens", "--output_file")):
            assert main(["evaluate", "w", "--eval_file", "e", tokens, "7", output, "o"]) == 0
            assert (seen[-1].max_new_tokens, seen[-1].output_file) == (7, "o")
    with patch("srde_ds.inference.command.inference_command", lambda options, _: seen.append(options)):
        for tokens, output in (("--max_tokens", "--output"), ("--max_new_tokens", "--output_file")):
            assert main(["inference", "w", tokens, "7", output, "o"]) == 0
            assert (seen[-1].max_new_tokens, seen[-1].output_file) == (7, "o")
    with patch("srde_ds.export.command.convert_command", seen.append):
        for output in ("--output", "--output_file"):
            assert main(["convert", "w", output, "o"]) == 0
            assert seen[-1].output == "o"


def test_flags_of_the_predecessor_are_understood() -> None:
    command = (
        "--model_name m --train_file t.jsonl --output_dir o --max_steps 300 --use_muon --bf16 --resume_from latest "
        "--max_length 2048 --batch_size 1 --gradient_accumulation_steps 16 --learning_rate 1e-4 --muon_lr 0.02 "
        "--warmup_steps 100 --num_experts 6 --top_k 2 --target_sparsity .05 --log_steps 10 --save_steps 500 "
        "--gradient_checkpointing --flash_attention --use_wandb --wandb_project p --wandb_run_name r "
        "--deepspeed d.json --local_rank=1"
    )
    config, dry_run = train_config(command.split())
    assert not dry_run
    assert (config.data.jsonl_data, config.adapter.density, config.optimizer.learning_rate) == ("t.jsonl", 0.05, 1e-4)
    assert (config.tracking.use_wandb, config.tracking.wandb_run_name) == (True, "r")
    assert (config.parallel.deepspeed_config, config.training.resume_from) == ("d.json", "latest")


@pytest.mark.parametrize(
    ("verb", "option", "others"),
    [
        ("convert", "output", "w"),
        ("build_dataset", "work_dir", "--examples_per_domain 1 --skip_tokenize"),
        ("combine", "output", "a b"),
        ("rename", "output", "w --names a=b"),
        ("remove", "output", "w --experts a"),
        ("evaluate", "output_file", "w --eval_file e"),
        ("inference", "output_file", "w --prompts_file p"),
        ("plan", "output_file", ""),
        ("report", "output_file", "r"),
        ("hosts", "output_file", "--list a:1"),
        ("hosts", "environment_file", "--list a:1"),
        ("hosts", "ssh_config", "--list a:1"),
        ("train", "output_dir", ""),
        ("convert", "weights", ""),
        ("inference", "base", "w --prompt p"),
        ("train", "model_name", ""),
    ],
)
def test_an_empty_name_is_not_the_current_folder(
    verb: str,
    option: str,
    others: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    for empty in ("", " "):
        fails(capsys, [verb, *others.split(), f"--{option}", empty], f"{option}='' is empty. Give a name")
    assert list(tmp_path.iterdir()) == []


def test_the_launchers_rank_flag_is_no_option() -> None:
    assert train_config(["--local_rank", "0"])[0] == resolve({}, {})


def test_flags_win_over_the_file(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("adapter: {num_experts: 4, top_k: 1}\n")
    config, _ = train_config(["--config", str(path), "--num_experts", "5"])
    assert (config.adapter.num_experts, config.adapter.top_k) == (5, 1)


@pytest.mark.parametrize("field", FIELDS, ids=lambda field: field.name)
def test_every_option_has_a_flag_that_sets_it(field: Any) -> None:
    section = next(s.name for s in fields(Config) if hasattr(getattr(Config(), s.name), field.name))
    default = getattr(getattr(Config(), section), field.name)
    values = {bool: str(not default), int: "7", float: "0.125", list: "a,b"}
    text = OTHER_VALUES.get(field.name, values.get(type(default), "some/path"))
    for name in (field.name, *field.metadata["aliases"]):
        config, _ = train_config([f"--{name}", text, *NEEDED.get(field.name, [])])
        assert getattr(getattr(config, section), field.name) != default


OTHER_VALUES = {
    "recompute": "selective",
    "format": "alpaca",
    "on_bad_record": "skip",
    "preset": "reference",
    "top_k": "1",
    "granularity": "element",
    "support_strategy": "random",
    "support_scope": "per_expert",
    "atom_mixing": "softmax",
    "too_long": "error",
    "train_on": "last",
    "loss_weighting": "domain",
    "train_experts": "math",
    "base_placement": "resident",
    "base_quantization": "nf4",
    "expert_transport": "tokens",
    "on_save_failure": "continue",
    "lr_schedule": "wsd",
    "load_balancing_target": "domains",
    "pretrain_objective": "sequential",
    "warm_start_method": "kmeans",
    "progressive_unlock": "linear",
    "unlock_order": "cluster_size",
    "training_phases": "four",
    "initial_density": "0.05",
    "max_length": "9",
    "warm_start_samples": "9",
    "collective_timeout": "20",
    "start_timeout": "20",
}
LEARNED = ["--support_strategy", "learned"]
NEEDED = {
    "granularity": ["--num_atoms", "4"],
    "expert_pretrain_steps": ["--supervised_experts"],
    "pretrain_objective": ["--supervised_experts"],
    "warm_start_method": ["--warm_start"],
    "warm_start_samples": ["--warm_start"],
    "density_prunings": ["--initial_density", "0.1"],
    "calibration_rows": ["--support_strategy", "gradient"],
    "unlock_order": ["--warm_start", "--warm_start_method", "kmeans", "--progressive_unlock", "linear"],
    "density_warmup_steps": ["--initial_density", "0.1"],
    "support_overlap_weight": [*LEARNED, "--support_scope", "per_expert"],
    "support_temperature": LEARNED,
    "train_experts": ["--start_from", "weights"],
}


@pytest.mark.parametrize("verb", sorted(VERBS))
def test_every_flag_has_help(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    parsers: list[Any] = []
    original = Parser.parse

    def keep(self: Any, arguments: Sequence[str]) -> Any:
        parsers.append(self)
        return original(self, arguments)

    with patch.object(Parser, "parse", keep):
        text = " ".join(help_of(verb, capsys).split())
    for action in parsers[0]._actions:
        assert action.help
        if action.help != "==SUPPRESS==":
            assert all(flag in text for flag in action.option_strings)
    assert "%%" not in text
    assert "==SUPPRESS==" not in text


@pytest.mark.parametrize("columns", [80, 100])
@pytest.mark.parametrize("verb", sorted(VERBS))
def test_the_first_help_is_short(
    verb: str, columns: int, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    lines = help_of(verb, capsys, "--help").splitlines()
    assert len(lines) <= 100 and max(map(len, lines)) <= columns  # two screens of 50 lines
    assert not any("(also --" in line for line in lines)


def test_help_and_wrong_values_come_before_libraries_are_loaded() -> None:
    program = """
import sys
from contextlib import suppress
from srde_ds.cli.main import VERBS, main
for verb in VERBS:
    with suppress(SystemExit):
        main([verb, "--help"])
assert main(["train", "--muon_lr", "fast"]) == 2
assert not {"torch", "transformers", "datasets", "deepspeed"} & sys.modules.keys()
"""
    assert subprocess.run([sys.executable, "-c", program], stdout=subprocess.DEVNULL).returncode == 0


def test_the_common_options_come_first(capsys: pytest.CaptureFixture[str]) -> None:
    first, everything = help_of("train", capsys, "--help"), help_of("train", capsys)
    for field in FIELDS:
        assert (f"  --{field.name} " in first) == field.metadata["common"]
        assert f"  --{field.name} " in everything
    assert "(also --target_sparsity)" in " ".join(everything.split())
    for verb in ("plan", "doctor"):
        assert "  --top_k " not in help_of(verb, capsys, "--help")
        assert "  --top_k " in help_of(verb, capsys)


def test_help_lists_every_option_of_a_run(capsys: pytest.CaptureFixture[str]) -> None:
    text = " ".join(help_of("train", capsys).split())
    for field in FIELDS:
        assert f"--{field.name} " in text or f"--{field.name}," in text
        assert " ".join(field.metadata["help"].split()[:3]) in text.replace("- ", "-")
    assert "--config FILE" in text
    assert "--dry_run" in text


def test_unknown_names_come_with_the_nearest_known_one(capsys: pytest.CaptureFixture[str]) -> None:
    fails(capsys, ["train", "--max_step", "3"], "'--max_step'", "Did you mean '--max_steps'?", "train --help")
    fails(capsys, ["train", "--max_step=3"], "'--max_step'", "Did you mean '--max_steps'?")
    fails(capsys, ["train", "stray"], "'stray'")
    fails(capsys, ["evaluate", "--checkpoint", "c", "--eval_file", "e", "--max_sample", "3"], "'--max_samples'?")
    fails(capsys, ["trian"], "unknown verb 'trian'", "evaluate", "Did you mean 'train'?")


def test_a_flag_without_its_value_and_a_missing_flag(capsys: pytest.CaptureFixture[str]) -> None:
    fails(capsys, ["train", "--max_steps"], "--max_steps", "expected one argument")
    fails(capsys, ["evaluate", "--checkpoint", "c"], "--eval_file", "evaluate --help")
    fails(capsys, ["evaluate", "--checkpoint", "c", "--eval_file", "e", "--seed", "x"], "seed='x'", "whole number")
    fails(capsys, ["convert", "c", "--to", "onnx"], "to='onnx'", "weights, peft, dense, moe, gguf")
    fails(capsys, ["convert", "c", "--dtype", "int8"], "dtype='int8'", "float32, bfloat16")
    fails(capsys, ["hosts", "--list", "a", "--slurm"], "--list and --slurm", "leave one out")
    fails(capsys, ["supervise", "--max_restarts", "-1", "--", "x"], "max_restarts=-1", "at least 0")
    fails(capsys, ["build_dataset", "--jsonl_data", "x"], "model_name is missing", "--model_name")
    fails(capsys, ["build_dataset", "--model_name", "x"], "jsonl_data is missing", "--jsonl_data")
    options = {"model_name": "x", "jsonl_data": "y"}
    fails(capsys, ["build_dataset", *flags(options), "--num_processes", "0"], "num_processes=0", "at least 1")
    fails(capsys, ["build_dataset", *flags(options), "--max_length", "0"], "max_length=0", "at least 8")


def test_other_verbs_name_what_is_missing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    none = str(tmp_path / "none")
    fails(capsys, ["evaluate", "--checkpoint", none, "--eval_file", none], none)
    fails(capsys, ["inference", "--srde_weights", none, "--prompt", "x"], none)
    fails(capsys, ["inference", "--srde_weights", none], "--prompt", "--interactive")
    fails(capsys, ["convert", "--checkpoint", none, "--output_file", str(tmp_path / "w")], none)
    fails(capsys, ["report", "--run", none], none, "train first")
    assert list(tmp_path.iterdir()) == []


def test_a_rank_says_which_one_it_is(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("RANK", "3")
    assert fails(capsys, ["trian"]).startswith("srde-ds: error: rank 3: ")
    monkeypatch.delenv("RANK")
    monkeypatch.setenv("OMPI_COMM_WORLD_RANK", "4")
    assert fails(capsys, ["trian"]).startswith("srde-ds: error: rank 4: ")


def test_usage_and_version(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in ([], ["--help"], ["-h"]):
        assert main(arguments) == 0
        text = capsys.readouterr().out
        assert [verb for verb in VERBS if verb not in text] == []
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.strip() == srde_ds.__version__


def test_each_verb_has_a_script() -> None:
    for verb in VERBS:
        script = {"inspect": "inspect_weights"}.get(verb, verb)
        text = (ROOT / "launch" / f"{script}.py").read_text()
        assert f'main(["{verb}", *sys.argv[1:]])' in text


def test_a_dry_run_starts_nothing(base: str, tmp_path: Path) -> None:
    options = {"model_name": base, "output_dir": str(tmp_path / "run"), "max_length": POSITIONS, "num_experts": 3}
    program = (
        "import sys; from srde_ds.cli.main import main\n"
        "status = main(sys.argv[1:])\n"
        "assert 'deepspeed' not in sys.modules\n"
        "sys.exit(status)"
    )
    command = [sys.executable, "-c", program, "train", "--dry_run", *flags(options)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert (result.returncode, result.stderr) == (0, "")
    assert not (tmp_path / "run").exists()
    config, table = result.stdout.split("\n\n", 1)
    assert yaml.safe_load(config)["training"]["output_dir"] == str(tmp_path / "run")
    assert "deltas.free" in table
    assert "GiB per process with 1 process," in table


@pytest.mark.parametrize("arguments", [["--help"], ["hosts", "--list", "localhost:1"]])
def test_a_reader_of_the_output_may_leave(arguments: list[str]) -> None:
    command = [sys.executable, "-m", "srde_ds.cli", *arguments]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stderr is not None
        process.stdout.close()
        assert (process.stderr.read(), process.wait()) == ("", 128 + signal.SIGPIPE)
    closed = subprocess.run(["sh", "-c", '"$@" >&-', "sh", *command], cwd=ROOT, stderr=subprocess.PIPE, text=True)
    assert (closed.returncode, closed.stderr) == (0, "")


@pytest.mark.parametrize(
    ("options", "values"),
    [
        # two layers, D 32, three experts; 5 of 96 neurons, a quarter of 19, or 461 of 9216 weights
        ({}, {"deltas.free": 2 * 3 * 3 * 8 * 19, "router.weight": 2 * 3 * 32}),
        ({"neuron_parts": 1}, {"deltas.free": 2 * 3 * 3 * 32 * 5, "router.weight": 2 * 3 * 32}),
        (
            {"num_atoms": 4},
            {"deltas.atoms": 2 * 4 * 3 * 32 * 5, "deltas.importance": 2 * 3 * 3 * 32 * 5, "deltas.mixing": 2 * 3 * 4},
        ),
        (
            {"num_atoms": 4, "granularity": "element"},
            {"deltas.atoms": 2 * 4 * 461, "deltas.importance": 2 * 3 * 461, "deltas.mixing": 2 * 3 * 4},
        ),
    ],
)
def test_a_dry_run_counts_the_parameters(
    base: str, options: dict[str, Any], values: dict[str, int], capsys: pytest.CaptureFixture[str]
) -> None:
    run = {"model_name": base, "max_length": POSITIONS, "num_experts": 3, "density": 0.05} | options
    assert main(["train", "--dry_run", *flags(run)]) == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    shown = {row[0]: row[1] for row in rows if len(row) == 3}
    assert shown | {name: f"{value:,}" for name, value in values.items()} == shown


def test_only_the_first_rank_prints_a_dry_run(
    base: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["train", "--dry_run", "--model_name", base, "--max_length", "64"]
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert main(arguments) == 0
    assert "with 4 processes" in capsys.readouterr().out
    monkeypatch.setenv("RANK", "1")
    assert main([*arguments, "--learning_rate", "5"]) == 0
    assert capsys.readouterr() == ("", "")


def test_a_dry_run_names_options_without_effect_and_missing_data(base: str, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["train", "--dry_run", "--model_name", base, "--max_length", "64", "--learning_rate", "5"]
    arguments += ["--use_muon", "true"]
    assert main([*arguments, "--decay_ratio", "0.3"]) == 0
    told = capsys.readouterr()
    assert [line.partition(":")[2].partition(":")[0] for line in told.err.splitlines()] == [
        " learning_rate=5.0",
        " decay_ratio=0.3",
    ]
    assert told.out.splitlines()[-1].startswith("The run would be refused, since there is no training data: give --")


def test_a_dry_run_refuses_what_a_run_would(base: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    dry_run = ["train", "--dry_run", "--max_length", "64"]
    fails(capsys, dry_run, "model_name is missing")
    fails(capsys, [*dry_run, "--model_name", str(tmp_path / "none")], "model_name=")
    fails(capsys, [*dry_run, "--model_name", base, "--ds_config", "none.json"], "deepspeed_config=none.json")
    too_long = [*dry_run[:-1], str(POSITIONS + 1), "--model_name", base]
    fails(capsys, too_long, f"max_length={POSITIONS + 1}", f"--max_length {POSITIONS}")
    dry_run += ["--model_name", base]
    fails(capsys, [*dry_run, "--expert_parallel_size", "2"], "expert_parallel_size=2: must divide the number of proc")
    fails(capsys, [*dry_run, "--domain_weights", "maths=1"], "unknown domain 'maths'. Did you mean 'math'?")
    fails(capsys, [*dry_run, "--resume_from", str(tmp_path)], f"resume_from={tmp_path}")
    annealing = ["--initial_sparsity", "0.05", "--density_warmup_steps", "1000"]
    fails(capsys, [*dry_run, *annealing], "give --density_warmup_steps", "max_steps - 1 = 999")
    for package in ("wandb", "trackio"):
        with patch.dict(sys.modules, {package: None}):
            fails(capsys, [*dry_run, f"--use_{package}"], f"use_{package}=true", f"package '{package}' is missing")
    with patch("srde_ds.training.run_folder.find_spec", return_value=None):
        fails(capsys, [*dry_run, "--flash_attention"], "flash_attention=true", "'flash-attn' is missing")
    with patch("torch.cuda.is_available", return_value=False):
        fails(capsys, [*dry_run, "--expert_kernels"], "expert_kernels=true", "need a CUDA device")


def test_a_dry_run_shows_what_is_derived(base: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "--dry_run", "--model_name", base, "--max_steps", "40", "--supervised_experts"]) == 0
    shown = capsys.readouterr().out
    config = yaml.safe_load(shown.split("\n\n", 1)[0])
    assert (config["optimizer"]["warmup_steps"], config["data"]["max_length"]) == (2, POSITIONS)
    assert config["curriculum"]["expert_pretrain_steps"] == 2
    assert "  warmup_steps: 2  # derived: 5 % of max_steps\n" in shown
    assert f"  max_length: {POSITIONS}  # derived: the context of the base\n" in shown
    assert "  expert_pretrain_steps: 2  # derived: 30 % of max_steps divided by the domains\n" in shown
    assert main(["train", "--dry_run", "--model_name", base, "--max_steps", "40", "--warmup_steps", "3"]) == 0
    assert "  warmup_steps: 3\n" in capsys.readouterr().out


def test_a_plan_and_a_doctor_take_the_length_from_the_base(base: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--model_name", base, "--num_experts", "3"]) == 0
    assert f"rows of {POSITIONS} tokens" in capsys.readouterr().out
    main(["doctor", "--model_name", base])
    assert "max_length" not in capsys.readouterr().out
    main(["doctor", "--model_name", "/none"])
    assert "model_name=" in capsys.readouterr().out


def test_report_prints_the_answers_and_where_the_page_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = tmp_path / "report.md"
    page.write_text("# run\n\n## One answer from each domain\n\n**math**\n\n- expected: `4`\n\n## Speed\n\nfast\n")
    html, seen = tmp_path / "report.html", []
    (tmp_path / "evaluation.json").touch()

    def write_page(run: str, target: Path | None) -> Path:
        seen.append(target)
        return html

    with (
        patch("srde_ds.evaluation.report.write_report", lambda run: Path(run) / "report.md"),
        patch("srde_ds.evaluation.run_page.write_run_page", write_page),
    ):
        assert main(["report", "--run", str(tmp_path)]) == 0
        printed = capsys.readouterr().out
        assert printed == f"**math**\n\n- expected: `4`\n\nReport: {page}\nReport: {html}\n"
        (tmp_path / "evaluation.json").unlink()
        assert main(["report", str(tmp_path), "--output", str(tmp_path / "other.html")]) == 0
        assert capsys.readouterr().out == (
            "Not evaluated yet, so there is no report.md; `srde-ds evaluate` fills in what is missing.\n"
            f"Report: {html}\n"
        )
    assert seen == [None, tmp_path / "other.html"]
    fails(capsys, ["report", "r", "--output", str(tmp_path)], "output_file=", "it is a folder")
    fails(capsys, ["report", "r", "--output", str(tmp_path / "no" / "x.html")], "output_file=", "there is no folder")


def test_report_compares_several_runs(capsys: pytest.CaptureFixture[str]) -> None:
    seen: list[Any] = []

    def compare(runs: list[str], target: Path) -> Path:
        seen.append((runs, target))
        return target

    with patch("srde_ds.evaluation.comparison_page.write_comparison_page", compare):
        assert main(["report", "--run", "a,b", "c", "d"]) == 0
        assert main(["report", "a,b", "c", "d", "--output_file", "x.html"]) == 0
    assert seen == [(["a,b", "c", "d"], Path("comparison.html")), (["a,b", "c", "d"], Path("x.html"))]
    assert capsys.readouterr().out == "Report: comparison.html\nReport: x.html\n"


def test_messages_reach_the_console_of_the_first_rank(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    log = logging.getLogger("srde_ds.some.part")
    handlers = list(logging.getLogger("srde_ds").handlers)
    with patch.dict(VERBS, {"train": lambda _: log.info("a message")}):
        assert main(["train"]) == 0
        assert capsys.readouterr().err == "srde-ds: a message\n"
        monkeypatch.setenv("RANK", "1")
        assert main(["train"]) == 0
        assert capsys.readouterr().err == ""
    assert logging.getLogger("srde_ds").handlers == handlers
