"""Simulates when ZeRO-3 gathers and releases weights in a micro-step (deepspeed 0.19.8).

DeepSpeed fetches a module's weights before its forward and before its backward, and releases them afterwards unless
they are used again within `stage3_max_reuse_distance` values of its recorded trace. It treats a decoder layer with its
trainables as one module. Three things cost more than one might expect, and are modelled:

* DeepSpeed does not see the end of a module's backward if the input has no gradient: the gathered weights stay until
    the whole backward is over. That holds for the embedding, and without checkpointing for the first layer.
* With gradient checkpointing the embedding's output requires a gradient, so its weight is gathered in the backward.
* Weights up to `stage3_param_persistence_threshold` values stay whole, but are gathered again after each update.

The trace is that of a steady run. The first two micro-steps, and those after a forward outside the loop (held-out
loss), have no trace: they gather every module in the forward and again in the backward.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate

from srde_ds.distributed.ds_config import prefetch_whole_layers
from srde_ds.distributed.workload import Workload
from srde_ds.model.base_shape import BaseShape, LayerShape
from srde_ds.planner.trainables import layer_trainables

# DeepSpeed's defaults of its `stage3_` options.
ZERO_DEFAULTS = {
    "max_live_parameters": 1_000_000_000,
    "max_reuse_distance": 1_000_000_000,
    "param_persistence_threshold": 100_000,
}


@dataclass(frozen=True, eq=False)
class Weight:
    """A parameter.

    Attributes:
        kind: "base" or "trainables".
        ranks, stride: number of processes that hold its parts, and the distance between their ranks.
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
        """Number of values that a gather allocates: none if the process holds the whole weight."""
        return self.padded if self.ranks > 1 else 0


@dataclass(frozen=True)
class WeightUse:
    """A module's forward or backward, which uses its weights.

    Attributes:
        moment: "forward", or the number of the layer whose backward it belongs to; the head counts as one more layer,
            the embedding as -1.
        releases: whether DeepSpeed sees its end.
        within: for a container, the weights of the modules in it.
        layer: whether this is a decoder layer. When a layer is released, DeepSpeed counts a container as a use of all
            that is in it; when another module is released, it does not see the weights of layers.
    """

    weights: tuple[Weight, ...]
    moment: int | str = "forward"
    releases: bool = True
    within: tuple[Weight, ...] = ()
    layer: bool = False


@dataclass
class GatherSchedule:
    """What a micro-step gathers.

    Attributes:
        weights: all weights that ZeRO holds; a whole base is none of them.
        prefetched: number of values that DeepSpeed prefetches at a time, see `ds_config.prefetch_whole_layers`.
        gathers: how often each weight that does not persist is gathered.
        live: peak number of gathered values at each moment, by kind, without persistent ones.
    """

    weights: list[Weight]
    prefetched: int
    gathers: Counter[Weight] = field(default_factory=Counter)
    live: dict[int | str, Counter[str]] = field(default_factory=dict)


def gather_schedule(work: Workload, shape: BaseShape) -> GatherSchedule:
    """Simulate one micro-step."""
    limits = {key: int(work.zero.get(f"stage3_{key}", default)) for key, default in ZERO_DEFAULTS.items()}
    trace, weights = _trace(work, shape, limits["param_persistence_threshold"])
    layers = {
        (0 if work.whole_base else sum(layer.parameters)) + sum(t.values for t in layer_trainables(work, layer))
        for layer in set(shape.layers)
    }
    sized = {"zero_optimization": dict(work.zero)}
    prefetch_whole_layers(sized, max(layers))
    prefetched = int(sized["zero_optimization"]["stage3_prefetch_bucket_size"])
    return _follow(
        trace, GatherSchedule(weights, prefetched), limits["max_live_parameters"], limits["max_reuse_distance"]
    )


