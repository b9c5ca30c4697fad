"""What the launcher says about this process, readable before any process group exists."""

from __future__ import annotations

import os
import time

from srde_ds.errors import SRDEError

LET_GO_SECONDS = 0.5


def launched_rank() -> int:
    """The rank of this process; 0 without a launcher."""
    return _number("RANK", "OMPI_COMM_WORLD_RANK", default=0)


def launched_world_size() -> int:
    """The number of processes; 1 without a launcher."""
    return _number("WORLD_SIZE", "OMPI_COMM_WORLD_SIZE", default=1)


def launched_on_host() -> int:
    """The number of the run's processes on this host; 1 without a launcher."""
    # Of torchrun and cluster/slurm/task.sh, of deepspeed, and of Open MPI.
    names = "LOCAL_WORLD_SIZE", "LOCAL_SIZE", "OMPI_COMM_WORLD_LOCAL_SIZE"
    return min(_number(*names, default=1), launched_world_size())


def stop_processes() -> None:
    """Leave the process group, if there is one, so that the interpreter can end."""
    import torch.distributed as dist

    if dist.is_initialized():
        dist.destroy_process_group()
        # To release the last collective's tensor, a thread of gloo needs the interpreter. If that ends first, torch
        # 2.13 aborts the process: "terminate called without an active exception".
        time.sleep(LET_GO_SECONDS)


def _number(*names: str, default: int) -> int:
    """The value of the first variable that is set.

    Raises:
        SRDEError: it is not a number.
    """
    for name in names:
        if name in os.environ:
            value = os.environ[name]
            if not (value.isascii() and value.isdigit()):
                raise SRDEError(f"{name}={value!r} in the environment: not a number. Unset it: `unset {name}`.")
            return int(value)
    return default
