"""Run one Python program under limits. A program of its own, which `evaluation.sandbox` starts; standard library only.

python -I run_limited.py PROGRAM CPU_SECONDS MEMORY_BYTES FILE_BYTES PROCESSES
"""

from __future__ import annotations

import ctypes
import os
import resource
import runpy
import struct
import sys

# linux/landlock.h; these syscalls have the same numbers on all architectures.
_CREATE_RULESET, _ADD_RULE, _RESTRICT_SELF = 444, 445, 446
_VERSION, _PATH_BENEATH = 1, 1
_NO_NEW_PRIVILEGES = 38
_WRITE_FILE, _TRUNCATE = 1 << 1, 1 << 14
_CHANGE_FOLDERS = sum(1 << bit for bit in range(4, 13))
_TCP = 0b11


def landlock_version() -> int:
    """Of the kernel's interface to Landlock; 0 where there is none."""
    if sys.platform != "linux":
        return 0
    return max(0, int(ctypes.CDLL(None).syscall(_CREATE_RULESET, None, ctypes.c_size_t(0), _VERSION)))


def write_only_in(folder: str) -> None:
    """From now on this process and its children write, make and remove files in `folder` alone; TCP is denied, too,
    from version 4 on. Nothing happens where the kernel has no Landlock.

    Raises:
        OSError: the kernel has it and refuses.
    """
    version = landlock_version()
    if not version:
        return
    libc = ctypes.CDLL(None, use_errno=True)
    write_file = _WRITE_FILE | (_TRUNCATE if version >= 3 else 0)
    everything = write_file | _CHANGE_FOLDERS
    handled = struct.pack("=QQ", everything, _TCP) if version >= 4 else struct.pack("=Q", everything)
    ruleset = _checked(libc.syscall(_CREATE_RULESET, handled, ctypes.c_size_t(len(handled)), 0))
    for path, allowed in ((folder, everything), ("/dev/null", write_file)):
        descriptor = os.open(path, os.O_PATH)
        rule = struct.pack("=Qi", allowed, descriptor)
        _checked(libc.syscall(_ADD_RULE, ruleset, _PATH_BENEATH, rule, 0))
        os.close(descriptor)
    _checked(libc.prctl(_NO_NEW_PRIVILEGES, 1, 0, 0, 0))
    _checked(libc.syscall(_RESTRICT_SELF, ruleset, 0))
    os.close(ruleset)


def _checked(result: int) -> int:
    if result < 0:
        raise OSError(ctypes.get_errno(), "landlock")
    return result


def main() -> None:
    program, *limits = sys.argv[1:]
    cpu_seconds, memory, file_size, processes = map(int, limits)
    for number, value in (
        (resource.RLIMIT_CPU, cpu_seconds),
        (resource.RLIMIT_AS, memory),
        (resource.RLIMIT_FSIZE, file_size),
        (resource.RLIMIT_NPROC, processes),
        (resource.RLIMIT_NOFILE, 64),
        (resource.RLIMIT_CORE, 0),
    ):
        resource.setrlimit(number, (value, value))
    write_only_in(os.getcwd())
    sys.argv = [program]
    # Not as __main__: what a program does when called by hand, such as asking for input, is not what is tested.
    runpy.run_path(program, run_name="program")


if __name__ == "__main__":
    main()
