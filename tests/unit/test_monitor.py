"""What `srde-ds monitor` makes of a run's folder, and what it tells a webhook."""

from __future__ import annotations

import http.server
import json
import logging
import os
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from srde_ds.cli.main import main
from srde_ds.cluster.monitor import monitor, observe
from srde_ds.liveness.heartbeat import FILE, Heartbeat
from srde_ds.training.run import Run
from srde_ds.training.run_lock import run_lock
from tests.cli_helpers import fails

NOW = 1_000_000.0
LINE = {"step": 7, "phase": "joint", "loss": 1.25, "tokens": 900, "tokens_per_second": 210.0}


def heartbeat(folder: Path, **changes: Any) -> Path:
    content = {"state": "running", "step": 7, "max_steps": 20, "host": socket.gethostname(), "pid": os.getpid()}
    content |= {"time": NOW, "loss": 1.25, "tokens_per_second": 210.0, "seconds_per_step": 30.0} | changes
    (folder / FILE).write_text(json.dumps(content))
    return folder


@pytest.mark.parametrize(
    ("changes", "later", "state", "text"),
    [
        ({}, 299, "running", "step 7/20, loss 1.2500, 210 tokens/s"),
        ({}, 301, "stalled", "no progress for 301 s"),  # ten usual steps
        ({"seconds_per_step": 0.1}, 119, "running", "step 7/20"),
        ({"seconds_per_step": 0.1}, 121, "stalled", "no progress for 121 s"),
        ({"seconds_per_step": None}, 1700, "running", "step 7/20"),  # before the second step
        ({"pid": 2**22 + 1}, 0, "died", "ended without a word"),
        ({"pid": 2**22 + 1, "host": "elsewhere"}, 0, "running", "step 7/20"),
        ({"state": "failed", "reason": "rank 3: No space left"}, 9999, "failed", "rank 3: No space left"),
        ({"state": "stopped", "reason": "stopped by SIGTERM"}, 9999, "stopped", "stopped by SIGTERM"),
    ],
)
def test_states(tmp_path: Path, changes: dict[str, Any], later: float, state: str, text: str) -> None:
    seen = observe(heartbeat(tmp_path, **changes), now=NOW + later)
    assert seen.state == state and text in seen.text
    (tmp_path / "completed.json").write_text("{}")  # stronger than all else
    assert observe(tmp_path, now=NOW + later).state == "finished"


@pytest.mark.parametrize("changes", [{"state": "failed", "reason": "no luck"}, {"pid": 2**22 + 1}, {}])
def test_a_former_attempt_says_nothing_of_one_that_is_starting(tmp_path: Path, changes: dict[str, Any]) -> None:
    heartbeat(tmp_path, time=time.time() - 9999, **changes)
    if not changes:
        (tmp_path / "completed.json").write_text("{}")  # of fewer steps
    before = observe(tmp_path, now=time.time()).state
    with run_lock(tmp_path):
        seen = observe(tmp_path, now=time.time())
        assert seen.state == "starting" and "starting again for 0 s, after step 7/20" in seen.text
        assert observe(tmp_path, now=time.time() + 50, stall_seconds=40).state == "stalled"  # as if it hung in loading
        lock = json.loads((tmp_path / "run.lock").read_text())
        (tmp_path / "run.lock").write_text(json.dumps(lock | {"machine": "another"}))
        assert observe(tmp_path, now=time.time()).state == "starting"
        assert observe(tmp_path, now=time.time() + 61).state == before  # its process was killed
        heartbeat(tmp_path, time=time.time(), **changes)
        assert observe(tmp_path, now=time.time()).state == before
    (tmp_path / "run.lock").unlink()  # it looked like another's
    os.mkfifo(tmp_path / "run.lock")
    assert observe(tmp_path, now=time.time()).state == before


def test_a_run_without_a_heartbeat_is_waited_for(tmp_path: Path) -> None:
    assert observe(tmp_path, now=NOW).state == "waiting"
    (tmp_path / FILE).write_text('{"state": "runn')  # never seen in practice: the file is replaced at once
    assert observe(tmp_path, now=NOW).state == "waiting"


