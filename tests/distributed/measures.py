"""What a process really moves and keeps: bytes of collectives, of saved activations, of all that is allocated."""

from __future__ import annotations

import gc
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch._C._distributed_c10d import ProcessGroup
from torch.profiler import ProfilerActivity, profile, record_function

from srde_ds.model.policy import RoutingPolicy
from tests.distributed.training_helpers import train_here

Entry = tuple[str, int, str]
"""operation, size of its group, dtype"""


def _bytes(tensors: Any) -> int:
    if isinstance(tensors, Tensor):
        return tensors.numel() * tensors.element_size()
    return sum(map(_bytes, tensors))


def _gathered(group: ProcessGroup, output: Tensor, given: Tensor, *_: Any) -> float:
    return _bytes(output) - _bytes(given)


def _scattered(group: ProcessGroup, output: Tensor, given: Tensor, *_: Any) -> float:
    return _bytes(given) - _bytes(output)


def _reduced(group: ProcessGroup, tensors: list[Tensor], *_: Any) -> float:
    return 2 * _bytes(tensors) * (group.size() - 1) / group.size()


def _exchanged(group: ProcessGroup, output: Tensor, given: Tensor, received: list[int], *_: Any) -> float:
    if not received:
        return _bytes(output) * (group.size() - 1) / group.size()
    rows = sum(received) - received[group.rank()]
    return rows * output[:1].numel() * output.element_size()


RECEIVED: dict[str, Callable[..., float]] = {
    "all_gather_single": _gathered,
    "reduce_scatter_single": _scattered,
    "allreduce": _reduced,
    "all_to_all_single": _exchanged,
}
# Of these none may occur: the cost model does not know them.
OTHERS = (
    "_allgather_base", "_reduce_scatter_base", "all_gather_single_coalesced", "allgather", "allgather_coalesced",
    "allgather_into_tensor_coalesced", "allreduce_coalesced", "alltoall", "alltoall_base", "broadcast", "gather",
    "reduce", "reduce_scatter", "reduce_scatter_single_coalesced", "reduce_scatter_tensor_coalesced", "scatter",
    "send", "recv",
)  # fmt: skip


@dataclass
class Received:
    """Bytes that this rank gets from others; an all-reduce counts as reduce-scatter and all-gather."""

    counting: bool = True
    bytes: Counter[Entry] = field(default_factory=Counter)


@contextmanager
def count_collectives() -> Iterator[Received]:
    """Count all collectives of this process, DeepSpeed's too: they all end in methods of a ProcessGroup."""
    received = Received()

    def counted(name: str, original: Callable[..., Any]) -> Callable[..., Any]:
        def call(group: ProcessGroup, first: Any, *rest: Any, **options: Any) -> Any:
            if received.counting:
                assert name in RECEIVED, f"{name} is not in the cost model"
                dtype = first.dtype if isinstance(first, Tensor) else first[0].dtype
                received.bytes[name, group.size(), str(dtype)] += int(RECEIVED[name](group, first, *rest))
            return original(group, first, *rest, **options)

        return call

    with ExitStack() as stack:
        for name in (*RECEIVED, *OTHERS):
            original = getattr(ProcessGroup, name)
            stack.enter_context(patch.object(ProcessGroup, name, counted(name, original)))
        yield received


@contextmanager
def count_saved(parameters: list[Tensor]) -> Iterator[Callable[[], int]]:
    """Bytes of the storages that autograd saves inside, those of parameters left out."""
    kept: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage().data_ptr()
        # Looked up each time: ZeRO-3 gives a parameter another storage when it gathers it.
        if storage not in {parameter.untyped_storage().data_ptr() for parameter in parameters}:
            kept.setdefault(storage, tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield lambda: sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


@dataclass
class Allocated:
    """Bytes of tensors on the CPU: at the start, and the most within each part that `mark` named.

    `labelled` holds of each micro-batch the share of positions with a label in any row.
    """

    start: int
    peaks: dict[str, int] = field(default_factory=dict)
    labelled: list[float] = field(default_factory=list)


MARK = "measures: "


def mark(part: str) -> None:
    """Begin another part of what `allocated` watches."""
    with record_function(MARK + part):
        pass


@contextmanager
def allocated() -> Iterator[Allocated]:
    """Watch torch's CPU allocator, kernels' temporary buffers included."""
    gc.collect()
    tensors = [item for item in gc.get_objects() if isinstance(item, Tensor)]
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
    found = Allocated(sum(storages.values()))
    del tensors
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        yield found
    events = sorted(profiler.profiler.kineto_results.events(), key=lambda event: event.start_ns())
    live, part = found.start, "start"
    for event in events:
        if event.name().startswith(MARK):
            part = event.name().removeprefix(MARK)
        elif event.name() == "[memory]":
            live += event.nbytes()
            found.peaks[part] = max(found.peaks.get(part, 0), live)


Measure = Callable[[], AbstractContextManager[Any]]


def train_measuring(flags: dict[str, Any], number: int, measure: Measure) -> Any:
    """Train here, with step `number` (from 1) inside `measure()`; what that yields. Its parts are marked."""
    from srde_ds.distributed.deepspeed_internals import deepspeed
    from srde_ds.distributed.engine import Engine
    from srde_ds.training import trainer
    from srde_ds.training.step import optimizer_step

    step, forward, update = optimizer_step, Engine.forward, deepspeed.DeepSpeedEngine.step
    steps: list[int] = []
    results: list[Any] = []

    def measured_step(*args: Any) -> Any:
        steps.append(len(steps) + 1)
        with measure() if steps[-1] == number else nullcontext() as result:
            results.append(result)
            return step(*args)

    def marked_forward(engine: Engine, batch: dict[str, Tensor], *policy: RoutingPolicy) -> Any:
        mark("forward")
        if results and isinstance(results[-1], Allocated):
            results[-1].labelled.append(float((batch["labels"][:, 1:] != -100).any(0).sum()) / batch["labels"].shape[1])
        output = forward(engine, batch, *policy)
        mark("backward")
        return output

    def marked_update(engine: Any) -> Any:
        mark("update")
        return update(engine)

    with ExitStack() as stack:
        stack.enter_context(patch.object(trainer, "optimizer_step", measured_step))
        stack.enter_context(patch.object(Engine, "forward", marked_forward))
        stack.enter_context(patch.object(deepspeed.DeepSpeedEngine, "step", marked_update))
        error = train_here(flags)
    assert error is None, error
    return results[number - 1]
