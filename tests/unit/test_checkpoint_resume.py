"""A checkpoint is found, or refused by name: missing, damaged, or made by somebody who means harm."""

from __future__ import annotations

import errno
import json
import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from srde_ds.checkpoint import resume
from srde_ds.checkpoint.layout import content_hash
from srde_ds.checkpoint.resume import (
    find_checkpoint,
    load_common_tensors,
    verify_checkpoint,
)
from srde_ds.checkpoint.shards import ShardIndex
from srde_ds.checkpoint.tensor_slice import TensorSlice
from srde_ds.errors import SRDEError
from srde_ds.utils.files import file_hash
from tests.checkpoint_helpers import save, save_on_ranks

# --- finding ---------------------------------------------------------------------------------------------------------


def test_the_ways_to_name_a_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = tmp_path / "run"
    save(run, 1)
    save(run, 2)
    assert find_checkpoint("latest", run) == run / "checkpoint-2"
    assert find_checkpoint(run, "elsewhere") == run / "checkpoint-2"
    assert find_checkpoint(run / "checkpoint-1", run) == run / "checkpoint-1"
    monkeypatch.chdir(run)
    assert find_checkpoint(".", run) == run / "checkpoint-2"
    assert find_checkpoint("checkpoint-1", run) == run / "checkpoint-1"
    (run / "checkpoint-1").rename(tmp_path / "kept")
    assert find_checkpoint(tmp_path / "kept", run) == tmp_path / "kept"


def test_a_damaged_checkpoint_is_named_and_the_newest_good_one_offered(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        save(tmp_path, step)
    for step in (2, 3):
        (tmp_path / f"checkpoint-{step}" / "run.json").write_text("{}")
    for asked in ("latest", tmp_path, tmp_path / "checkpoint-3"):
        with pytest.raises(
            SRDEError, match=r"checkpoint-3' is damaged: 'run.json'.*newest good .*checkpoint-1'"
        ) as caught:
            find_checkpoint(asked, tmp_path)
        assert "\n" not in str(caught.value)


def test_latest_that_names_nothing_offers_the_newest_good_one(tmp_path: Path) -> None:
    save(tmp_path, 1)
    save(tmp_path, 2)
    (tmp_path / "checkpoint-2").rename(tmp_path / "gone")
    with pytest.raises(SRDEError, match=r"latest' names 'checkpoint-2', but there is no .*newest good .*checkpoint-1'"):
        find_checkpoint("latest", tmp_path)
    for content in ("../../etc", "/etc", "", "checkpoint-1/../checkpoint-1", "x" * 10**6):
        (tmp_path / "latest").write_text(content)
        with pytest.raises(SRDEError, match=r"does not name a checkpoint in .*newest good .*checkpoint-1'") as caught:
            find_checkpoint("latest", tmp_path)
        assert len(str(caught.value)) < 600
    (tmp_path / "latest").unlink()
    with pytest.raises(SRDEError, match=r"there is no file .*latest'.*newest good .*checkpoint-1'"):
        find_checkpoint("latest", tmp_path)


def test_nothing_to_resume_is_an_error_never_a_fresh_start(tmp_path: Path) -> None:
    for asked in ("latest", tmp_path / "absent", tmp_path / "checkpoint-5"):
        with pytest.raises(SRDEError, match="no good checkpoint in"):
            find_checkpoint(asked, tmp_path / "run")
    save(tmp_path, 1)
    (tmp_path / "checkpoint-2.tmp").mkdir()
    with pytest.raises(SRDEError, match=r"checkpoint-2.tmp' is a half-written.*newest good .*checkpoint-1'"):
        find_checkpoint(tmp_path / "checkpoint-2.tmp", tmp_path)
    (tmp_path / "checkpoint-3").mkdir()
    with pytest.raises(SRDEError, match=r"checkpoint-3' is damaged or half-written: it has no manifest.json"):
        find_checkpoint(tmp_path / "checkpoint-3", tmp_path)


# --- damage and malice -----------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_on_ranks(tmp_path, 4, 2)
    return tmp_path / "checkpoint-4"


def test_every_bit_flip_truncation_and_loss_names_the_file(folder: Path) -> None:
    draw = random.Random(0)
    for path in list(folder.iterdir()):
        content = path.read_bytes()
        places = {0, len(content) - 1, *(draw.randrange(len(content)) for _ in range(12))}
        damages = [content[:-1], b"", content + b"\0", None]
        for place in places:
            flipped = bytearray(content)
            flipped[place] ^= 1 << draw.randrange(8)
            damages.append(bytes(flipped))
        for damage in damages:
            path.unlink()
            if damage is not None:
                path.write_bytes(damage)
            with pytest.raises(SRDEError) as caught:
                verify_checkpoint(folder)
            assert path.name in str(caught.value) and "\n" not in str(caught.value)
            path.write_bytes(content)
    assert verify_checkpoint(folder)["step"] == 4


def forge(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """A manifest by an attacker who can hash as well as we can."""
    path = folder / "manifest.json"
    manifest = json.loads(path.read_text())
    change(manifest)
    manifest["sha256"] = content_hash({key: value for key, value in manifest.items() if key != "sha256"})
    path.write_text(json.dumps(manifest))


def rename_entry(new: str) -> Callable[[dict[str, Any]], None]:
    def change(manifest: dict[str, Any]) -> None:
        manifest["files"][new] = manifest["files"].pop("run.json")

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (rename_entry("../run.json"), "foreign file"),
        (rename_entry("/etc/passwd"), "foreign file"),
        (rename_entry("sub/../run.json"), "foreign file"),
        (rename_entry("run.json\0"), "foreign file"),
        (rename_entry("shard-00002.safetensors"), "foreign file"),
        (lambda m: m["files"]["run.json"].update(bytes=10**30), "'run.json' has"),
        (lambda m: m["files"]["run.json"].update(bytes=-1), "'run.json' has"),
        (lambda m: m["files"]["run.json"].update(bytes="1"), "lacks the size or sha256 of 'run.json'"),
        (lambda m: m["files"].update({"run.json": None}), "lacks the size or sha256 of 'run.json'"),
        (lambda m: m.update(world_size=10**18), "files of its world_size"),
        (lambda m: m.update(world_size=True), "files of its world_size"),
        (lambda m: m.update(files=[]), "files of its world_size"),
        (lambda m: m.update(step="4"), "own sha256"),
        (lambda m: m.update(format_version=2), "format_version 2"),
        (lambda m: m.update(format="other"), "not a checkpoint of srde_ds"),
    ],
)
def test_forged_manifests_are_refused(folder: Path, change: Callable[[dict[str, Any]], None], message: str) -> None:
    forge(folder, change)
    with pytest.raises(SRDEError, match=message):
        verify_checkpoint(folder)


