"""The processes of a run: which ones take part, on which device, and the few collectives that the trainer needs."""

from __future__ import annotations

import datetime
import logging
import os
import socket
import warnings
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from srde_ds.distributed import deepspeed_internals as internals
from srde_ds.distributed.gathering import gather_json
from srde_ds.errors import LostContact, SRDEError
from srde_ds.utils.launcher import launched_rank, launched_world_size


@dataclass(frozen=True)
class Topology:
    """This process and its place among the others; implements `together.Ranks`."""

    rank: int
    world_size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0."""
        return self.rank == 0

    def all_reduce_max(self, value: int) -> int:
        """The largest of the ranks' integers; a collective."""
        tensor = torch.tensor(value, dtype=torch.int64, device=self.device)
        dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
        return int(tensor)

    def gather(self, value: Any) -> list[Any]:
        """Every rank's value, by rank; a collective. It travels as JSON and should be small."""
        return gather_json(value, self.device)


class DelayedMax:
    """The largest of the ranks' integers, without waiting: each call returns the result of the previous one."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._result = torch.zeros((), dtype=torch.int64)
        self._copied: torch.cuda.Event | None = None

    def __call__(self, value: int) -> int:
        """The largest of the integers that the ranks passed to the previous call; 0 at the first call. A collective.

        If the GPU lags behind the program, this waits only until the GPU has reached the previous call.
        """
        if self._copied is not None:
            self._copied.synchronize()
        before = int(self._result)
        largest = torch.full((), value, dtype=torch.int64, device=self._device)
        dist.all_reduce(largest, op=dist.ReduceOp.MAX)
        self._result = torch.empty((), dtype=torch.int64, pin_memory=largest.is_cuda).copy_(largest, non_blocking=True)
        if largest.is_cuda:
            self._copied = torch.cuda.Event()
            self._copied.record()
        return before


def adopt_launcher() -> None:
    """Copy what the launcher says about the processes into torch's environment variables, unless they are set.

    Raises:
        SRDEError: the variables contradict each other, so they come from another program, or the launcher is one that
            does not tell the processes their ranks.
    """
    if "RANK" in os.environ:
        missing = [name for name in ("WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
        if missing or launched_rank() >= launched_world_size():
            fault = f"{missing[0]} is not" if missing else f"WORLD_SIZE={launched_world_size()} is not above it"
            raise SRDEError(
                f"RANK={os.environ['RANK']} is set in the environment, but {fault}: no launcher has set it. Start with "
                "deepspeed, torchrun, mpirun or Slurm, or unset RANK to train on one process."
            )
        if launched_world_size() == 1:
            os.environ.setdefault("LOCAL_RANK", "0")
        if "LOCAL_RANK" not in os.environ:
            raise SRDEError(
                f"LOCAL_RANK is not set in the environment, but RANK={os.environ['RANK']} is: each process takes the "
                "GPU with its LOCAL_RANK. Set it to the process's number on its host, 0 with one process on each."
            )
        return
    if "OMPI_COMM_WORLD_SIZE" in os.environ:
        size = launched_world_size()
        stray = f"OMPI_COMM_WORLD_SIZE={size} is set in the environment, "
        remedy = "Start with mpirun, or unset the variables OMPI_* to train on one process."
        if find_spec("mpi4py") is None:
            raise SRDEError(f"{stray}but package 'mpi4py' is missing: pip install mpi4py. {remedy}")
        internals.adopt_mpi_launcher()
        if int(os.environ["WORLD_SIZE"]) != size:
            raise SRDEError(f"{stray}but MPI has {os.environ['WORLD_SIZE']} processes. {remedy}")
    else:
        of_several = {"WORLD_SIZE": launched_world_size() > 1, "OMPI_COMM_WORLD_RANK": launched_rank() > 0}
        # srun and the mpiexec of MPICH and Intel, whose processes would be as many runs in one folder.
        of_several |= {name: (os.environ.get(name) or "1") != "1" for name in ("SLURM_STEP_NUM_TASKS", "PMI_SIZE")}
        for name in (name for name, stray in of_several.items() if stray):
            raise SRDEError(
                f"{name}={os.environ[name]} is set in the environment, but RANK is not: this process does not know its "
                "place. Start with deepspeed, torchrun, Open MPI's mpirun or, under srun, cluster/slurm/task.sh, or "
                f"unset {name} to train on one process."
            )
        alone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
        os.environ.update(alone, MASTER_PORT=str(_free_port()))


def start_processes(timeout_seconds: float) -> Topology:
    """Join the process group that the launcher's environment describes, or form one alone if there is no launcher.

    The timeout also bounds every later collective, so that a lost rank ends the run instead of hanging it.
    """
    limit = datetime.timedelta(seconds=timeout_seconds)
    # Without it each collective warns about names that torch has deprecated and deepspeed still calls.
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed.c10d_logger")
    internals.deepspeed.utils.logger.setLevel(logging.WARNING)
    internals.avoid_jit_builds()
    internals.import_muon_uncompiled()
    adopt_launcher()
    device = _own_device()  # before torch refuses a number out of range when it joins, without a remedy
    try:
        # Its own look for MPI would make every process rank 0 of 1.
        internals.deepspeed.init_distributed(timeout=limit, verbose=False, auto_mpi_discovery=False)
    except dist.DistNetworkError as error:
        port, reason = os.environ["MASTER_PORT"], str(error).splitlines()[0]
        raise LostContact(
            f"port {port} cannot be opened or reached ({reason}). Another run may use it: give this one another port "
            "(--master_port of deepspeed and torchrun)."
        ) from None
    internals.limit_new_groups(limit)
    return Topology(dist.get_rank(), dist.get_world_size(), device)


def _own_device() -> torch.device:
    """The GPU with the number of this process on its host, made the current one; without GPUs the CPU."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    if local_rank >= torch.cuda.device_count():
        visible = os.environ.get("CUDA_VISIBLE_DEVICES", "not set")
        raise SRDEError(
            f"local rank {local_rank}: this process sees {torch.cuda.device_count()} of its host's GPUs "
            f"(CUDA_VISIBLE_DEVICES={visible}), and takes the one with the number of its local rank. Start at "
            "most one process per GPU, and let each see all of them (Slurm: --gpus-per-node, not --gpus-per-task)."
        )
    torch.cuda.set_device(local_rank)
    return torch.device("cuda", local_rank)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def all_reduce_sum(tensor: torch.Tensor) -> torch.Tensor:
    """Sum over all ranks, in place."""
    dist.all_reduce(tensor)
    return tensor


