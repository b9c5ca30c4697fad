"""Runs generated programs with their tests in a sandbox. docs/security.md says what it stops and what it does not."""

from __future__ import annotations

import errno
import os
import platform
import re
import shutil
import signal
import socket
import struct
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Literal

from srde_ds.errors import SRDEError
from srde_ds.evaluation import run_limited
from srde_ds.inference.answers import without_thoughts

Sandbox = Literal["bubblewrap", "none"]

WALL_SECONDS = 60  # only for programs that wait: on a busy machine right ones have taken over 20
CPU_SECONDS = 10
MEMORY_BYTES = 2 << 30
FILE_BYTES = 16 << 20
ALL_FILES_BYTES = 64 << 20

# Whole blocks, so that the end of one is not taken for the beginning of another; or a block within a line.
_FENCED = re.compile(r"```([^`\n]*)\n(.*?)(```|\Z)|```[^`\n]*```", re.DOTALL)
_PYTHON_NAMES = ("python", "py", "python3", "py3")
_DEFINES = re.compile(r"^(?:async\s+def|def|class)\s", re.MULTILINE)
_HARNESS = "/harness.py"
# What Python needs, without anybody's data. Missing paths are skipped.
_READABLE = ("/usr", "/bin", "/sbin", "/lib", "/lib32", "/lib64", "/etc/ld.so.cache", "/etc/alternatives")
_REMEDY = (
    "Install bubblewrap 0.8 or later (Debian: apt-get install bubblewrap) on a machine that allows user namespaces, "
    "leave --run_code out, or run the programs unprotected with --sandbox none"
)

# Numbers of forbidden system calls: new processes and namespaces, tracing, mounts, and parts of the kernel that
# namespaces do not separate (keys) or that are known for vulnerabilities (io_uring, bpf).
_DENIED = {
    "x86_64": {"fork": 57, "vfork": 58, "ptrace": 101, "add_key": 248, "request_key": 249, "keyctl": 250,
               "unshare": 272, "perf_event_open": 298, "setns": 308, "process_vm_readv": 310, "process_vm_writev": 311,
               "bpf": 321, "userfaultfd": 323},
    "aarch64": {"unshare": 97, "ptrace": 117, "add_key": 217, "request_key": 218, "keyctl": 219, "perf_event_open": 241,
                "setns": 268, "process_vm_readv": 270, "process_vm_writev": 271, "bpf": 280, "userfaultfd": 282},
}  # fmt: skip
_DENIED_EVERYWHERE = {
    "io_uring_setup": 425, "io_uring_enter": 426, "io_uring_register": 427, "open_tree": 428, "move_mount": 429,
    "fsopen": 430, "fsconfig": 431, "fsmount": 432, "fspick": 433, "pidfd_getfd": 438, "mount_setattr": 442,
}  # fmt: skip
_ARCHITECTURE = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
_CLONE = {"x86_64": 56, "aarch64": 220}
_CLONE3, _CLONE_THREAD = 435, 0x10000


def program_in(text: str, *, cut: bool = False) -> str:
    """The program in an answer, thoughts left out.

    It is the last fenced block of Python that defines a function or class, else the last one of Python, else the last
    without a language, else the whole answer.

    Args:
        cut: the answer was cut off, so that only a block that is closed counts.
    """
    text = without_thoughts(text).replace("\r\n", "\n")
    blocks = [block for block in _FENCED.finditer(text) if block[3] or (block[3] == "" and not cut)]
    named = [((block[1].split() or [""])[0].lower(), block[2]) for block in blocks]
    of_python = [content for language, content in named if language in _PYTHON_NAMES]
    defining = [content for content in of_python if _DEFINES.search(content)]
    unnamed = [content for language, content in named if not language]
    return next((found[-1] for found in (defining, of_python, unnamed) if found), "" if cut else text)


def check_sandbox(sandbox: Sandbox) -> None:
    """Raise an SRDEError, with what is missing and the remedy, if this sandbox does not work here."""
    if sandbox == "none":
        return
    if shutil.which("bwrap") is None:
        raise SRDEError(f"run_code: the program 'bwrap' is missing. {_REMEDY}.")
    if platform.machine() not in _ARCHITECTURE:
        known = ", ".join(_ARCHITECTURE)
        raise SRDEError(f"run_code: no system call filter for {platform.machine()}, only for {known}. {_REMEDY}.")
    with _system_call_filter() as descriptor:
        tried = subprocess.run(
            [*_bubblewrap(descriptor), "-c", ""],
            pass_fds=[descriptor],
            env={},
            stdin=subprocess.DEVNULL,
            capture_output=True,
        )
    if tried.returncode:
        reason = " ".join(tried.stderr.decode(errors="replace").split()) or f"exit status {tried.returncode}"
        raise SRDEError(f"run_code: the sandbox does not start here ({reason}). {_REMEDY}.")


