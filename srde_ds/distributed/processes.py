"""Processes: who takes part, on which device, and the few collectives that the trainer needs."""

from __future__ import annotations

import datetime
import logging
import os
import socket
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from srde_ds.errors import SRDEError
from srde_ds.utils.launcher import launched_rank as launched_rank

if not torch.cuda.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # must be set before deepspeed is imported

import deepspeed as deepspeed

Result = TypeVar("Result")


@dataclass(frozen=True)
class Topology:
    """This process among the others."""

    rank: int
    world_size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        return self.rank == 0


def adopt_launcher() -> None:
    """Put what the launcher says of the processes into torch's environment variables, if it has not done so itself."""
    if "RANK" in os.environ:
        return
    if "OMPI_COMM_WORLD_SIZE" in os.environ:
        deepspeed.comm.comm.mpi_discovery(verbose=False)
    else:
        alone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
        os.environ.update(alone, MASTER_PORT=str(_free_port()))


def start_processes(timeout_seconds: float) -> Topology:
    """Join the process group: as the launcher's environment says, or alone when there is no launcher.

    The timeout also bounds every later collective, so that a lost rank ends the run instead of hanging it.
    """
    limit = datetime.timedelta(seconds=timeout_seconds)
    # A line for each collective at its first use, about names that torch has deprecated and deepspeed still calls.
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed.c10d_logger")
    deepspeed.utils.logger.setLevel(logging.WARNING)
    # The shared-memory collectives of DeepSpeed's CPU backend would be compiled for 80 s at this point.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    adopt_launcher()
    deepspeed.init_distributed(timeout=limit, verbose=False)
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    if torch.cuda.is_available():
        if local_rank >= torch.cuda.device_count():
            raise SRDEError(
                f"local rank {local_rank}: this host has {torch.cuda.device_count()} GPUs. Start one process a GPU."
            )
        torch.cuda.set_device(local_rank)
        device = torch.device("cuda", local_rank)
    else:
        device = torch.device("cpu")
    # DeepSpeed 0.19.8 makes its groups with torch's default timeout: half an hour on gloo, ten minutes on NCCL, also
    # for connecting, so that a rank killed between two groups left its partner waiting.
    deepspeed.comm.comm.cdb.new_group = lambda ranks: dist.new_group(ranks, timeout=limit)
    return Topology(dist.get_rank(), dist.get_world_size(), device)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def barrier() -> None:
    dist.barrier()


def all_reduce_sum(tensor: torch.Tensor) -> torch.Tensor:
    """Sum over all ranks, in place."""
    dist.all_reduce(tensor)
    return tensor


def all_reduce_max(value: int, device: torch.device) -> int:
    """Largest value of all ranks."""
    tensor = torch.tensor(value, dtype=torch.int64, device=device)
    dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
    return int(tensor)


def broadcast_from_main(tensor: torch.Tensor) -> None:
    """Give every rank rank 0's values, in place."""
    dist.broadcast(tensor, src=0)


def gather_objects(value: Any) -> list[Any]:
    """Every rank's value, by rank; pickled, so for small ones."""
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def check_same(facts: dict[str, Any], topology: Topology) -> None:
    """Refuse ranks that differ in what must be the same on all of them.

    Raises:
        SRDEError: on every rank, naming the first fact that differs, its two values and their ranks.
    """
    everywhere = gather_objects((socket.gethostname(), facts))
    host, expected = everywhere[0]
    for rank, (other_host, found) in enumerate(everywhere):
        for name, value in expected.items():
            if found.get(name) != value:
                raise SRDEError(
                    f"{name} differs: {found.get(name)} on rank {rank} (host {other_host}), {value} on rank 0 (host "
                    f"{host}). Make it the same on all hosts."
                )


def on_main_rank(function: Callable[[], Result], topology: Topology) -> Result:
    """Run on rank 0; every rank gets its result, or raises its SRDEError."""
    box: list[Any] = [None, None]
    if topology.is_main:
        try:
            box[0] = function()
        except SRDEError as error:
            box[1] = str(error)
    dist.broadcast_object_list(box, src=0, device=topology.device)
    if box[1] is not None:
        raise SRDEError(box[1])
    result: Result = box[0]
    return result