def broadcast_from_main(tensor: torch.Tensor) -> None:
    """Give every rank the values of rank 0, in place."""
    dist.broadcast(tensor, src=0)


def gather_to_main(own: Tensor, counts: list[int], topology: Topology) -> Tensor | None:
    """`[sum(counts), D]` on rank 0: every rank's vectors, rank by rank; None on the other ranks.

    Args:
        own: `[counts[rank], D]`, on any device.
    """
    padded = torch.zeros(max(counts), own.shape[1], dtype=own.dtype, device=topology.device)
    padded[: len(own)] = own
    parts = [torch.empty_like(padded) for _ in counts] if topology.is_main else None
    dist.gather(padded, parts, dst=0)
    return None if parts is None else torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)])


def check_same(values: dict[str, Any], topology: Topology) -> None:
    """Refuse ranks that differ in what must be the same on all of them.

    Raises:
        SRDEError: on every rank, naming the first value that differs, both versions, and the ranks that have them.
    """
    everywhere = topology.gather([socket.gethostname(), values])
    host, expected = everywhere[0]
    for rank, (other_host, found) in enumerate(everywhere):
        for name, value in expected.items():
            if found.get(name) != value:
                raise SRDEError(
                    f"{name} differs: {found.get(name)} on rank {rank} (host {other_host}), {value} on rank 0 (host "
                    f"{host}). Make it the same on all hosts."
                )
