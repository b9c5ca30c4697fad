"""Which weights a file, a folder or an id means, for every verb and for Python."""

from __future__ import annotations

from pathlib import Path

import pytest

from srde_ds.errors import SRDEError
from srde_ds.export.weights import weights_file
from srde_ds.model.adapter import load_adapter
from srde_ds.weights.file import read_metadata, save_weights
from srde_ds.weights.locate import WEIGHTS, WeightsLocation, locate_weights, run_folder
from tests.helpers import randomize, tiny_llama, tiny_srde
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
    assert locate_weights(file).file() == file


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
    with pytest.raises(SRDEError, match=f"there is no {WEIGHTS} of a finished run.*srde-ds convert --checkpoint"):
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


def test_a_checkpoint_is_converted_for_as_long_as_it_is_needed(tmp_path: Path) -> None:
    model = randomize(tiny_srde())
    folder = save_model(model, tmp_path)
    for place in (folder, tmp_path):
        with weights_file(place) as path:
            assert read_metadata(path) == model.metadata() and path.parent not in (folder, tmp_path)
        assert not path.exists()
    save_weights(tmp_path / "file", model.adapter_tensors(), model.metadata())
    with weights_file(tmp_path / "file") as path:
        assert path == tmp_path / "file"
    assert path.exists()
    (tmp_path / "latest").write_text("checkpoint-9")
    message = r"weights=.*'checkpoint-9', but there is no folder.*give it as --weights"
    with pytest.raises(SRDEError, match=message), weights_file(tmp_path):
        pass


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
