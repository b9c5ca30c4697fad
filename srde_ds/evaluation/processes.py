"""Several processes that share an evaluation. Each has the whole model and a part of the items."""

from __future__ import annotations

import datetime
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from srde_ds.distributed.gathering import gather_json
from srde_ds.errors import LostContact, SRDEError
from srde_ds.utils.launcher import launched_rank, launched_world_size, stop_processes
from srde_ds.utils.together import attempt

# Seconds to meet: all processes are started together.
MEETING = datetime.timedelta(minutes=10)
# Processes wait for the slowest at the end. If one dies, its connections close, which ends the wait at once.
LONGEST_WAIT = datetime.timedelta(days=1)

Result = TypeVar("Result")


@dataclass(frozen=True)
class Processes:
    """This process among those that share the work; implements `together.Ranks`. By default it is alone.

    Attributes:
        group: the processes' group; None: torch's default group.
    """

    rank: int = 0
    world_size: int = 1
    group: dist.ProcessGroup | None = None

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0, which writes."""
        return self.rank == 0

    def share(self, costs: Sequence[int]) -> list[int]:
        """The indices of this process's items. All items are dealt out, the costliest first."""
        return sorted(range(len(costs)), key=lambda index: -costs[index])[self.rank :: self.world_size]

    def all_reduce_max(self, value: int) -> int:
        """The largest of the processes' integers."""
        return max(self.gather(value))

    def gather(self, value: Any) -> list[Any]:
        """Every process's value, by rank, after a trip through JSON.

        Raises:
            LostContact: another process has ended.
        """
        if self.world_size == 1:
            return [value]
        try:
            return gather_json(value, torch.device("cpu"), self.group)
        except RuntimeError:
            raise LostContact("another process has ended early, see its output.") from None

    def own(self, function: Callable[[], Result]) -> Result:
        """The result of `function` in this process, once it has returned in every process.

        Raises:
            SRDEError: in the first process that raised it. The others end silently (SystemExit), so that it is printed
                once.
            LostContact: another process has ended.
        """
        outcome = attempt(function, self)
        failure = outcome.failure
        if failure is not None and failure.rank != self.rank:
            raise SystemExit(2 if failure.foreseen else 1)
        return outcome.own.result()

    def together(self, function: Callable[[], Result]) -> list[Result]:
        """The results of `function` in all processes, by rank, after a trip through JSON; errors as in `own`."""
        return self.gather(self.own(function))


ALONE = Processes()


@contextmanager
def launched_processes() -> Iterator[Processes]:
    """The processes that the launcher started (deepspeed, torchrun, mpirun), each on its own GPU if there are any.

    They communicate by gloo, since results are few and small. An existing group is used and left unchanged.

    Raises:
        SRDEError: there are more processes than GPUs, or the launcher does not say where to meet or which GPU to take.
        LostContact: not all of them have come.
    """
    if dist.is_initialized():
        yield Processes(dist.get_rank(), dist.get_world_size())
        return
    if launched_world_size() == 1:
        yield ALONE
        return
    if "MASTER_ADDR" not in os.environ or "MASTER_PORT" not in os.environ:
        raise SRDEError("MASTER_ADDR and MASTER_PORT are not set by the launcher: set them to where they meet.")
    _take_gpu()
    rank, world_size = launched_rank(), launched_world_size()
    try:
        dist.init_process_group("gloo", rank=rank, world_size=world_size, timeout=MEETING)
    except (dist.DistError, RuntimeError) as error:
        raise LostContact(f"not all of {world_size} processes came within {MEETING}: {error}") from None
    try:
        yield Processes(rank, world_size, dist.new_group(timeout=LONGEST_WAIT))
    finally:
        stop_processes()


def _take_gpu() -> None:
    if not torch.cuda.is_available():
        return
    given = os.environ.get("LOCAL_RANK", os.environ.get("OMPI_COMM_WORLD_LOCAL_RANK"))
    visible = torch.cuda.device_count()
    if given is None and visible > 1:
        raise SRDEError(
            "LOCAL_RANK is not set by the launcher: each process takes the GPU with its LOCAL_RANK. Set it to the "
            "process's number on its host, 0 with one process on each."
        )
    local = int(given or 0)
    if local >= visible:
        raise SRDEError(
            f"local rank {local}: this process sees {visible} of its host's GPUs "
            f"(CUDA_VISIBLE_DEVICES={os.environ.get('CUDA_VISIBLE_DEVICES', 'not set')}). Start one process per GPU, "
            "and let each see all of them."
        )
    torch.cuda.set_device(local)
