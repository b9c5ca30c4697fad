"""The base with one expert merged, as files: the model with all tokens routed to that expert."""

from __future__ import annotations

import json
import shutil
import weakref
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, PreTrainedModel

from srde_ds.cli.main import main
from srde_ds.errors import SRDEError
from srde_ds.export.dense import write_dense
from srde_ds.export.moe import write_moe
from srde_ds.model.adapter import load_adapter
from srde_ds.model.adapter_source import open_adapter
from srde_ds.model.base import load_base
from srde_ds.model.base_files import BaseFiles
from srde_ds.model.merging import Rounding
from srde_ds.weights.tensors import LazyTensor
from tests.cli_helpers import fails
from tests.convert_helpers import BASES, NAMES, Trained, save_base, trained
from tests.helpers import randomize, tiny_srde, tokens
from tests.unit.test_adapter import FORMS

ROUNDING = 2e-6  # of the largest logit


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_base("llama", tmp_path_factory.mktemp("base"))


def merged(made: Trained, folder: Path, expert: str, *, dtype: torch.dtype | None = None) -> Path:
    return write_dense(open_adapter(made.weights), BaseFiles(made.base), folder, expert=expert, dtype=dtype)


@torch.no_grad()
def assert_is_expert(made: Trained, dense: PreTrainedModel, expert: str, ids: torch.Tensor) -> None:
    made.model.set_active_experts([expert])
    ours = made.model(ids).logits
    torch.testing.assert_close(dense(input_ids=ids).logits, ours, rtol=0, atol=ROUNDING * float(ours.abs().max()))
    made.model.set_active_experts([name for name in NAMES if name != expert])
    assert (made.model(ids).logits - ours).abs().max() > 100 * ROUNDING * ours.abs().max()


@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_experts(base: Path, form: dict[str, Any], tmp_path: Path) -> None:
    made = trained(base, tmp_path, **form)
    dense = AutoModelForCausalLM.from_pretrained(merged(made, tmp_path / "dense", "green"))
    assert_is_expert(made, dense, "green", tokens())


@pytest.mark.parametrize("name", BASES)
def test_every_family_of_bases(name: str, tmp_path: Path) -> None:
    made = trained(save_base(name, tmp_path / "base"), tmp_path)
    dense = load_base(merged(made, tmp_path / "dense", "blue"), dtype=torch.float32)
    ids = tokens(2, 24, vocabulary=100)
    ids[ids == 10] = 11  # 10 stands for an image in mistral3
    assert_is_expert(made, dense, "blue", ids)


def test_files_are_those_of_the_base(tmp_path: Path) -> None:
    base = save_base("llama with biases and wide heads", tmp_path / "base", max_shard_size="40KB")
    for name in ("tokenizer.json", "chat_template.jinja", "LICENSE"):
        (base / name).write_text("{}")
    template = Path("additional_chat_templates/tool_use.jinja")
    (base / template).parent.mkdir()
    (base / template).write_text("{{ tools }}")
    (base / "README.md").write_text("the base's own page")
    (base / "training_args.bin").write_bytes(b"pickle")
    made = trained(base, tmp_path)
    dense = merged(made, tmp_path / "dense", "red")
    kept = {path.name for path in base.iterdir()} - {"README.md", "training_args.bin"}
    assert {path.name for path in dense.iterdir()} == kept and (dense / template).read_text() == "{{ tools }}"
    assert json.loads((dense / "config.json").read_text()) == json.loads((base / "config.json").read_text())
    index, old = (json.loads((f / "model.safetensors.index.json").read_text()) for f in (dense, base))
    assert index["weight_map"] == old["weight_map"]
    assert index["metadata"]["total_size"] == old["metadata"]["total_size"]
    changed = 0
    for path in base.glob("*.safetensors"):
        before, after = load_file(path), load_file(dense / path.name)
        assert before.keys() == after.keys()
        for name, tensor in before.items():
            same = torch.equal(tensor, after[name])
            assert same is (".mlp." not in name) and tensor.dtype == after[name].dtype, name
            changed += not same
    assert changed == 2 * 3


def test_dtypes(tmp_path: Path) -> None:
    base = save_base("llama", tmp_path / "base", dtype=torch.bfloat16)
    made = trained(base, tmp_path)
    narrow, wide = (merged(made, tmp_path / str(d), "red", dtype=d) for d in (None, torch.float32))
    assert {t.dtype for t in load_file(narrow / "model.safetensors").values()} == {torch.bfloat16}
    assert {t.dtype for t in load_file(wide / "model.safetensors").values()} == {torch.float32}
    configs = [json.loads((folder / "config.json").read_text())["dtype"] for folder in (narrow, wide)]
    assert configs == ["bfloat16", "float32"]
    assert_is_expert(made, AutoModelForCausalLM.from_pretrained(wide), "red", tokens())
    for name, tensor in load_file(wide / "model.safetensors").items():
        assert torch.equal(load_file(narrow / "model.safetensors")[name], tensor.bfloat16())  # rounded once