def passes_tests(program: str, tests: str, sandbox: Sandbox = "bubblewrap") -> bool:
    """Whether `tests` run to their end with the names that `program` defines, all within the limits.

    Program and tests are separate processes, each in its own sandbox, see `run_limited`.

    Raises:
        SRDEError: the sandbox did not start.
    """
    with ExitStack() as stack:
        of_program, of_tests = (stack.enter_context(end) for end in socket.socketpair())
        read, write = os.pipe2(os.O_CLOEXEC)
        verdict, report = stack.enter_context(open(read, "rb", 0)), stack.enter_context(open(write, "wb", 0))
        stack.enter_context(_process("program", program, sandbox, [of_program.fileno()]))
        judge = stack.enter_context(_process("tests", tests, sandbox, [of_tests.fileno(), report.fileno()]))
        # Only the processes hold their ends now, so each sees when the other ends.
        for end in (of_program, of_tests, report):
            end.close()
        try:
            judge.wait(WALL_SECONDS)
        except subprocess.TimeoutExpired:
            return False
        os.set_blocking(verdict.fileno(), False)
        said = verdict.read(len(run_limited.READY + run_limited.PASSED) + 1) or b""
        if not said.startswith(run_limited.READY):
            raise SRDEError(f"run_code: the sandbox did not start (exit status {judge.returncode}). {_REMEDY}.")
        return said == run_limited.READY + run_limited.PASSED


@contextmanager
def _process(role: str, source: str, sandbox: Sandbox, descriptors: list[int]) -> Iterator[subprocess.Popen[bytes]]:
    """A context with a process of `run_limited` and its source; at its end, nothing of the process is left."""
    link, *report = map(str, descriptors)
    arguments = [role, link, str(CPU_SECONDS), str(MEMORY_BYTES), str(FILE_BYTES), _LIBRARIES, *report]
    with ExitStack() as stack:
        if sandbox == "bubblewrap":
            descriptors = [*descriptors, stack.enter_context(_system_call_filter())]
            command, folder = [*_bubblewrap(descriptors[-1]), _HARNESS], "/"
        else:
            command, folder = [*_PYTHON, str(Path(run_limited.__file__))], stack.enter_context(_empty_folder())
        process = subprocess.Popen(
            [*command, *arguments],
            pass_fds=descriptors,
            cwd=folder,
            env={},
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        stack.callback(_kill, process)
        assert process.stdin is not None
        # If it has not started, there will be no verdict.
        with suppress(BrokenPipeError), process.stdin:
            process.stdin.write(source.encode(errors="replace"))
        yield process


def _kill(process: subprocess.Popen[bytes]) -> None:
    """End a process and its group. With bwrap its process namespace ends as well, with everything that it started."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


@contextmanager
def _empty_folder() -> Iterator[str]:
    folder = tempfile.mkdtemp(prefix="srde-code-")
    try:
        yield folder
    finally:
        # It can handle folders that are nested thousands deep.
        subprocess.run(["rm", "-rf", "--", folder], stderr=subprocess.DEVNULL)


def _python() -> list[str]:
    """The command of this interpreter by its real path, without the user's settings."""
    executable = Path(sys.executable)
    return [str(executable.parent.resolve() / executable.name), "-I", "-S", "-B"]


_PYTHON = _python()
_LIBRARIES = os.path.realpath(sysconfig.get_path("purelib"))


def _bubblewrap(system_call_filter: int) -> list[str]:
    """The command that runs this Python in a sandbox; append its arguments."""
    readable = [*_READABLE, os.path.realpath(sys.prefix), os.path.realpath(sys.base_prefix)]
    return [
        *(
            shutil.which("bwrap") or "bwrap",
            "--unshare-all",
            "--unshare-user",
            "--die-with-parent",
            "--new-session",
            "--clearenv",
        ),
        *("--uid", "65534", "--gid", "65534", "--hostname", "sandbox", "--cap-drop", "ALL"),
        # First, since Python itself may be under /tmp.
        *("--size", str(ALL_FILES_BYTES), "--tmpfs", "/tmp"),
        *(part for path in readable for part in ("--ro-bind-try", path, path)),
        *("--ro-bind", str(Path(run_limited.__file__)), _HARNESS, "--dev", "/dev"),
        *("--remount-ro", "/dev", "--remount-ro", "/"),
        *("--chdir", "/tmp", "--seccomp", str(system_call_filter), "--", *_PYTHON),
    ]


@contextmanager
def _system_call_filter() -> Iterator[int]:
    """A descriptor with a seccomp program that allows one process, which may have threads."""
    load, equal, at_least, any_bit, answer = 0x20, 0x15, 0x35, 0x45, 0x06
    allow, kill, no_permission, not_there = 0x7FFF0000, 0x80000000, 0x50000 | errno.EPERM, 0x50000 | errno.ENOSYS
    machine = platform.machine()
    steps = [(load, 0, 0, 4), (equal, 1, 0, _ARCHITECTURE[machine]), (answer, 0, 0, kill), (load, 0, 0, 0)]
    if machine == "x86_64":  # the same calls under other numbers
        steps += [(at_least, 0, 1, 0x40000000), (answer, 0, 0, kill)]
    for number in (_DENIED[machine] | _DENIED_EVERYWHERE).values():
        steps += [(equal, 0, 1, number), (answer, 0, 0, no_permission)]
    # Its flags are in memory, which a filter cannot read. Without it the C library uses clone.
    steps += [(equal, 0, 1, _CLONE3), (answer, 0, 0, not_there), (equal, 0, 3, _CLONE[machine])]
    steps += [(load, 0, 0, 16), (any_bit, 1, 0, _CLONE_THREAD), (answer, 0, 0, no_permission), (answer, 0, 0, allow)]
    with tempfile.TemporaryFile() as file:
        file.write(b"".join(struct.pack("=HBBI", *step) for step in steps))
        file.seek(0)
        yield file.fileno()
