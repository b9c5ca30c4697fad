"""What the launcher told this process, readable before any process group exists."""

from __future__ import annotations

import os


def launched_rank() -> int:
    return _number("RANK", "OMPI_COMM_WORLD_RANK", default=0)


def launched_world_size() -> int:
    return _number("WORLD_SIZE", "OMPI_COMM_WORLD_SIZE", default=1)


def _number(*names: str, default: int) -> int:
    """The first variable that is set: deepspeed's launcher (and torchrun), else Open MPI's."""
    return next((int(os.environ[name]) for name in names if name in os.environ), default)