HOSTILE: list[Any] = ["\x1b[2J", None, [], {"a": 1}, True, -1, float("nan"), 10**400, "../../self", "\0"]


@pytest.mark.parametrize("key", ["state", "time", "host", "pid", "step", "loss", "tokens_per_second", "reason"])
def test_a_heartbeat_of_others_is_one_line(key: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for value in HOSTILE:
        heartbeat(tmp_path, **{"state": "failed", "reason": "no luck", key: value})
        assert main(["monitor", str(tmp_path), "--once"]) in (0, 1)
        shown = capsys.readouterr()
        assert shown.out.count("\n") == 1 and shown.out[:-1].isprintable() and not shown.err


@pytest.mark.parametrize("content", [b"[" * 100_000, b"[]", b"\xff", b'{"state": "failed"}'])
def test_a_damaged_heartbeat_is_named(content: bytes, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / FILE).write_bytes(content)
    assert main(["monitor", str(tmp_path), "--once"]) == 0
    assert capsys.readouterr().out == f"{tmp_path}: heartbeat.json is damaged\n"
    (tmp_path / FILE).unlink()
    os.mkfifo(tmp_path / FILE)
    assert "is damaged" in observe(tmp_path, now=NOW).text


def test_a_given_limit_replaces_the_usual_one(tmp_path: Path) -> None:
    assert observe(heartbeat(tmp_path), now=NOW + 50, stall_seconds=40).state == "stalled"


def test_what_training_writes_is_understood(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("srde_ds.liveness.heartbeat.RANK_0_SECONDS", 0)
    beat = Heartbeat(tmp_path, 20, world_size=2, enabled=True)
    beat.start(6)
    beat.update(LINE)
    content = json.loads((tmp_path / FILE).read_text())
    assert observe(tmp_path, now=content["time"]).state == "running"
    other = Heartbeat(tmp_path, 20, world_size=2, enabled=False)
    other.start(6)
    other.update(LINE | {"step": 9})
    assert json.loads((tmp_path / FILE).read_text()) == content  # rank 1 writes nothing
    other.failed("rank 0 is lost", 0)  # but this
    seen = observe(tmp_path, now=NOW)
    assert seen.state == "failed" and "step 6/20" in seen.text and "rank 0 is lost" in seen.text
    later = [Heartbeat(tmp_path, 20, world_size=2, enabled=False) for _ in range(2)]
    for rank, text in enumerate(("said of a later attempt", "not heard: it has been said")):
        later[rank].start(6)
        later[rank].failed(text, 1)
    assert "said of a later attempt" in observe(tmp_path, now=NOW).text


def test_a_long_measurement_is_no_stall(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    beat = Heartbeat(tmp_path, 20, world_size=2, enabled=True)
    beat.beat()
    assert not (tmp_path / FILE).exists()  # the folder may belong to another run
    beat.start(6)
    first = json.loads((tmp_path / FILE).read_text())["time"]
    run = cast("Run", SimpleNamespace(beat=beat.beat, stopped_by=lambda: None))
    assert not Run.interrupted(run)  # called before each batch
    assert json.loads((tmp_path / FILE).read_text())["time"] == first
    monkeypatch.setattr("srde_ds.liveness.heartbeat.BETWEEN_STEPS_SECONDS", -1.0)
    Run.interrupted(run)
    assert json.loads((tmp_path / FILE).read_text())["time"] > first


def test_a_run_whose_folder_is_not_open_leaves_no_heartbeat(tmp_path: Path) -> None:
    Heartbeat(tmp_path, 20, world_size=1, enabled=True).failed("bad input", 0)
    assert not list(tmp_path.iterdir())


def test_a_full_disk_is_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    Heartbeat("/dev/full/run", 20, world_size=1, enabled=True).start(0)
    assert "heartbeat.json" in caplog.text


class Hook(http.server.BaseHTTPRequestHandler):
    status = 204
    bodies: list[dict[str, str]]

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        type(self).bodies.append(body)
        self.send_response(self.status)
        self.end_headers()

    def log_message(self, *args: Any) -> None:
        pass


@pytest.fixture
def hook() -> Iterator[tuple[type[Hook], str]]:
    handler = type("Handler", (Hook,), {"bodies": []})
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield handler, f"http://127.0.0.1:{server.server_port}/secret"
        server.shutdown()


def test_the_webhook_hears_each_change_once(
    hook: tuple[type[Hook], str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    handler, url = hook
    states = iter([{}, {}, {"state": "stopped", "reason": "stopped by SIGTERM"}, {}])

    def next_state(seconds: float) -> None:
        changes = next(states, None)
        if changes is None:
            (tmp_path / "completed.json").write_text("{}")
        else:
            heartbeat(tmp_path, time=2e12, **changes)

    monkeypatch.setattr("srde_ds.cluster.monitor.time.sleep", next_state)
    assert monitor(tmp_path, webhook=url) == 0
    said = [body["text"].partition("]")[0][1:] for body in handler.bodies]
    assert said == ["running", "stopped", "running", "finished"]
    assert all(body["text"] == body["content"] for body in handler.bodies)
    assert capsys.readouterr().out.count("\n") == 5  # these, and that it waits


def test_a_failing_webhook_changes_nothing_and_its_url_stays_secret(
    hook: tuple[type[Hook], str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    handler, url = hook
    handler.status = 500
    (heartbeat(tmp_path) / "completed.json").write_text("{}")
    for address, reason in ((url, "HTTP status 500"), ("http://127.0.0.1:9/secret", "URLError")):
        monkeypatch.setenv("WEBHOOK_URL", address)
        with caplog.at_level(logging.WARNING):
            assert main(["monitor", str(tmp_path), "--once"]) == 0
        assert reason in caplog.text
    printed = capsys.readouterr()
    assert "secret" not in caplog.text + printed.out + printed.err
    assert len(handler.bodies) == 1


def test_once_tells_by_its_status(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    heartbeat(tmp_path, time=0.0)
    assert main(["monitor", str(tmp_path), "--once"]) == 1
    assert "no progress" in capsys.readouterr().out
    fails(capsys, ["monitor", str(tmp_path / "none"), "--once"], "no such folder")
    fails(capsys, ["monitor", str(tmp_path), "--once", "--webhook", "hooks.example/x"], "webhook: not an http(s) URL")


@pytest.mark.parametrize("reply", [b"nonsense\r\n\r\n", b"", b"HTTP/1.1 twohundred OK\r\n\r\n", b"\xff" * 70000])
def test_a_garbage_reply_never_ends_the_monitor(reply: bytes, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:

        def answer() -> None:
            connection, _ = server.accept()
            with connection:
                connection.recv(2**16)
                connection.sendall(reply)

        threading.Thread(target=answer, daemon=True).start()
        (heartbeat(tmp_path) / "completed.json").write_text("{}")
        assert monitor(tmp_path, webhook=f"http://127.0.0.1:{server.getsockname()[1]}/secret") == 0
    assert "webhook: " in caplog.text and "secret" not in caplog.text


@pytest.mark.parametrize("url", ["https://[secret/x", "https://hooks.example:secret/x", "https://", "secret.example/x"])
def test_a_bad_webhook_is_not_shown(url: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "secret" not in fails(capsys, ["monitor", str(tmp_path), "--webhook", url], "webhook: not an http(s) URL")


def test_a_webhook_in_the_wrong_place_is_not_shown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for words in ([str(tmp_path), "https://a/secret"], [str(tmp_path), "--webhok", "https://a/secret"]):
        assert "secret" not in fails(capsys, ["monitor", *words], "")
    assert "secret" not in fails(capsys, ["monitor", "--https://a/secret"], "unknown argument")