@pytest.mark.parametrize("name", ["manifest.json", "run.json", "shard-00001.safetensors"])
def test_links_pipes_and_folders_in_place_of_files_are_refused(folder: Path, name: str) -> None:
    path, elsewhere = folder / name, folder.parent / "elsewhere"
    path.rename(elsewhere)
    for make in (lambda: path.symlink_to(elsewhere), lambda: os.mkfifo(path), path.mkdir):
        make()
        with pytest.raises(SRDEError, match=f"'{name}' is not a plain file"):
            verify_checkpoint(folder)
        path.rmdir() if path.is_dir() else path.unlink()


def test_a_smuggled_shard_is_refused(folder: Path) -> None:
    (folder / "shard-00002.safetensors").write_bytes(b"")
    with pytest.raises(SRDEError, match="'shard-00002.safetensors' is not in its manifest"):
        verify_checkpoint(folder)


@pytest.mark.parametrize("content", [b"", b"[]", b"{", b"[" * 100_000, b"\xff\xfe", b"1" * 5000, b'{"format": NaN}'])
def test_a_manifest_of_rubbish_is_refused(folder: Path, content: bytes) -> None:
    (folder / "manifest.json").write_bytes(content)
    with pytest.raises(SRDEError, match="manifest.json"):
        verify_checkpoint(folder)


def test_a_gigantic_manifest_is_refused_unread(folder: Path) -> None:
    os.truncate(folder / "manifest.json", 2**40)  # sparse
    with pytest.raises(SRDEError, match="manifest.json' is damaged: more than"):
        verify_checkpoint(folder)


def test_garbage_common_tensors_are_refused(folder: Path) -> None:
    (folder / "common.safetensors").write_bytes(b"garbage" * 9)
    with pytest.raises(SRDEError, match=r"common.safetensors': cannot be read as safetensors"):
        load_common_tensors(folder)


def test_a_disk_that_cannot_read_counts_as_damage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path, 1)
    save(tmp_path, 2)

    def hash_on_a_dying_disk(path: Path) -> str:
        if "checkpoint-2" in str(path):
            raise OSError(errno.EIO, os.strerror(errno.EIO), str(path))
        return file_hash(path)

    monkeypatch.setattr(resume, "file_hash", hash_on_a_dying_disk)
    with pytest.raises(SRDEError, match=r"cannot be read: Input/output error .*newest good .*checkpoint-1'"):
        find_checkpoint("latest", tmp_path)


def test_a_piece_of_another_model_is_refused_on_reading(folder: Path) -> None:
    with pytest.raises(SRDEError, match=r"'layers.9.router.weight' \(master\) is not in it"):
        ShardIndex(folder).read([TensorSlice("layers.9.router.weight", "master", (2, 7), 0, torch.zeros(3))])
