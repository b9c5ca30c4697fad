"""`srde-ds convert`: what each --to writes, and what is refused."""

from __future__ import annotations

import json
import shutil
from collections import namedtuple
from pathlib import Path
from shutil import copyfile

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from srde_ds.cli.main import main
from srde_ds.data.manifest import TEMPLATE, VOCABULARY, tokenizer_identity
from srde_ds.model.adapter import load_adapter
from srde_ds.weights.file import read_metadata, save_weights
from srde_ds.weights.locate import WEIGHTS
from tests.cli_helpers import fails
from tests.cli_helpers import save_base as save_base_with_tokenizer
from tests.convert_helpers import Trained, save_base, trained
from tests.data_helpers import CHATML, tiny_tokenizer
from tests.helpers import tiny_srde, tokens
from tests.unit.test_checkpoint_convert import save_model

CONVERTER = """
import argparse, json, pathlib, sys
parser = argparse.ArgumentParser()
parser.add_argument("model"), parser.add_argument("--outfile"), parser.add_argument("--outtype")
options = parser.parse_args()
folder = pathlib.Path(options.model)
config = json.loads((folder / "config.json").read_text())
assert (folder / "model.safetensors").is_file()
pathlib.Path(options.outfile).write_text(f"GGUF {config['architectures'][0]} {options.outtype}")
"""


@pytest.fixture
def made(tmp_path: Path) -> Trained:
    return trained(save_base("llama", tmp_path / "base"), tmp_path / "run")


def convert(made: Trained, *options: str) -> list[str]:
    return ["convert", "--checkpoint", str(made.weights.parent), *options]


def test_gguf_needs_room_for_the_mixture_as_well(
    made: Trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "converter.py").write_text("raise SystemExit('not reached')")
    assert main(convert(made, "--to", "moe", "--output", str(tmp_path / "moe"))) == 0
    size = sum(path.stat().st_size for path in (tmp_path / "moe").glob("*.safetensors"))
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(9 * size, 0, int(1.9 * size)))
    options = ["--to", "gguf", "--gguf_converter", str(tmp_path / "converter.py"), "--output", str(tmp_path / "m.gguf")]
    fails(capsys, convert(made, *options), "output=", "GiB are needed")