@pytest.mark.parametrize("write", [merged, lambda made, folder, _: write_moe(
    open_adapter(made.weights), BaseFiles(made.base), folder, dtype=None)], ids=["dense", "moe"])  # fmt: skip
def test_memory_holds_few_tensors_of_the_base(
    base: Path, tmp_path: Path, write: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    made = trained(base, tmp_path)
    files, live, most = BaseFiles(base), 0, 0
    sizes = {name: files.tensor(name).load().nbytes for name in files.files}
    original = BaseFiles.tensor

    def freed(size: int) -> None:
        nonlocal live
        live -= size

    def counted(self: BaseFiles, name: str) -> LazyTensor:
        tensor = original(self, name)

        def load() -> torch.Tensor:
            nonlocal live, most
            loaded = tensor.load().clone()
            live += loaded.nbytes
            most = max(most, live)
            weakref.finalize(loaded, freed, loaded.nbytes)
            return loaded

        return LazyTensor(tensor.dtype, tensor.shape, load)

    monkeypatch.setattr(BaseFiles, "identity", lambda self: made.model.base_identity)
    monkeypatch.setattr(BaseFiles, "roles", BaseFiles(base).roles)
    monkeypatch.setattr(BaseFiles, "tensor", counted)
    write(made, tmp_path / "out", "red")
    assert 0 < most <= 2 * max(sizes.values()) < sum(sizes.values()) / 4


def test_an_existing_folder_is_left_alone(base: Path, tmp_path: Path) -> None:
    made = trained(base, tmp_path)
    (tmp_path / "dense").mkdir()
    with pytest.raises(SRDEError, match=r"output=.*dense: already exists"):
        merged(made, tmp_path / "dense", "red")
    assert list((tmp_path / "dense").iterdir()) == []


@pytest.mark.parametrize("moment", ["config.json", "model.safetensors"])
def test_a_failure_leaves_nothing(base: Path, moment: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = trained(base, tmp_path)
    before = sorted(tmp_path.iterdir())
    if moment == "config.json":
        monkeypatch.setattr(Path, "write_text", lambda *_, **__: (_ for _ in ()).throw(OSError(28, "No space left")))
    else:
        monkeypatch.setattr("os.fsync", lambda _: (_ for _ in ()).throw(OSError(5, "Input/output error")))
    with pytest.raises(SRDEError, match="output=.*cannot be written: (No space left|Input/output error)"):
        merged(made, tmp_path / "dense", "red")
    assert sorted(tmp_path.iterdir()) == before


def test_what_a_kill_left_is_cleared(base: Path, tmp_path: Path) -> None:
    made = trained(base, tmp_path)
    (tmp_path / "dense.tmp").mkdir()
    (tmp_path / "dense.tmp" / "model.safetensors").write_bytes(b"half")
    merged(made, tmp_path / "dense", "red")
    assert not (tmp_path / "dense.tmp").exists() and (tmp_path / "dense" / "config.json").exists()


def test_a_full_disk_is_seen_before_writing(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = trained(base, tmp_path)
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(100, 90, 10))
    with pytest.raises(SRDEError, match=r"output=.*GiB are needed, the disk has 0\.0 GiB left"):
        merged(made, tmp_path / "dense", "red")
    assert not (tmp_path / "dense").exists()


def test_another_base_is_refused(base: Path, tmp_path: Path) -> None:
    made = trained(base, tmp_path)
    other = load_base(base, dtype=torch.float32)
    with torch.no_grad():
        other.model.layers[1].mlp.up_proj.weight[0, 0] += 1
    other.save_pretrained(tmp_path / "other")
    with pytest.raises(SRDEError, match=r"trained on .*LlamaForCausalLM.*but the base given is .*other"):
        merged(made._replace(base=tmp_path / "other"), tmp_path / "dense", "red")


def test_bases_that_cannot_be_read(base: Path, tmp_path: Path) -> None:
    shutil.copytree(base, tmp_path / "a")
    (tmp_path / "a/model.safetensors").unlink()
    with pytest.raises(SRDEError, match="holds neither model.safetensors nor"):
        BaseFiles(tmp_path / "a")
    (tmp_path / "a/model.safetensors").write_bytes(b"no tensors")
    with pytest.raises(SRDEError, match="'model.safetensors' cannot be read"):
        BaseFiles(tmp_path / "a")
    config = json.loads((base / "config.json").read_text())
    shutil.copyfile(base / "model.safetensors", tmp_path / "a/model.safetensors")
    (tmp_path / "a/config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "fp8"}}))
    with pytest.raises(SRDEError, match="its weights are quantised; give the unquantised checkpoint"):
        BaseFiles(tmp_path / "a")
    (tmp_path / "a/config.json").write_text(json.dumps(config | {"num_hidden_layers": 3}))
    with pytest.raises(SRDEError, match=r"its files lack model\.layers\.2\."):
        BaseFiles(tmp_path / "a")
    (tmp_path / "a/config.json").write_text(json.dumps(config | {"vocab_size": 100}))
    with pytest.raises(
        SRDEError, match=r"embed_tokens\.weight has shape \[101, 32\], its configuration says \[100, 32\]"
    ):
        BaseFiles(tmp_path / "a").check_shapes()
    with pytest.raises(SRDEError, match="model_name='.*nowhere': cannot load the model"):
        BaseFiles(tmp_path / "nowhere")


@pytest.mark.parametrize("name", ["llama", "mistral3"])
def test_identity_of_files_is_that_of_the_loaded_model(name: str, tmp_path: Path) -> None:
    from srde_ds.model.base import base_identity

    folder = save_base(name, tmp_path, dtype=torch.bfloat16)
    assert BaseFiles(folder).identity() == base_identity(load_base(folder, dtype=torch.float32))


def test_what_rounding_loses_is_said(base: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    before = torch.tensor([[1.0, 1.0, 2.0, 0.0]]).bfloat16()
    change = torch.tensor([[1e-4, 0.5, 0.0, 1e-4]])
    lost = Rounding()
    lost.add(before, (before.float() + change).bfloat16(), change)
    assert lost.changed == 3 and lost.unchanged_share == pytest.approx(1 / 3)
    assert lost.relative_error == pytest.approx(1e-4 / change.norm().item(), rel=0.01)
    made = trained(base, tmp_path)
    with caplog.at_level("INFO"):
        merged(made, tmp_path / "float32", "green", dtype=torch.float32)
    assert "rounding" not in caplog.text
    with caplog.at_level("INFO"):
        merged(made, tmp_path / "bfloat16", "green", dtype=torch.bfloat16)
    assert "rounding: the merged changes have a relative error of" in caplog.text
    assert "of the weights to change stay the same; --dtype float32 keeps them exactly" in caplog.text


def test_every_way_to_merge_says_what_rounding_loses(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    made = trained(save_base("llama", tmp_path / "base", dtype=torch.bfloat16), tmp_path)
    source, files = open_adapter(made.weights), BaseFiles(made.base)
    ways: list[tuple[Callable[[], object], str]] = [
        (lambda: merged(made, tmp_path / "dense", "green"), "--dtype float32"),
        (lambda: write_moe(source, files, tmp_path / "moe", dtype=None), "--dtype float32"),
        (lambda: load_adapter(made.weights, dtype=torch.bfloat16).merge_and_unload("green"), "a base in float32"),
    ]
    said = []
    for way, remedy in ways:
        caplog.clear()
        with caplog.at_level("INFO"):
            way()
        said += [record.getMessage() for record in caplog.records if "rounding" in record.getMessage()]
        assert said[-1].endswith(f"of the weights to change stay the same; {remedy} keeps them exactly")
    assert len(said) == 3
    caplog.clear()
    load_adapter(made.weights, dtype=torch.float32).merge_and_unload("green")
    assert "rounding" not in caplog.text


def test_a_base_that_has_moved_is_asked_for(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(base, tmp_path / "base")
    made = trained(tmp_path / "base", tmp_path)
    (tmp_path / "base").rename(tmp_path / "elsewhere")
    output = ["--to", "dense", "--expert", "green", "--output", str(tmp_path / "dense")]
    told = f"base '{tmp_path}/base', named by the adapter, is not on this machine"
    fails(capsys, ["convert", str(made.weights), *output], told, "--base")
    with pytest.raises(SRDEError, match=f"{told}.*--base"):
        load_adapter(made.weights)
    assert main(["convert", str(made.weights), *output, "--base", str(tmp_path / "elsewhere")]) == 0
    capsys.readouterr()


@torch.no_grad()
def test_an_expert_that_gets_no_token_on_several_threads() -> None:
    """A switched off one is chosen with a weight of zero; on no tokens, threads of embedding_bag fail."""
    model = randomize(tiny_srde(granularity="element")).eval()
    model.set_active_experts(["expert1"])
    expected, threads = model.train()(tokens()).logits, torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        found = model.eval()(tokens()).logits
    finally:
        torch.set_num_threads(threads)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
