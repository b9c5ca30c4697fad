"""Files that are replaced whole or not at all, and tables."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import pytest

from srde_ds.utils.files import new_files, output, replacement, sync, write_text
from srde_ds.utils.tables import aligned_table, markdown_table


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path: Path) -> None:
    target, partial = tmp_path / "a", tmp_path / "a.tmp"
    write_text(target, "old")
    partial.mkdir()  # left by a kill, even as a folder
    (partial / "half").touch()
    with pytest.raises(KeyError), replacement(target) as path:
        assert path == partial and not partial.exists()
        path.write_text("half")
        raise KeyError
    assert target.read_text() == "old" and not partial.exists()
    write_text(target, "é")
    assert target.read_bytes() == "é".encode() and os.listdir(tmp_path) == ["a"]


def test_a_folder_appears_whole(tmp_path: Path) -> None:
    with replacement(tmp_path / "folder") as path:
        path.mkdir()
        (path / "a").touch()
        assert not (tmp_path / "folder").exists()
    assert [p.name for p in (tmp_path / "folder").iterdir()] == ["a"]
    with pytest.raises(OSError), replacement(tmp_path / "folder") as path:
        path.mkdir()
    assert [p.name for p in (tmp_path / "folder").iterdir()] == ["a"] and os.listdir(tmp_path) == ["folder"]
    with replacement(tmp_path / "folder", overwrite=True) as path:
        path.mkdir()
        (path / "b").touch()
        assert (tmp_path / "folder" / "a").exists()
    assert [p.name for p in (tmp_path / "folder").iterdir()] == ["b"] and os.listdir(tmp_path) == ["folder"]


def test_several_files_appear_together(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("old")
    with pytest.raises(KeyError), new_files(tmp_path) as folder:
        (folder / "a").write_text("half")
        raise KeyError
    assert os.listdir(tmp_path) == ["a"] and (tmp_path / "a").read_text() == "old"
    with new_files(tmp_path) as folder:
        (folder / "a").write_text("new")
        (folder / "b").touch()
        assert (tmp_path / "a").read_text() == "old"
    assert sorted(os.listdir(tmp_path)) == ["a", "b"] and (tmp_path / "a").read_text() == "new"


def test_a_pipe_that_the_user_names_is_written_to(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    reader = os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    for target in (tmp_path / "pipe", Path("/dev/null"), tmp_path / "file"):
        with output(target) as path:
            path.write_text("text")
            assert (path == target) == (target.name != "file")
    assert os.read(reader, 9) == b"text" and (tmp_path / "file").read_text() == "text"
    assert (tmp_path / "pipe").is_fifo() and Path("/dev/null").is_char_device()
    os.close(reader)


def test_an_output_changes_only_the_file_that_the_user_means(tmp_path: Path) -> None:
    file, link, neighbour, nothing = (tmp_path / name for name in ("file", "link", "file.tmp", "nothing"))
    for path in (file, neighbour):
        path.write_text("the user's")
    file.chmod(0o600)
    link.symlink_to(file)
    nothing.symlink_to("/dev/null")
    for target in (link, nothing):
        with output(target) as path:
            path.write_text("text")
    assert link.is_symlink() and file.read_text() == "text" and file.stat().st_mode & 0o777 == 0o600
    assert neighbour.read_text() == "the user's" and nothing.is_symlink()
    assert sorted(os.listdir(tmp_path)) == ["file", "file.tmp", "link", "nothing"]


def test_what_is_durable_is_synced_before_and_after_it_gets_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[str] = []
    fsync, replace = os.fsync, os.replace

    def told_fsync(file: int) -> None:
        done.append(os.readlink(f"/proc/self/fd/{file}"))
        fsync(file)

    def told_replace(source: Path, target: Path) -> None:
        done.append("replace")
        replace(source, target)

    monkeypatch.setattr("os.fsync", told_fsync)
    monkeypatch.setattr("os.replace", told_replace)
    write_text(tmp_path / "a", "text")
    assert done == ["replace"]
    write_text(tmp_path / "a", "text", durable=True)
    assert done[1:] == [str(tmp_path / "a.tmp"), "replace", str(tmp_path)]


@pytest.mark.parametrize(
    ("kind", "fault", "fails"),
    [
        (stat.S_ISDIR, errno.EINVAL, False),
        (stat.S_ISDIR, errno.ENOTSUP, False),
        (stat.S_ISDIR, errno.EBADF, False),
        (stat.S_ISDIR, errno.EIO, True),
        (stat.S_ISREG, errno.EINVAL, True),
    ],
)
def test_storage_that_cannot_flush_a_folder_takes_what_is_durable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: Callable[[int], bool], fault: int, fails: bool
) -> None:
    def fsync(file: int) -> None:
        if kind(os.fstat(file).st_mode):
            raise OSError(fault, os.strerror(fault))

    monkeypatch.setattr("os.fsync", fsync)
    with pytest.raises(OSError) if fails else nullcontext():
        write_text(tmp_path / "a", "text", durable=True)


def test_a_folder_that_may_not_be_listed_is_not_flushed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As the parent of the users' folders, with mode 711. A file that may not be read is an error."""

    def denied(path: Path, flags: int) -> int:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))

    (tmp_path / "file").touch()
    monkeypatch.setattr("os.open", denied)
    sync(tmp_path)
    with pytest.raises(PermissionError):
        sync(tmp_path / "file")


def test_writers_of_one_file_do_not_share_what_they_write_to(tmp_path: Path) -> None:
    with replacement(tmp_path / "a", many_writers=True) as path:
        path.write_text("mine")
        write_text(tmp_path / "a", "another's")
    assert (tmp_path / "a").read_text() == "mine" and str(os.getpid()) in path.name


def test_tables() -> None:
    rows = [["kind", "values", "note"], ["a", "1,000", ""], ["longer", "5", "1e5"]]
    assert aligned_table(rows) == "kind    values  note\na       1,000\nlonger  5       1e5"
    assert aligned_table(rows, right=1) == "kind    values  note\na        1,000\nlonger       5   1e5"
    assert aligned_table(rows[:1]).split() == rows[0]
    assert markdown_table([["a", "b|c"], ["1", "2"]]) == "| a | b\\|c |\n|---|---|\n| 1 | 2 |"
