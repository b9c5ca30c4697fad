"""Simulates when ZeRO-3 gathers and releases weights in a micro-step (deepspeed 0.19.8).

DeepSpeed fetches a module's weights before its forward and before its backward, and releases them after each unless
they are used again within `stage3_max_reuse_distance` values of its recorded trace. Three things cost more than one
might expect, and are modelled:

* The deltas' module has no input with a gradient, so its backward never "ends": its gathered weights stay until the
  whole backward is over. The same holds for the embedding and for what lies before the first trainable.
* With gradient checkpointing the embedding's output requires a gradient, so its weight is gathered in the backward.
* Weights up to `stage3_param_persistence_threshold` values stay whole, but are gathered anew after each update.

The trace is that of a settled run. The first two micro-steps, and those after a forward outside the loop (held-out
loss), have none: they gather every module in the forward and again in the backward.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate
from typing import Any

from srde_ds.config import Config
from srde_ds.model.base_shape import BaseShape, LayerShape
from srde_ds.planner.trainables import layer_trainables

# DeepSpeed's own defaults of its `stage3_` options.
ZERO_DEFAULTS = {
    "max_live_parameters": 1_000_000_000,
    "max_reuse_distance": 1_000_000_000,
    "prefetch_bucket_size": 50_000_000,
    "param_persistence_threshold": 100_000,
}


@dataclass(frozen=True, eq=False)
class Weight:
    """A parameter.

    Attributes:
        kind: "base" or "trainables".
        ranks, stride: processes that hold its parts, and the distance between their numbers.
    """

    kind: str
    values: int
    ranks: int
    stride: int
    persistent: bool

    @property
    def padded(self) -> int:
        """Number of values, padded to a multiple of the ranks."""
        return math.ceil(self.values / self.ranks) * self.ranks

    @property
    def gathered(self) -> int:
        """Values that a gather allocates: a part that is the whole is used where it lies."""
        return self.padded if self.ranks > 1 else 0


@dataclass(frozen=True)
class Use:
    """A module's forward or backward.

    Attributes:
        moment: "forward", or the number of the layer whose backward it belongs to; the head counts as one more layer,
            the embedding as -1.
        releases: whether DeepSpeed sees its end.
    """

    weights: tuple[Weight, ...]
    moment: int | str = "forward"
    releases: bool = True


@dataclass
class Schedule:
    """What a micro-step gathers.

    Attributes:
        weights: all of the model.
        gathers: how often each weight that does not persist is gathered.
        live: most gathered values at each moment, by kind, persistent ones left out.
    """

    weights: list[Weight]
    gathers: Counter[Weight] = field(default_factory=Counter)
    live: dict[int | str, Counter[str]] = field(default_factory=dict)


def gather_schedule(config: Config, shape: BaseShape, world_size: int, zero: dict[str, Any]) -> Schedule:
    """Follow one micro-step.

    Args:
        zero: `zero_optimization` of the derived DeepSpeed configuration.
    """
    limits = {key: int(zero.get(f"stage3_{key}", default)) for key, default in ZERO_DEFAULTS.items()}
    trace, weights = _trace(config, shape, world_size, limits["param_persistence_threshold"])
    return _follow(trace, weights, limits)


def _trace(config: Config, shape: BaseShape, world_size: int, threshold: int) -> tuple[list[Use], list[Weight]]:
    """The uses of a micro-step in the order of transformers' decoders, and all weights.

    Modules without weights count too: DeepSpeed prefetches a bucket at each.
    """
    weights: list[Weight] = []

    def weight(kind: str, values: int, ranks: int = world_size, stride: int = 1) -> Weight:
        weights.append(Weight(kind, values, ranks, stride, values <= threshold))
        return weights[-1]

    checkpointing = config.model.gradient_checkpointing
    empty = Use(())  # a module without weights of its own: a container, an activation

    def module(*values: int) -> Use:
        return Use(tuple(weight("base", n) for n in values))

    def layer_modules(layer: LayerShape) -> tuple[list[Use], list[Use], Use]:
        """A forward in three parts: up to the base's gate and up values, the experts, the last projection."""
        norm, *other_norms = map(module, layer.norms)
        attention = [empty, *(module(*own) for own in layer.attention)]
        before = [empty, norm, *attention, *other_norms, empty, module(layer.matrix), module(layer.matrix), empty]
        trainables = layer_trainables(config, layer, world_size)
        trained = {t.kind: weight("trainables", t.values, t.ranks, t.stride) for t in trainables}
        router = Use((trained.pop("router.weight"),))
        return before, [router, Use(tuple(trained.values()))], module(layer.matrix)

    embedding = module(shape.embedding)
    layers = [layer_modules(layer) for layer in shape.layers]
    last = [*map(module, shape.last), module(shape.head) if shape.head else embedding]
    trace = [empty, empty, empty, embedding, empty]
    for before, experts, down in layers:
        trace += [*before, *experts, down]
    trace += last
    trace += [replace(use, moment=len(layers)) for use in [empty, empty, *reversed(last), empty]]
    for number, (before, experts, down) in reversed(list(enumerate(layers))):
        router, deltas = experts
        # The layer and its block, then the block's modules.
        backward = [empty, down, replace(deltas, releases=False), router]
        if number > 0 or checkpointing:  # else nothing before the first experts needs a gradient
            backward += reversed(before[1:])
        uses = [empty, *([*before[1:], *experts, down] if checkpointing else []), *backward]
        trace += [replace(use, moment=number) for use in uses]
    if checkpointing:
        trace.append(replace(embedding, moment=-1, releases=False))
    return trace, weights


def _follow(trace: Sequence[Use], weights: list[Weight], limits: dict[str, int]) -> Schedule:
    """Fetch, prefetch and release as DeepSpeed does with a complete trace."""
    schedule = Schedule(weights)
    queue = [(weight, step) for step, use in enumerate(trace) for weight in use.weights]
    passed = [0, *accumulate(sum(w.values for w in use.weights) for use in trace)]  # values of all uses before a step
    uses: dict[Weight, list[int]] = {}
    for weight, step in queue:
        uses.setdefault(weight, []).append(step)
    available = {weight for weight in weights if weight.persistent}
    live: Counter[str] = Counter()
    promised: dict[Weight, int] = {}  # the last use that a prefetch has seen to
    position = fetched = 0

    def gather(weight: Weight) -> None:
        nonlocal fetched
        available.add(weight)
        fetched += weight.values
        live[weight.kind] += weight.gathered
        schedule.gathers[weight] += 1

    for step, use in enumerate(trace):
        for weight in use.weights:
            if weight not in available:
                gather(weight)
        while position < len(queue) and queue[position][1] <= step:
            promised[queue[position][0]] = step
            position += 1
        room = min(limits["max_live_parameters"] - fetched, limits["prefetch_bucket_size"])
        while position < len(queue) and room > 0:
            weight, promised[weight] = queue[position]
            position += 1
            if weight not in available:
                gather(weight)
                room -= weight.values
        if live.total() > schedule.live.setdefault(use.moment, Counter(live)).total():
            schedule.live[use.moment] = Counter(live)
        for weight in use.weights if use.releases else ():
            again = bisect_right(uses[weight], step)
            distance = passed[uses[weight][again]] - passed[step + 1] if again < len(uses[weight]) else math.inf
            kept = promised.get(weight, -1) > step + 1 or distance < limits["max_reuse_distance"]
            if not weight.persistent and not kept:
                available.discard(weight)
                fetched -= weight.values
                live[weight.kind] -= weight.gathered
    return schedule
