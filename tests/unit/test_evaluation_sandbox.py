"""Generated programs: which pass, and what they cannot do."""

from __future__ import annotations

import os
import subprocess
import time
from pathlib import Path

import pytest

from srde_ds.evaluation import sandbox
from srde_ds.evaluation.sandbox import passes_tests, program_in, protections

ADD = "def add(a, b):\n    return a + b\n"
TESTS = "assert add(1, 2) == 3\nassert add('a', 'b') == 'ab'"
needs_namespaces = pytest.mark.skipif(not protections()["network"], reason="no user namespaces on this machine")
needs_landlock = pytest.mark.skipif(not protections()["files"], reason="no Landlock in this kernel")


def test_a_right_program_passes() -> None:
    assert passes_tests(ADD, TESTS)


@pytest.mark.parametrize(
    "program",
    [
        "def add(a, b):\n    return a - b\n",
        "def add(a, b:\n",
        "",
        "import sys\nsys.exit(0)\n",
        "import os\nos._exit(0)\n",
        "open('passed', 'w').write('yes')\nraise SystemExit(0)\n",
        ADD + "input()\n",
    ],
)
def test_a_wrong_program_fails(program: str) -> None:
    assert not passes_tests(program, TESTS)


def test_what_is_run_by_hand_is_left_out() -> None:
    assert passes_tests(ADD + "if __name__ == '__main__':\n    print(input())\n", TESTS)


@pytest.mark.parametrize(
    ("text", "program"),
    [
        ("Here:\n```python\nx = 1\n```\nUse it:\n```python\ny = x\n```", "x = 1\n"),
        ("```\nx = 1\n```", "x = 1\n"),
        ("```py\nx = 1\n", "x = 1\n"),
        ("x = 1", "x = 1"),
    ],
)
def test_the_first_fenced_block_is_the_program(text: str, program: str) -> None:
    assert program_in(text) == program


@pytest.mark.parametrize(
    "program",
    [
        "x = bytearray(3 << 30)",
        "with open('big', 'wb') as file:\n    file.write(bytes(17 << 20))",
        "files = [open('program.py') for _ in range(100)]",
    ],
)
def test_memory_and_files_are_limited(program: str) -> None:
    assert not passes_tests(program, "")


def test_time_is_limited(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sandbox, "CPU_SECONDS", 1)
    monkeypatch.setattr(sandbox, "WALL_SECONDS", 2)
    started = time.monotonic()
    assert not passes_tests("while True:\n    pass", "")
    assert not passes_tests("import time\ntime.sleep(60)", "")
    assert time.monotonic() - started < 20


def test_environment_and_folder_are_empty(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "secret")
    tests = "import os\nassert 'HF_TOKEN' not in os.environ and 'HOME' not in os.environ"
    assert passes_tests("", tests + "\nassert os.listdir() == ['program.py']\nopen('own', 'w').write('may')")


@needs_namespaces
def test_there_is_no_network() -> None:
    # Elsewhere this names an address and sends nothing.
    reach = "import socket\nsocket.socket(socket.AF_INET, socket.SOCK_DGRAM).connect(('127.0.0.1', 9))"
    exec(reach, {})
    assert not passes_tests(reach, "")


@needs_namespaces
def test_processes_end_with_the_program() -> None:
    # In a session of its own it would outlive the kill of the group.
    name = f"srde-left-{os.getpid()}"
    started = f"import subprocess\nsubprocess.Popen(['sh', '-c', 'sleep 300; : {name}'], start_new_session=True)"
    assert passes_tests(started, "")
    running = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True, check=True).stdout
    assert name not in running


@needs_landlock
def test_files_elsewhere_cannot_be_changed(tmp_path: Path) -> None:
    kept = tmp_path / "kept"
    kept.write_text("as it was")
    os.chmod(tmp_path, 0o777)
    os.chmod(kept, 0o666)
    for deed in (
        f"open({str(tmp_path / 'new')!r}, 'w')",
        f"open({str(kept)!r}, 'w')",
        f"import os\nos.truncate({str(kept)!r}, 0)",
        f"import os\nos.remove({str(kept)!r})",
        f"import os\nos.mkdir({str(tmp_path / 'folder')!r})",
    ):
        assert not passes_tests(deed, "")
    assert kept.read_text() == "as it was" and [path.name for path in tmp_path.iterdir()] == ["kept"]