def _trace(work: Workload, shape: BaseShape, threshold: int) -> tuple[list[WeightUse], list[Weight]]:
    """The uses of modules in a micro-step, in the order of transformers' decoders, and all weights that ZeRO holds.

    Modules without weights also count: DeepSpeed prefetches a bucket at each, but nothing inside of a layer.
    """
    weights: list[Weight] = []

    def weight(kind: str, values: int, ranks: int = work.world_size, stride: int = 1) -> Weight:
        weights.append(Weight(kind, values, ranks, stride, values <= threshold))
        return weights[-1]

    checkpointing = work.recomputed == "full"
    empty = WeightUse(())

    def module(*values: int) -> WeightUse:
        return WeightUse(() if work.whole_base else tuple(weight("base", n) for n in values))

    def layer_of(layer: LayerShape) -> WeightUse:
        attention = [n for own in layer.attention for n in own]
        # In the order in which transformers creates them and DeepSpeed prefetches.
        base = module(*attention, *[layer.matrix] * 3, *layer.norms)
        trained = [weight("trainables", t.values, t.ranks, t.stride) for t in layer_trainables(work, layer)]
        return WeightUse((*base.weights, *trained), layer=True)

    embedding = module(shape.embedding)
    layers = list(map(layer_of, shape.layers))
    last = [*map(module, shape.last), module(shape.head) if shape.head else embedding]
    decoder = WeightUse((), within=tuple(w for use in (embedding, *layers, *last[:-1]) for w in use.weights))
    model = WeightUse((), within=tuple(weights))  # with experts, and the base in it
    trace = [model, model, decoder, embedding, empty, *layers, *last]
    trace += [replace(use, moment=len(layers)) for use in [model, model, last[-1], decoder, *reversed(last[:-1])]]
    for number, layer in reversed(list(enumerate(layers))):
        # Without checkpointing the first layer's input needs no gradient, so DeepSpeed does not see its backward's end.
        ends = number > 0 or checkpointing
        again = [replace(layer, moment=number)] if checkpointing else []
        trace += [*again, replace(layer, moment=number, releases=ends)]
    if checkpointing:
        trace.append(replace(embedding, moment=-1, releases=False))
    return trace, weights


class _Ahead:
    """Distance to a weight's next use, in values of the uses in between."""

    def __init__(self, uses: Sequence[tuple[Weight, ...]]) -> None:
        self._passed = [0, *accumulate(sum(weight.values for weight in weights) for weights in uses)]
        self._uses: dict[Weight, list[int]] = {}
        for step, weights in enumerate(uses):
            for weight in weights:
                self._uses.setdefault(weight, []).append(step)

    def distance(self, weight: Weight, step: int) -> float:
        uses = self._uses[weight]
        again = bisect_right(uses, step)
        return self._passed[uses[again]] - self._passed[step + 1] if again < len(uses) else math.inf


def _follow(trace: Sequence[WeightUse], schedule: GatherSchedule, most_live: int, reuse: int) -> GatherSchedule:
    """Fetch, prefetch and release as DeepSpeed does with a complete trace, and note it in the schedule."""
    queue = [(weight, step) for step, use in enumerate(trace) for weight in use.weights]
    after_layer = _Ahead([use.weights + use.within for use in trace])
    after_others = _Ahead([() if use.layer else use.weights for use in trace])
    available = {weight for weight in schedule.weights if weight.persistent}
    live: Counter[str] = Counter()
    promised: dict[Weight, int] = {}  # the last use for which a weight has been prefetched
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
        room = min(most_live - fetched, schedule.prefetched)
        while position < len(queue) and room > 0:
            weight, promised[weight] = queue[position]
            position += 1
            if weight not in available:
                gather(weight)
                room -= weight.values
        if live.total() > schedule.live.setdefault(use.moment, Counter(live)).total():
            schedule.live[use.moment] = Counter(live)
        for weight in use.weights if use.releases else ():
            distance = (after_layer if use.layer else after_others).distance(weight, step)
            kept = promised.get(weight, -1) > step + 1 or distance < reuse
            if not weight.persistent and not kept:
                available.discard(weight)
                fetched -= weight.values
                live[weight.kind] -= weight.gathered
    return schedule
