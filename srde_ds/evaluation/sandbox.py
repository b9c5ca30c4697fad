"""Run generated programs with their tests in a limited process. docs/evaluation.md says what it does not stop."""

from __future__ import annotations

import os
import re
import secrets
import shutil
import signal
import subprocess
import sys
from contextlib import suppress
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

from srde_ds.evaluation import run_limited

WALL_SECONDS = 20
CPU_SECONDS = 10
MEMORY_BYTES = 2 << 30
FILE_BYTES = 16 << 20
# With user namespaces those of the program alone are counted, without all of the user's.
PROCESSES, PROCESSES_OF_USER = 32, 4096

_FENCED = re.compile(r"```(?:python|py)?[ \t]*\n(.*?)(?:```|\Z)", re.DOTALL | re.IGNORECASE)
_UNSHARE = ["unshare", "--user", "--map-current-user", "--net", "--pid", "--fork", "--kill-child", "--"]


def program_in(text: str) -> str:
    """The first fenced block of Python in an answer, else all of it."""
    found = _FENCED.search(text)
    return found[1] if found else text


@cache
def has_namespaces() -> bool:
    """Whether a process may be given its own network (none) and process numbers here."""
    if shutil.which("unshare") is None:
        return False
    return subprocess.run([*_UNSHARE, "true"], capture_output=True).returncode == 0


def protections() -> dict[str, bool]:
    """What this machine offers besides limits: `network` cut off, `files` elsewhere read-only."""
    return {"network": has_namespaces(), "files": run_limited.landlock_version() > 0}


def passes_tests(program: str, tests: str) -> bool:
    """Whether `program` followed by `tests` runs to its end within the limits, in an empty folder and environment."""
    with TemporaryDirectory(prefix="srde-code-") as folder:
        token = secrets.token_hex(16)
        # Reaching the end is what counts: a program may call exit(0) before its tests.
        end = f"with open('passed', 'w') as _file:\n    _file.write({token!r})\n"
        source, passed = Path(folder, "program.py"), Path(folder, "passed")
        source.write_text(f"{program}\n\n{tests}\n\n{end}", encoding="utf-8", errors="replace")
        isolated = has_namespaces()
        command = [*(_UNSHARE if isolated else []), sys.executable, "-I", "-B", str(Path(run_limited.__file__))]
        limits = [CPU_SECONDS, MEMORY_BYTES, FILE_BYTES, PROCESSES if isolated else PROCESSES_OF_USER]
        nothing = subprocess.DEVNULL
        process = subprocess.Popen(
            [*command, str(source), *map(str, limits)],
            cwd=folder,
            env={},
            stdin=nothing,
            stdout=nothing,
            stderr=nothing,
            start_new_session=True,
        )
        try:
            status = process.wait(WALL_SECONDS)
        except subprocess.TimeoutExpired:
            status = -signal.SIGKILL
        finally:
            # Its children, too, as far as they are still in its session; a namespace of processes ends whole.
            _kill_group(process)
        return status == 0 and passed.is_file() and passed.read_text(encoding="utf-8", errors="replace") == token


def _kill_group(process: subprocess.Popen[bytes]) -> None:
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
