"""Parts are made once, under a name that says from what, by processes that never hang."""

from __future__ import annotations

import errno
import fcntl
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any
from unittest.mock import Mock

import pytest

from srde_ds.data.build import artifacts as module
from srde_ds.data.build.artifacts import ArtifactStore, code_fingerprint, fingerprint, one_build, slices
from srde_ds.errors import SRDEError


def work(path: Path, *, text: str) -> dict[str, Any]:
    if text == "bad":
        path.write_text("half")
        raise SRDEError("bad input")
    if text == "slow":
        path.write_text("half")
        time.sleep(600)
    if text == "killed":
        while not list(path.parent.glob("*.tmp")):  # of the slow one
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGKILL)
    path.write_text(f"{text} by {os.getpid()}")
    return {"length": len(text)}


def parts(*texts: str) -> list[tuple[str, dict[str, str]]]:
    return [(fingerprint("v1", text), {"text": text}) for text in texts]


def test_parts_come_in_order_and_are_made_once(tmp_path: Path) -> None:
    with ArtifactStore(tmp_path) as store:
        made = store.run("a", work, parts("one", "three"))
        assert [part.figures["length"] for part in made] == [3, 5]
        assert store.made == {"a": 2}
    stamps = {part.path: part.path.stat().st_mtime_ns for part in made}
    with ArtifactStore(tmp_path) as store:
        again = store.run("a", work, parts("three", "two", "one"))
        assert store.made == {"a": 1} and store.wall_seconds["a"] > store.cpu_seconds["a"] > 0
    assert [part.key for part in again] == [key for key, _ in parts("three", "two", "one")]
    assert all(path.stat().st_mtime_ns == stamp for path, stamp in stamps.items())


def test_a_part_that_fails_leaves_nothing_and_keeps_the_others(tmp_path: Path) -> None:
    with ArtifactStore(tmp_path) as store, pytest.raises(SRDEError, match="bad input"):
        store.run("a", work, parts("one", "bad", "two"))
    assert len(list((tmp_path / "a").iterdir())) == 2  # one part and its figures
    with ArtifactStore(tmp_path) as store:
        store.run("a", work, parts("one", "two"))
        assert store.made == {"a": 1}


@pytest.mark.parametrize(
    "harm",
    [
        lambda path: path.with_suffix(".json").unlink(),
        lambda path: path.with_suffix(".json").write_text(""),
        lambda path: path.write_text("on"),
        lambda path: path.unlink(),
    ],
)
def test_a_part_that_is_not_whole_is_made_again(tmp_path: Path, harm: Callable[[Path], None]) -> None:
    with ArtifactStore(tmp_path) as store:
        (made,) = store.run("a", work, parts("one"))
        content = made.path.read_text()
        harm(made.path)
        store.run("a", work, parts("one"))
        assert store.made == {"a": 2} and made.path.read_text() == content


def test_one_build_at_a_time(tmp_path: Path) -> None:
    lock = tmp_path / "made" / "for" / "lock"
    with one_build(tmp_path, lock):
        with pytest.raises(SRDEError, match="another build is using this folder"), one_build(tmp_path, lock):
            pass
        assert lock.exists()  # it belongs to the first
    assert not (tmp_path / "made").exists()
    lock.parent.mkdir(parents=True)
    lock.touch()  # left by a kill
    with one_build(tmp_path, lock):
        pass
    assert list(lock.parent.iterdir()) == []


def test_a_lock_that_its_holder_removes_meanwhile_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flock, lock = fcntl.flock, tmp_path / "lock"

    def late(file: IO[bytes], how: int) -> None:
        monkeypatch.undo()  # only the first time
        lock.unlink()
        flock(file, how)

    monkeypatch.setattr("fcntl.flock", late)
    with one_build(tmp_path, lock), pytest.raises(SRDEError, match="another build"), one_build(tmp_path, lock):
        pass


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOLCK, errno.ENOTSUP])
def test_storage_without_locks_is_told_of(
    tmp_path: Path, number: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("fcntl.flock", Mock(side_effect=OSError(number, os.strerror(number))))
    with one_build(tmp_path, tmp_path / "lock"):
        pass
    assert f"{tmp_path}: this storage has no file locks ({os.strerror(number)})." in caplog.text


def test_processes_share_the_work_and_report_errors_and_deaths(tmp_path: Path) -> None:
    with ArtifactStore(tmp_path, num_processes=2) as store:
        made = store.run("a", work, parts(*map(str, range(6))))
        makers = {part.path.read_text().split()[-1] for part in made}
        assert str(os.getpid()) not in makers and 1 <= len(makers) <= 2
        with pytest.raises(SRDEError, match="bad input"):
            store.run("b", work, parts("one", "bad"))
        started = time.monotonic()
        with pytest.raises(SRDEError, match="num_processes=2: a process was killed"):
            store.run("c", work, parts("slow", "killed"))
        assert time.monotonic() - started < 200
        assert not list((tmp_path / "c").iterdir())
        store.run("c", work, parts("one", "two"))  # with processes of its own
        assert len(list((tmp_path / "c").iterdir())) == 4  # two parts and their figures


def test_what_a_killed_build_left_half_done_goes(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    for half in (tmp_path / "a" / "key.123.tmp", tmp_path / "signatures.123.tmp"):
        half.write_text("x")
    with ArtifactStore(tmp_path):
        assert not list(tmp_path.rglob("*.tmp"))


def test_names_change_with_inputs_and_code(monkeypatch: pytest.MonkeyPatch) -> None:
    assert fingerprint("a", [1, {"b": 2}]) == fingerprint("a", [1, {"b": 2}]) != fingerprint("a", [1, {"b": 3}])
    with pytest.raises(TypeError):
        fingerprint(object())  # its text would hold an address
    before = code_fingerprint("srde_ds.data.build.artifacts")
    monkeypatch.setattr("srde_ds.data.build.artifacts.inspect.getsource", lambda _: "other code")
    module.code_fingerprint.cache_clear()
    assert code_fingerprint("srde_ds.data.build.artifacts") != before
    module.code_fingerprint.cache_clear()


def test_slices_cover_everything_once() -> None:
    assert list(slices(7, 3)) == [(0, 3), (3, 6), (6, 7)] and list(slices(0, 3)) == []
