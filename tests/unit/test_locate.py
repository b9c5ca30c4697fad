"""Which weights a file, a folder or an id means, for every verb and for Python."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from srde_ds.errors import SRDEError
from srde_ds.export.weights import export_weights, write_peft
from srde_ds.model.adapter import SRDEModel, load_adapter
from srde_ds.model.adapter_source import open_adapter
from srde_ds.weights.locate import WEIGHTS, WeightsLocation, locate_weights, run_folder
from tests.helpers import randomize, tiny_llama, tiny_srde, tokens
from tests.unit.test_checkpoint_convert import save_model


def make_run(folder: Path) -> Path:
    for name in ("config.yaml", "metrics.jsonl", WEIGHTS):
        (folder / name).touch()
    return folder


def test_files_and_folders_with_weights(tmp_path: Path) -> None:
    file = tmp_path / WEIGHTS
    file.touch()
    for place in (file, tmp_path, str(tmp_path)):
        assert locate_weights(place) == WeightsLocation("file", file, None, None)
    make_run(tmp_path)
    for place in (file, tmp_path):
        assert locate_weights(place) == WeightsLocation("file", file, tmp_path, None)
        assert run_folder(place) == tmp_path


def test_weights_older_than_the_latest_checkpoint_are_not_taken(tmp_path: Path) -> None:
    make_run(tmp_path)
    (tmp_path / "latest").write_text("checkpoint-9\n")
    training = WeightsLocation("checkpoint", tmp_path, tmp_path, 9)
    finished = WeightsLocation("file", tmp_path / WEIGHTS, tmp_path, None)
    assert locate_weights(tmp_path) == training
    for marker, expected in [
        ('{"checkpoint": "checkpoint-9"}', finished),
        ("{}", finished),  # of an earlier version
        ('{"checkpoint": "checkpoint-6"}', training),
    ]:
        (tmp_path / "completed.json").write_text(marker)
        assert locate_weights(tmp_path) == expected
    (tmp_path / "completed.json").write_text("[" * 100_000)
    with pytest.raises(SRDEError, match=r"completed.json' is damaged"):
        locate_weights(tmp_path)
    (tmp_path / WEIGHTS).unlink()
    assert locate_weights(tmp_path) == training
    with pytest.raises(
        SRDEError, match=r"weights=.*'checkpoint-9', but there is no folder.*no good checkpoint.*train first"
    ):
        load_adapter(tmp_path, base=tiny_llama())


def test_a_checkpoint_is_known_by_its_name_or_its_manifest(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoint-30"
    assert locate_weights(folder) == WeightsLocation("checkpoint", folder, None, 30)  # which says what there is instead
    folder.mkdir()
    assert locate_weights(folder).step == 30 and run_folder(folder) == tmp_path
    assert locate_weights(tmp_path) == WeightsLocation("checkpoint", tmp_path, None, None)  # `latest` is missing
    renamed = tmp_path / "mine"
    renamed.mkdir()
    (renamed / "manifest.json").touch()
    assert locate_weights(renamed) == WeightsLocation("checkpoint", renamed, None, None)


@pytest.mark.parametrize("kind", ["checkpoint", "unfinished run", "finished run", "file", "PEFT folder", "Hub"])
def test_python_takes_every_kind_of_weights(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, revision = randomize(tiny_srde()), None
    checkpoint = save_model(model, make_run(tmp_path))  # whose weights file is empty until the run is finished
    place, run = tmp_path, tmp_path
    if kind == "checkpoint":
        place = checkpoint
    elif kind == "PEFT folder":
        place = run = write_peft(open_adapter(checkpoint), tmp_path / "peft", dtype=None)
    elif kind != "unfinished run":
        export_weights(checkpoint, tmp_path / WEIGHTS)
        (tmp_path / "completed.json").write_text("{}")
    if kind == "file":
        place = tmp_path / WEIGHTS
    elif kind == "Hub":
        place, revision = Path("somebody/something"), "v2"
        found = {("somebody/something", WEIGHTS, revision): str(tmp_path / WEIGHTS)}
        monkeypatch.setattr("huggingface_hub.hf_hub_download", lambda *name, revision: found[*name, revision])
    expected, before = model(tokens()).logits, sorted(tmp_path.rglob("*"))
    for loaded in (
        load_adapter(place, base=tiny_llama(), revision=revision),
        SRDEModel.from_pretrained(tiny_llama(), place, revision=revision),
        load_adapter(open_adapter(place, revision=revision), base=tiny_llama()),
    ):
        assert torch.equal(loaded(tokens()).logits, expected)
        assert loaded.run_folder == (run if kind not in ("PEFT folder", "Hub") else None)
    assert sorted(tmp_path.rglob("*")) == before  # nothing is converted on the disk


def test_weights_without_a_checkpoint_are_named(tmp_path: Path) -> None:
    save_model(randomize(tiny_srde()), tmp_path)
    (tmp_path / "latest").write_text("checkpoint-9")
    with pytest.raises(SRDEError, match=r"weights=.*'checkpoint-9', but there is no folder.*give it as --weights"):
        SRDEModel.from_pretrained(tiny_llama(), tmp_path)


@pytest.mark.parametrize(
    ("place", "message"),
    [
        ("", "the folder holds neither srde_weights.safetensors nor a checkpoint"),
        ("nothing", "no such file or folder, nor can the Hub provide it"),
        ("n" * 300, "File name too long"),
        ("a\0b", "no such file or folder"),
    ],
)
def test_what_names_no_weights(place: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(SRDEError, match=message) as error:
        locate_weights(tmp_path / place)
    assert "\n" not in str(error.value)


def test_an_empty_name_does_not_mean_the_current_folder() -> None:
    with pytest.raises(SRDEError, match="weights '': an empty name. Give a run"):
        SRDEModel.from_pretrained(tiny_llama(), "")