@torch.no_grad()
def test_every_kind(made: Trained, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    expected = made.model(tokens()).logits
    script = tmp_path / "converter.py"
    script.write_text(CONVERTER)
    weights, dense, moe, gguf = (str(tmp_path / name) for name in ("some.safetensors", "dense", "moe", "m.gguf"))
    assert main(convert(made, "--output_file", weights, "--dtype", "bfloat16", "--experts", "green,red")) == 0
    assert main(convert(made, "--to", "dense", "--expert", "red", "--output", dense, "--dtype", "float32")) == 0
    assert main(convert(made, "--to", "moe", "--output", moe)) == 0
    assert main(convert(made, "--to", "gguf", "--output", gguf, "--gguf_converter", str(script))) == 0
    assert capsys.readouterr().out.splitlines() == [weights, dense, moe, gguf]
    assert read_metadata(weights).expert_names == ["green", "red"]
    assert load_file(weights)["layers.0.deltas.free"].dtype == torch.bfloat16
    stock = AutoModelForCausalLM.from_pretrained(moe)
    torch.testing.assert_close(stock(tokens()).logits, expected, rtol=1e-5, atol=1e-4)
    made.model.set_active_experts(["red"])
    merged = AutoModelForCausalLM.from_pretrained(dense)
    torch.testing.assert_close(merged(tokens()).logits, made.model(tokens()).logits, rtol=1e-5, atol=1e-4)
    assert Path(gguf).read_text() == "GGUF GraniteMoeSharedForCausalLM f32"
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(
        ["base", "run", "converter.py", "some.safetensors", "dense", "moe", "m.gguf"]
    )


def test_names_that_are_not_given(
    made: Trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    made.base.rename(tmp_path / "moved")
    fails(capsys, convert(made, "--to", "moe"), "named by the adapter, is not on this machine", "--base")
    assert main(convert(made)) == 0
    assert main(convert(made, "--to", "moe", "--base", "moved", "--experts", "blue")) == 0
    assert capsys.readouterr().out.splitlines() == [WEIGHTS, "moe"]
    assert AutoModelForCausalLM.from_pretrained("moe").config.num_local_experts == 1


def test_a_checkpoint_will_do(made: Trained, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = save_model(made.model, tmp_path / "training")
    assert main(["convert", "--checkpoint", str(folder), "--to", "moe", "--output", str(tmp_path / "moe")]) == 0
    assert main(["convert", "--checkpoint", str(tmp_path / "training"), "--output", str(tmp_path / "weights")]) == 0
    assert torch.equal(load_adapter(tmp_path / "weights", base=made.base)(tokens()).logits, made.model(tokens()).logits)
    run = tmp_path / "training"
    copyfile(made.weights, run / WEIGHTS)
    for checkpoint, source in (
        ("checkpoint-0", folder),
        (folder.name, run / WEIGHTS),
    ):  # of an earlier, of the last step
        (run / "completed.json").write_text(json.dumps({"checkpoint": checkpoint}))
        capsys.readouterr()
        assert main(["convert", "--checkpoint", str(run), "--output", str(tmp_path / "again")]) == 0
        assert capsys.readouterr().err.splitlines()[0] == f"Made from {source}"
        assert (tmp_path / "again").read_bytes() == (tmp_path / "weights").read_bytes()


@pytest.mark.parametrize(
    ("options", "fragments"),
    [
        (["--to", "dense"], ["to=dense merges one expert", "red, green, blue"]),
        (["--to", "dense", "--expert", "gren"], ["expert 'gren'", "Did you mean 'green'?"]),
        (["--to", "dense", "--experts", "red"], ["experts has no effect with to=dense", "--experts"]),
        (["--to", "moe", "--expert", "red"], ["expert has no effect with to=moe"]),
        (["--base", "x"], ["base has no effect with to=weights"]),
        (["--to", "moe", "--gguf_converter", "x"], ["gguf_converter has no effect with to=moe"]),
        (["--experts", "red,red"], ["experts=red,red: give each expert once"]),
        (["--to", "gguf"], ["gguf_converter=convert_hf_to_gguf.py: no such file", "llama.cpp"]),
        (["--to", "dance"], ["to='dance'", "dense"]),
        (["--dtype", "fp16"], ["dtype='fp16'", "float32"]),
    ],
)
def test_what_makes_no_sense_is_refused_before_anything_is_written(
    made: Trained, options: list[str], fragments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fails(capsys, convert(made, *options, "--output", str(tmp_path / "out")), *fragments)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["base", "run"]


@pytest.mark.parametrize(
    ("script", "message"),
    [("import sys; print('text'); sys.exit('no such architecture')", "no such architecture"), ("", "it wrote nothing")],
)
def test_a_converter_that_fails_leaves_nothing(
    made: Trained, script: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "converter.py").write_text(script)
    options = ["--to", "gguf", "--gguf_converter", str(tmp_path / "converter.py"), "--output", str(tmp_path / "m.gguf")]
    fails(capsys, convert(made, *options), "gguf_converter=", "it failed:", message)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["base", "converter.py", "run"]


def test_heads_that_the_converter_ignores_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made = trained(save_base("llama with biases and wide heads", tmp_path / "base"), tmp_path / "run")
    (tmp_path / "converter.py").write_text(CONVERTER)
    options = ["--to", "gguf", "--gguf_converter", str(tmp_path / "converter.py"), "--output", str(tmp_path / "m.gguf")]
    fails(capsys, convert(made, *options), "heads have 16 dimensions", "converter ignores head_dim", "--to dense")
    assert not (tmp_path / "m.gguf").exists()


def test_a_base_with_another_tokenizer_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    """Merged with other tokens the result would speak nonsense; weights from before say nothing and pass."""
    base = save_base_with_tokenizer(tmp_path / "base")
    made = trained(base, tmp_path / "old")
    identity = tokenizer_identity(tiny_tokenizer())
    made.model.origins.history = [{"verb": "train", **{key: identity[key] for key in (VOCABULARY, TEMPLATE)}}]
    weights = tmp_path / "new.safetensors"
    save_weights(weights, made.model.adapter_tensors(), made.model.metadata())
    others = tiny_tokenizer()
    others.add_tokens(["<another>"])
    to_dense = ["--to", "dense", "--expert", "red", "--base", str(base), "--output"]
    assert main(["convert", str(weights), *to_dense, str(tmp_path / "same")]) == 0
    assert "another chat template" not in caplog.text
    changed = tiny_tokenizer(CHATML.replace("Be brief.", "Be long."))
    changed.save_pretrained(base)
    assert main(["convert", str(weights), *to_dense, str(tmp_path / "changed")]) == 0
    assert f"weights '{weights}': they were trained with another chat template than that of '{base}'" in caplog.text
    others.save_pretrained(base)
    assert main(["convert", str(made.weights), *to_dense, str(tmp_path / "unknown")]) == 0
    told = f"weights '{weights}': they were trained with another tokenizer than that of '{base}'"
    fails(capsys, ["convert", str(weights), *to_dense, str(tmp_path / "other")], told, "--base")
    fails(capsys, ["inference", str(weights), "--base", str(base), "--prompt", "what is 1"], told)
    assert not (tmp_path / "other").exists()


def test_weights_that_name_no_base_ask_for_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, weights = tiny_srde(), tmp_path / "of_no_base.safetensors"
    save_weights(weights, model.adapter_tensors(), model.metadata())
    fails(
        capsys,
        ["inference", str(weights), "--prompt", "1"],
        f"weights '{weights}': they do not name their base",
        "--base",
    )
