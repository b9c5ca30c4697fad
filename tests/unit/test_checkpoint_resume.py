"""The folder protocol: complete or absent, whatever dies, fills up or lies."""

from __future__ import annotations

import errno
import json
import math
import multiprocessing
import os
import random
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from srde_ds.checkpoint import resume
from srde_ds.checkpoint.resume import (
    find_checkpoint,
    load_common_tensors,
    load_rank_state,
    load_run_state,
    save_checkpoint,
    verify_checkpoint,
)
from srde_ds.checkpoint.shards import TensorPiece, read_pieces
from srde_ds.errors import SRDEError
from tests.unit.test_checkpoint_shards import blank, cut, make_tensors

SUPPORT = {"layers.0.support": torch.arange(3, dtype=torch.int32)}


def save(
    run: Path, step: int, *, agree: Callable[[bool], bool] = bool, rank: int = 0, world_size: int = 1, **given: Any
) -> Path:
    """One rank's save of tensors whose values tell the step."""
    pieces = cut(make_tensors(float(step)), world_size)[rank]
    arguments: dict[str, Any] = {
        "pieces": pieces,
        "rank_state": {"rng": [step, rank]},
        "run_state": {"tokens": step},
        "common_tensors": SUPPORT,
        "keep": 9,
    }
    return save_checkpoint(run, step, rank=rank, world_size=world_size, agree=agree, **(arguments | given))


