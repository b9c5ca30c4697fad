"""The base that an adapter names: its code never runs, nobody is asked, nothing is fetched without consent."""

from __future__ import annotations

import ast
import io
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from srde_ds.cli.main import main
from srde_ds.weights.file import read_weights, save_weights
from tests.evaluation_helpers import save_model
from tests.hub_standin import standin

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def with_code(weights: Path, tmp_path: Path) -> Iterator[tuple[Path, Path]]:
    """Weights whose base has become a folder with code beside it, and the file that the code would write."""
    base, trace = weights.parents[1] / "base", tmp_path / "trace"
    kept = tmp_path / "kept"
    shutil.copytree(base, kept)
    for name in ("configuration_own.py", "modeling_own.py", "tokenization_own.py"):
        (base / name).write_text(f"open({str(trace)!r}, 'w').write('ran')\nclass Own: pass\n")
    config = json.loads((base / "config.json").read_text())
    own = {"AutoConfig": "configuration_own.Own", "AutoModelForCausalLM": "modeling_own.Own"}
    (base / "config.json").write_text(json.dumps(config | {"model_type": "own", "auto_map": own}))
    tokenizer = json.loads((base / "tokenizer_config.json").read_text())
    tokenizer |= {"auto_map": {"AutoTokenizer": ["tokenization_own.Own", None]}, "tokenizer_class": "Own"}
    (base / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    yield weights, trace
    shutil.rmtree(base)
    shutil.copytree(kept, base)


@pytest.mark.parametrize("named", [False, True])
def test_a_first_message_of_yes_is_no_consent(
    with_code: tuple[Path, Path], named: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    weights, trace = with_code
    said = io.StringIO("yes\nyes\nyes\n")
    monkeypatch.setattr(sys, "stdin", said)
    given = ["--base", str(weights.parents[1] / "base")] if named else []
    assert main(["inference", "--srde_weights", str(weights), "--interactive", *given]) == 2
    printed = capsys.readouterr()
    assert "Do you wish to run the custom code" not in printed.out + printed.err
    assert printed.err.count("srde-ds: error: ") == 1
    assert said.tell() == 0 and not trace.exists()


def test_convert_asks_nobody_either(
    with_code: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights, trace = with_code
    said = io.StringIO("yes\nyes\n")
    monkeypatch.setattr(sys, "stdin", said)
    target = ["--to", "dense", "--expert", "math", "--output", str(tmp_path / "dense")]
    assert main(["convert", "--checkpoint", str(weights), *target]) == 2
    assert said.tell() == 0 and not trace.exists() and not (tmp_path / "dense").exists()


def test_every_load_says_no_to_remote_code() -> None:
    calls = []
    for path in (file for folder in ("srde_ds", "launch", "benchmarks") for file in (ROOT / folder).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
                continue
            loads = re.match("[Aa]uto|_auto", ast.unparse(node.func.value)) and node.func.attr.startswith("from_")
            if loads:
                calls.append(f"{path.name}:{node.lineno} {ast.unparse(node)}")
    assert len(calls) >= 8
    assert [call for call in calls if "trust_remote_code=False" not in call] == []


def test_the_console_says_who_chose_the_base(
    weights: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    base = str(weights.parents[1] / "base")
    for given, told in ([], True), (["--base", base], False):
        assert main(["inference", "--srde_weights", str(weights), "--prompt", "ab", "--max_tokens", "1", *given]) == 0
        assert (f"srde-ds: base: {base}, named by the adapter\n" in capsys.readouterr().err) == told


def test_a_base_that_is_not_here_is_fetched_only_if_the_user_agrees(weights: Path, tmp_path: Path) -> None:
    file = read_weights(weights)
    tensors = {name: tensor.load() for name, tensor in file.tensors.items()}
    far = tmp_path / "far.safetensors"
    save_weights(far, tensors, replace(file.metadata, model_name="someone/base"))
    with standin() as hub:
        base = weights.parents[1] / "base"
        hub.add("someone/base", {path.name: path.read_bytes() for path in base.iterdir()})
        environment = os.environ | {"HF_ENDPOINT": hub.endpoint, "HF_HOME": str(tmp_path / "hub")}
        environment.pop("HF_HUB_OFFLINE", None)

        def ask(*more: str) -> subprocess.CompletedProcess[str]:
            command = [sys.executable, "-m", "srde_ds.cli", "inference", "--srde_weights", str(far), "--prompt", "ab"]
            return subprocess.run(
                [*command, "--max_tokens", "1", *more], env=environment, capture_output=True, text=True, cwd=ROOT
            )

        def fetched() -> int:  # files; transformers also asks what a base in the cache is, to mend old tokenizers
            return sum(count for request, count in hub.requests.items() if "someone/base/resolve" in request)

        refused = ask()
        assert refused.returncode == 2 and not any("someone/base" in request for request in hub.requests)
        assert "base 'someone/base', named by the adapter, is not on this machine" in refused.stderr
        assert "--base someone/base or --allow_download" in refused.stderr
        agreed = ask("--allow_download")
        assert agreed.returncode == 0, agreed.stderr
        assert "srde-ds: base: someone/base, named by the adapter" in agreed.stderr
        assert fetched() > 0
        before = hub.requests.copy()
        assert ask().returncode == 0  # it is here now
        assert not [r for r in hub.requests - before if "/resolve/" in r]


# Run where the cache holds the base at revision v1 alone.
PINNED = """
import sys
import torch
from srde_ds.cli.main import main
from srde_ds.config import AdapterConfig
from srde_ds.inference.load import load_model
from srde_ds.inference.options import ModelOptions
from srde_ds.model.adapter import add_experts, load_adapter
from srde_ds.model.base import load_base
from srde_ds.weights.file import read_metadata, save_weights

weights, dense = sys.argv[1:]
base = load_base("someone/base", dtype=torch.float32, revision="v1", local_files_only=True)
model = add_experts(base, AdapterConfig(num_experts=1, top_k=1, density=0.05), expert_names=["math"], seed=0)
save_weights(weights, model.adapter_tensors(), model.metadata())
assert read_metadata(weights).model_revision == "v1"
assert load_adapter(weights).metadata() == model.metadata()
loaded, _ = load_model(ModelOptions(weights=weights, bf16=False))
assert loaded.metadata() == model.metadata()
assert main(["convert", "--weights", weights, "--to", "dense", "--output", dense]) == 0
"""


def test_the_base_is_loaded_at_the_revision_of_the_training(weights: Path, tmp_path: Path) -> None:
    repository = tmp_path / "hub/hub/models--someone--base"
    commit = "3f2a" * 10
    shutil.copytree(weights.parents[1] / "base", repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs/v1").write_text(commit)
    environment = os.environ | {"HF_HOME": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "1"}
    pinned, dense = str(tmp_path / "pinned.safetensors"), str(tmp_path / "dense")
    command = [sys.executable, "-c", PINNED, pinned, dense]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert "base: someone/base at revision v1, named by the adapter" in done.stderr
    (repository / "refs/v1").unlink()
    command = [sys.executable, "-m", "srde_ds.cli", "inference", "--weights", pinned, "--prompt", "ab"]
    refused = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=ROOT)
    assert refused.returncode == 2
    assert "base 'someone/base' at revision v1, named by the adapter, is not on this machine" in refused.stderr
    assert "from the Hub with --allow_download;" in refused.stderr
