"""One training at a time in a folder: living runs are told from what kills have left."""

from __future__ import annotations

import json
import multiprocessing
import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from srde_ds.errors import SRDEError
from srde_ds.liveness.launcher_watch import start_time
from srde_ds.training import run_lock as module
from srde_ds.training.run_lock import FILE, refuse_living_run, run_lock

HOLD = """
import sys, time
from srde_ds.training.run_lock import run_lock
with run_lock(sys.argv[1]):
    print("held", flush=True)
    time.sleep(60)
"""


def write_lock(folder: Path, **changes: Any) -> Path:
    folder.mkdir(exist_ok=True)
    own = {"host": "a", "pid": os.getpid(), "started": start_time(os.getpid()), "machine": module._machine()}
    (folder / FILE).write_text(json.dumps(own | changes))
    return folder / FILE


def test_a_living_run_is_named_and_a_killed_one_leaves_no_hindrance(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    with subprocess.Popen([sys.executable, "-c", HOLD, str(folder)], stdout=subprocess.PIPE) as process:
        assert process.stdout and process.stdout.readline() == b"held\n"
        for check in (refuse_living_run, lambda folder: run_lock(folder).__enter__()):
            with pytest.raises(SRDEError, match=f"output_dir={folder}: process {process.pid} of host .* is training"):
                check(folder)
        process.kill()
    assert (folder / FILE).exists()
    refuse_living_run(folder)
    with run_lock(folder):
        assert json.loads((folder / FILE).read_text())["pid"] == os.getpid()
    assert list(folder.iterdir()) == []


def test_a_process_number_that_was_given_again_is_no_run(tmp_path: Path) -> None:
    path = write_lock(tmp_path, started="1")
    with run_lock(tmp_path):
        assert json.loads(path.read_text())["started"] != "1"
    assert not path.exists()


@pytest.mark.parametrize("content", [None, "", "[]", '{"pid": "x"}', "[" * 5000])
def test_a_lock_of_another_host_is_watched(
    tmp_path: Path, content: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also one that is half-written."""
    monkeypatch.setattr(module, "_LOOK_SECONDS", 0.01)
    monkeypatch.setattr(module, "STALE_SECONDS", 0.2)
    path = write_lock(tmp_path, machine="another", host="node7")
    if content is not None:
        path.write_text(content)
    refuse_living_run(tmp_path)  # does not wait
    with run_lock(tmp_path):
        assert json.loads(path.read_text())["pid"] == os.getpid()


def test_a_pipe_in_its_place_is_refused_and_not_waited_for(tmp_path: Path) -> None:
    for spoil in (os.mkfifo, Path.mkdir, lambda path: path.symlink_to("/dev/zero")):
        spoil(tmp_path / FILE)
        for check in (refuse_living_run, lambda folder: run_lock(folder).__enter__()):
            with pytest.raises(SRDEError, match=f"^'{tmp_path / FILE}': not an ordinary file: remove it"):
                check(tmp_path)
        (tmp_path / FILE).rmdir() if (tmp_path / FILE).is_dir() else (tmp_path / FILE).unlink()


def test_a_lock_that_another_host_touches_is_refused_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_LOOK_SECONDS", 0.01)
    path = write_lock(tmp_path, machine="another", host="node7", pid=12)
    threading.Timer(0.3, os.utime, [path]).start()
    began = time.monotonic()
    with pytest.raises(SRDEError, match="process 12 of host node7 is training there"), run_lock(tmp_path):
        pass
    assert time.monotonic() - began < module.STALE_SECONDS / 2 and path.exists()


def test_a_lock_is_touched_while_it_is_held(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "TOUCH_SECONDS", 0.05)
    with run_lock(tmp_path):
        first = (tmp_path / FILE).stat().st_mtime_ns
        deadline = time.monotonic() + 20
        while (tmp_path / FILE).stat().st_mtime_ns == first:
            assert time.monotonic() < deadline
            time.sleep(0.01)


def test_a_lock_that_was_taken_over_ends_its_former_owner_and_stays(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    hold = f"from srde_ds.training import run_lock; run_lock.TOUCH_SECONDS = 0.2\n{HOLD}"
    with subprocess.Popen(
        [sys.executable, "-c", hold, str(folder)], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        assert process.stdout is not None and process.stdout.readline()
        owner = json.loads((folder / FILE).read_text()) | {"pid": 17}
        (folder / FILE).write_text(json.dumps(owner))
        _, said = process.communicate(timeout=30)
    assert process.returncode == 1 and b"now belongs to process 17 of" in said
    assert json.loads((folder / FILE).read_text()) == owner
    with pytest.raises(SRDEError), run_lock(tmp_path / "other"):
        (tmp_path / "other" / FILE).write_text("{}")
        raise SRDEError("ends")
    assert (tmp_path / "other" / FILE).read_text() == "{}"


def test_a_run_that_fails_leaves_no_folder_but_what_it_has_written(tmp_path: Path) -> None:
    for name, wrote in (("empty", False), ("written", True)):
        folder = tmp_path / name
        with pytest.raises(ZeroDivisionError), run_lock(folder):
            if wrote:
                (folder / "tokenized").mkdir()
            raise ZeroDivisionError
        assert folder.exists() is wrote and not (folder / FILE).exists()


def test_of_many_that_find_a_stale_lock_one_gets_it(tmp_path: Path) -> None:
    write_lock(tmp_path, started="1")
    context = multiprocessing.get_context("fork")
    start, results = context.Event(), context.Queue()
    release = context.Event()

    def take() -> None:
        start.wait()
        try:
            with run_lock(tmp_path):
                results.put("held")
                release.wait()
        except SRDEError:
            results.put("refused")

    takers = [context.Process(target=take, daemon=True) for _ in range(8)]
    for taker in takers:
        taker.start()
    start.set()
    found = [results.get(timeout=60) for _ in takers]
    release.set()
    for taker in takers:
        taker.join()
    assert sorted(found) == ["held"] + ["refused"] * 7
    assert list(tmp_path.iterdir()) == []