def save_on_ranks(
    run: Path, step: int, world_size: int, per_rank: dict[int, dict[str, Any]] | None = None
) -> list[Any]:
    """All ranks as threads with a real all-reduce; each one's folder or exception. A hang breaks the barrier."""
    barrier = threading.Barrier(world_size, timeout=20)
    votes = [True] * world_size
    results: list[Any] = [None] * world_size

    def work(rank: int) -> None:
        def agree(done: bool) -> bool:
            votes[rank] = done
            barrier.wait()
            everyone = all(votes)
            barrier.wait()
            return everyone

        try:
            results[rank] = save(
                run, step, agree=agree, rank=rank, world_size=world_size, **(per_rank or {}).get(rank, {})
            )
        except Exception as error:
            results[rank] = error

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(world_size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


def value_of(folder: Path) -> float:
    """The step that the tensors in a checkpoint tell; every element must say the same."""
    wanted = blank(cut(make_tensors(), 1)[0])
    read_pieces(folder, wanted)
    shifts = [
        found.data - piece.data
        for found, piece in zip(wanted, cut(make_tensors(), 1)[0], strict=True)
        if len(found.data)
    ]
    flat = torch.cat(shifts)
    step = round(flat.mean().item())
    assert torch.allclose(flat, torch.full_like(flat, step), atol=1e-3)
    return step


def names(run: Path) -> list[str]:
    return sorted(path.name for path in run.iterdir())


def test_every_rank_gets_back_what_it_saved(tmp_path: Path) -> None:
    results = save_on_ranks(tmp_path, 7, 3)
    folder = tmp_path / "checkpoint-7"
    assert results == [folder] * 3
    assert (tmp_path / "latest").read_text() == "checkpoint-7\n"
    manifest = verify_checkpoint(find_checkpoint("latest", tmp_path))
    assert (manifest["step"], manifest["world_size"], manifest["format_version"]) == (7, 3, 1)
    assert sorted([*manifest["files"], "manifest.json"]) == names(folder)
    assert {path.suffix for path in folder.iterdir()} == {".json", ".safetensors"}
    assert value_of(folder) == 7
    assert load_run_state(folder) == {"tokens": 7}
    assert [load_rank_state(folder, rank) for rank in range(3)] == [{"rng": [7, rank]} for rank in range(3)]
    assert torch.equal(load_common_tensors(folder)["layers.0.support"], SUPPORT["layers.0.support"])
    with pytest.raises(SRDEError, match="no state of rank 3"):
        load_rank_state(folder, 3)


def test_retention_keeps_the_last_saved_and_ignores_what_it_cannot_read(tmp_path: Path) -> None:
    (tmp_path / "checkpoint-notes").mkdir()
    (tmp_path / "checkpoint-1").mkdir()  # no manifest: not ours to delete
    for step in (2, 3, 4):
        save(tmp_path, step, keep=2)
    assert names(tmp_path) == ["checkpoint-1", "checkpoint-3", "checkpoint-4", "checkpoint-notes", "latest"]
    # A run that went back to step 3 and saves step 5 and 3 again: saving order counts, not the number.
    save(tmp_path, 3, keep=2)
    assert "checkpoint-4" in names(tmp_path) and "checkpoint-3" in names(tmp_path)
    save(tmp_path, 5, keep=1)
    assert names(tmp_path) == ["checkpoint-1", "checkpoint-5", "checkpoint-notes", "latest"]


def test_the_same_step_again_replaces_the_former_one(tmp_path: Path) -> None:
    save(tmp_path, 2)
    save(tmp_path, 2, run_state={"tokens": 99}, pieces=cut(make_tensors(8.0), 1)[0])
    folder = find_checkpoint("latest", tmp_path)
    assert load_run_state(folder) == {"tokens": 99} and value_of(folder) == 8
    assert names(tmp_path) == ["checkpoint-2", "latest"]


# --- kills -----------------------------------------------------------------------------------------------------------


class Killed(BaseException):
    """Nothing in the code under test may catch it."""


class Kill:
    """Counts file operations; from number `at` on, each one fails, as if the process were gone."""

    OPERATIONS = ("mkdir", "rename", "replace", "fsync", "unlink", "rmdir", "open")

    def __init__(self, monkeypatch: pytest.MonkeyPatch, at: float) -> None:
        self.count = 0
        for name in self.OPERATIONS:
            monkeypatch.setattr(os, name, self._guarded(getattr(os, name), at))

    def _guarded(self, operation: Callable[..., Any], at: float) -> Callable[..., Any]:
        def guarded(*args: Any, **kwargs: Any) -> Any:
            self.count += 1
            if self.count >= at:
                raise Killed
            return operation(*args, **kwargs)

        return guarded


@pytest.mark.parametrize(("step", "keep"), [(2, 9), (2, 1), (1, 9)], ids=["next", "next and retention", "replace"])
def test_a_kill_before_any_file_operation_leaves_a_complete_latest(tmp_path: Path, step: int, keep: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        save(tmp_path / "count", 1)
        counter = Kill(patch, math.inf)
        save(tmp_path / "count", step, keep=keep, pieces=cut(make_tensors(5.0), 1)[0])
    assert counter.count > 12
    seen = set()
    for at in range(1, counter.count + 1):
        run = tmp_path / str(at)
        save(run, 1)
        with pytest.MonkeyPatch.context() as patch:
            Kill(patch, at)
            with pytest.raises(Killed):
                save(run, step, keep=keep, pieces=cut(make_tensors(5.0), 1)[0])
        seen.add(value_of(find_checkpoint("latest", run)))
        for path in run.glob("checkpoint-?"):
            verify_checkpoint(path)  # no folder only looks like a checkpoint
        save(run, 3)
        assert value_of(find_checkpoint("latest", run)) == 3
        assert not [name for name in names(run) if name.endswith((".tmp", ".old"))]
    assert seen == {1, 5}


def _save_forever(run: Path, step: int) -> None:
    torch.set_num_threads(1)
    while True:
        step += 1
        save(run, step // 2, keep=2)  # every step twice: replacements too


def test_sigkill_at_random_moments_leaves_a_complete_latest(tmp_path: Path) -> None:
    save(tmp_path, 1)
    draw = random.Random(3)
    context = multiprocessing.get_context("fork")
    step = 1
    for _ in range(20):
        child = context.Process(target=_save_forever, args=(tmp_path, 2 * step))
        child.start()
        published, deadline = (tmp_path / "latest").stat().st_ino, time.monotonic() + 20
        while (tmp_path / "latest").stat().st_ino == published and time.monotonic() < deadline:
            time.sleep(0.001)
        assert time.monotonic() < deadline, "the child saved nothing"
        time.sleep(draw.uniform(0, 0.04))
        child.kill()
        child.join()
        folder = find_checkpoint("latest", tmp_path)
        assert value_of(folder) >= step
        step = int(value_of(folder))


# --- failures on one rank --------------------------------------------------------------------------------------------

FILES = (
    "shard-00000.safetensors",
    "shard-00001.safetensors",
    "rank-00001.json",
    "run.json",
    "manifest.json",
    "latest.tmp",
)


@pytest.mark.parametrize("full", FILES)
def test_disk_full_keeps_the_old_checkpoint_and_stops_every_rank(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, full: str
) -> None:
    save_on_ranks(tmp_path, 1, 2)
    fsync = os.fsync

    def fsync_on_a_full_disk(descriptor: int) -> None:
        if os.readlink(f"/proc/self/fd/{descriptor}").endswith(full):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        fsync(descriptor)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fsync_on_a_full_disk)
        results = save_on_ranks(tmp_path, 2, 2)
    failing = 1 if "00001" in full else 0
    assert [type(result) for result in results] == [SRDEError, SRDEError]
    assert "No space left on device" in str(results[failing])
    assert "another rank failed" in str(results[1 - failing])
    assert all("'checkpoint-1' stays the latest checkpoint" in str(result) for result in results)
    assert value_of(find_checkpoint("latest", tmp_path)) == 1
    assert "checkpoint-2.tmp" not in names(tmp_path)
    assert save_on_ranks(tmp_path, 2, 2) == [tmp_path / "checkpoint-2"] * 2


def test_an_unforeseen_error_on_one_rank_does_not_leave_the_others_waiting(tmp_path: Path) -> None:
    results = save_on_ranks(tmp_path, 1, 3, {1: {"rank_state": {"rng": object()}}})
    assert [type(result) for result in results] == [SRDEError, TypeError, SRDEError]


def test_missing_elements_are_found_when_saving(tmp_path: Path) -> None:
    results = save_on_ranks(tmp_path, 1, 2, {1: {"pieces": cut(make_tensors(), 2)[1][:-1]}})
    assert "is missing elements" in str(results[0]) and "another rank failed" in str(results[1])
    assert not (tmp_path / "checkpoint-1").exists() and not (tmp_path / "latest").exists()


def test_a_file_where_the_run_folder_should_be(tmp_path: Path) -> None:
    (tmp_path / "run").write_text("")
    with pytest.raises(SRDEError, match="checkpoint-1 was not saved: rank 0: File exists"):
        save(tmp_path / "run", 1)


def test_leftovers_of_any_step_go_with_the_next_save(tmp_path: Path) -> None:
    (tmp_path / "checkpoint-900.tmp").mkdir()
    (tmp_path / "checkpoint-900.tmp" / "shard-00000.safetensors").write_bytes(b"half")
    save(tmp_path, 1)
    assert names(tmp_path) == ["checkpoint-1", "latest"]


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
        with pytest.raises(SRDEError, match=r"is no checkpoint's name in .*newest good .*checkpoint-1'") as caught:
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
    manifest["sha256"] = resume._content_hash({key: value for key, value in manifest.items() if key != "sha256"})
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
        (lambda m: m["files"]["run.json"].update(bytes="1"), "lacks size or sha256 of 'run.json'"),
        (lambda m: m["files"].update({"run.json": None}), "lacks size or sha256 of 'run.json'"),
        (lambda m: m.update(world_size=10**18), "files of its world_size"),
        (lambda m: m.update(world_size=True), "files of its world_size"),
        (lambda m: m.update(files=[]), "files of its world_size"),
        (lambda m: m.update(step="4"), "own sha256"),
        (lambda m: m.update(format_version=2), "format_version 2"),
        (lambda m: m.update(format="other"), "no checkpoint of srde_ds"),
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
    sha256 = resume._sha256

    def sha256_on_a_dying_disk(path: Path) -> str:
        if "checkpoint-2" in str(path):
            raise OSError(errno.EIO, os.strerror(errno.EIO), str(path))
        return sha256(path)

    monkeypatch.setattr(resume, "_sha256", sha256_on_a_dying_disk)
    with pytest.raises(SRDEError, match=r"cannot be read: Input/output error .*newest good .*checkpoint-1'"):
        find_checkpoint("latest", tmp_path)


def test_a_piece_of_another_model_is_refused_on_reading(folder: Path) -> None:
    with pytest.raises(SRDEError, match=r"'layers.9.router.weight' \(master\) is not in it"):
        read_pieces(folder, [TensorPiece("layers.9.router.weight", "master", (2, 7), 0, torch.zeros(3))])
