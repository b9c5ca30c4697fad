"""What `srde-ds doctor` runs on each host: answers each JSON line with a JSON line.

python -m srde_ds.cluster.host_agent
"""

from __future__ import annotations

import hashlib
import json
import platform
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from srde_ds.utils.environment import package_versions

CONNECT_SECONDS = 5.0


def describe_host(base: str | None, output_dir: str) -> dict[str, Any]:
    """Properties of the host that must or should be the same on all hosts."""
    there = next(path for path in (Path(output_dir).absolute(), *Path(output_dir).absolute().parents) if path.exists())
    return {
        "host": socket.gethostname(),
        "versions": package_versions() | {"Python": platform.python_version()},
        "gpus": gpus(),
        "base": base_files(base) if base and Path(base).is_dir() else None,
        "free_bytes": shutil.disk_usage(there).free,
        "writable": writable(there),
        "own_address": _own_address(),
        "interfaces": [name for _, name in socket.if_nameindex()],
    }


def writable(folder: Path) -> bool:
    """Whether a folder can be written, found by writing: for root, access rights allow even what fails."""
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(b"0")
    except OSError:
        return False
    return True


def gpus() -> list[dict[str, Any]]:
    """Name, memory, driver and UUID of each GPU, as nvidia-smi lists them; none without it.

    The memory is 0 where nvidia-smi does not know it: boards that share the host's print "[N/A]".
    """
    query = ["nvidia-smi", "--query-gpu=name,memory.total,driver_version,uuid", "--format=csv,noheader,nounits"]
    try:
        listed = subprocess.run(query, capture_output=True, text=True, timeout=30, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return []
    rows = [[field.strip() for field in line.split(",")] for line in listed.splitlines() if line.strip()]
    return [
        {"name": name, "memory_gib": float(mib) / 1024 if mib.isdecimal() else 0.0, "driver": driver, "uuid": uuid}
        for name, mib, driver, uuid in rows
    ]


def base_files(folder: str) -> dict[str, str]:
    """Each file of a base with its size, and for small files the hash; gigabytes are not read."""
    found = {}
    for path in sorted(Path(folder).iterdir()):
        if path.is_file():
            size = path.stat().st_size
            digest = hashlib.sha256(path.read_bytes()).hexdigest()[:12] if size < 2**24 else ""
            found[path.name] = f"{size} bytes {digest}".strip()
    return found


def _own_address() -> str:
    """The address of this host's name, which gloo uses if no interface is given."""
    try:
        return socket.gethostbyname(socket.gethostname())
    except OSError:
        return "none"


def listen(port: int) -> str:
    """Accept connections on a port until this process ends; returns "" or the reason why not."""
    try:
        _accept_on(port)
    except OSError as error:
        return str(error.strerror)
    return ""


def listen_anywhere() -> int:
    """The same on a port that the system chooses, as it does for ranks."""
    return _accept_on(0)


def _accept_on(port: int) -> int:
    server = socket.create_server(("", port))

    def accept() -> None:
        with suppress(OSError):
            while True:
                server.accept()[0].close()

    threading.Thread(target=accept, daemon=True).start()
    return int(server.getsockname()[1])


def connect(host: str, port: int) -> str:
    """Try to connect; returns "" or the reason why not."""
    try:
        socket.create_connection((host, port), timeout=CONNECT_SECONDS).close()
    except OSError as error:
        return error.strerror or str(error)
    return ""


def write(path: str) -> str:
    """Make an empty file, and its folder."""
    try:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Path(path).touch()
    except OSError as error:
        return str(error.strerror)
    return ""


ANSWERS: dict[str, Callable[..., Any]] = {
    "describe_host": describe_host,
    "clock": time.time,
    "listen": listen,
    "listen_anywhere": listen_anywhere,
    "connect": connect,
    "write": write,
    "see": lambda path: Path(path).exists(),
}


def main() -> None:
    """Answer the questions on standard input, one JSON list per line, until it ends."""
    # Keeps the output of libraries out of the answers.
    answers, sys.stdout = sys.stdout, sys.stderr
    for line in sys.stdin:
        question, arguments = json.loads(line)
        answers.write(json.dumps(ANSWERS[question](**arguments)) + "\n")
        answers.flush()


if __name__ == "__main__":
    main()
