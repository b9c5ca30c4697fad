"""Supports chosen by what the base does on calibration rows: by its activations, or by the gradient of its loss.

A weight w_ij is scored by

    activation    |w_ij| * |x_j|            |x_j|: norm of the weight's input over all real tokens of the rows
    gradient      |w_ij| * |dL/dw_ij|       norm over the rows of the gradient of each row's response loss

and a neuron or a block by the norm of its weights' scores (of a neuron, gate and up: its row of the matrix; down: its
column).

The gradient is taken for one packed row at a time. A score is then a sum of squares over rows: gradients need not be
stored, and rows cannot cancel each other. Each row is a batch of its own, and rows are added in a fixed order, so the
scores do not depend on the number of processes (docs/curriculum.md).
"""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from typing import Any, Protocol

import datasets
import torch
from torch import Tensor

from srde_ds.config import AdapterConfig, Config
from srde_ds.config.granularity import candidates
from srde_ds.data.loader import validation_batches
from srde_ds.distributed.engine import Engine, gather
from srde_ds.distributed.frozen_base import backward_base, base_alone, forward_base
from srde_ds.distributed.processes import Topology, broadcast_from_main
from srde_ds.distributed.reproducible_sums import ReproducibleSum, ShardedReproducibleSum
from srde_ds.errors import SRDEError
from srde_ds.model.adapter import SRDEModel
from srde_ds.model.feed_forward import ROLES
from srde_ds.model.quantization import dense_weight
from srde_ds.model.seeding import seeded_generator
from srde_ds.model.supports.blocks import by_block
from srde_ds.model.supports.selection import activation_scores, best_entries, random_subset


def calibrate_supports(engine: Engine, config: Config, topology: Topology, rows: datasets.Dataset) -> None:
    """Choose the supports as `support_strategy` says (activation or gradient), and write them into the layers.

    A collective of all ranks, which all get the same supports. Gradients and optimizer state are not touched.

    Args:
        rows: the training rows.

    Raises:
        SRDEError: on every rank: a domain has no rows, or the scores are all zero or not finite.
    """
    adapter = replace(config.adapter, density=engine.model.config.density)  # the current one, with density annealing
    groups = choose_rows(config, rows)
    per_expert = adapter.support_scope == "per_expert"
    beyond = range(len(groups), adapter.num_experts) if per_expert else range(0)
    everything = _scores(engine.model, adapter, topology.device) if beyond else None
    with base_alone(engine):
        for index, group in enumerate(groups):
            scores = _scores(engine.model, adapter, topology.device)
            _measure(engine, topology, group, scores)
            _choose(engine.model, scores, [index] if per_expert else None)
            if everything:
                everything.merge(scores)
    if everything:
        _choose(engine.model, everything, list(beyond))


def choose_rows(config: Config, rows: datasets.Dataset) -> list[datasets.Dataset]:
    """The calibration rows: one draw from all rows, or with `per_expert` one from each domain that has an expert.

    They depend only on the seed and on the rows' domains.

    Raises:
        SRDEError: a domain that has an expert has no rows.
    """
    adapter, count, seed = config.adapter, config.support.calibration_rows, config.training.seed
    if adapter.support_scope == "shared":
        return [_draw(rows, range(len(rows)), count, seed, "all")]
    domain_of_row = torch.as_tensor(rows.with_format("numpy")["domain"][:])
    groups = []
    for domain, name in enumerate(config.data.domains[: adapter.num_experts]):
        own = (domain_of_row == domain).nonzero().squeeze(1).tolist()
        if not own:
            raise SRDEError(
                f"support_strategy={adapter.support_strategy}, support_scope=per_expert: domain '{name}' has no "
                "training rows to choose its expert's support from. Add records of it, or give --support_scope shared."
            )
        groups.append(_draw(rows, own, count, seed, name))
    return groups


def _draw(rows: datasets.Dataset, candidates: range | list[int], count: int, seed: int, name: str) -> datasets.Dataset:
    generator = seeded_generator(seed, "calibration", name)
    chosen = random_subset(len(candidates), min(count, len(candidates)), generator)
    return rows.select([candidates[i] for i in chosen.sort().values.tolist()])


class _Scores(Protocol):
    """Sums from which the scores on one group of rows follow."""

    needs_backward: bool

    def hook(self, layer: int, role: str, projection: Any) -> Any:
        """Watch a projection of the base; returns the handle of the hook."""
        ...

    def end_row(self) -> None:
        """Add what was seen in this rank's row; a collective."""
        ...

    def of_layer(self, layer: int) -> Tensor:
        """Scores of a layer's candidates, on any scale; a collective."""
        ...

    def merge(self, other: Any) -> None:
        """Add the sums of another group."""
        ...


def _scores(model: SRDEModel, adapter: AdapterConfig, device: torch.device) -> _Scores:
    if adapter.support_strategy == "activation":
        return _ActivationScores(model, device)
    if adapter.granularity == "element":
        return _ElementGradientScores(model, device)
    return _SummedGradientScores(model, device)


def _block_shapes(model: SRDEModel) -> list[tuple[int, int]]:
    """(D, F) of each layer."""
    return [(layer.hidden, layer.intermediate) for layer in model.layers]


def _readable(projection: Any) -> Tensor:
    """The matrix of a projection. That there is one was checked when the model was built."""
    weight = dense_weight(projection)
    assert weight is not None
    return weight.detach()


def _measure(engine: Engine, topology: Topology, rows: datasets.Dataset, scores: _Scores) -> None:
    with ExitStack() as hooks:
        for number, layer in enumerate(engine.model.layers):
            for role in ROLES:
                hooks.callback(scores.hook(number, role, getattr(layer.block, layer.roles[role])).remove)
        for batch in validation_batches(rows, 1, rank=topology.rank, world_size=topology.world_size):
            with torch.set_grad_enabled(scores.needs_backward):
                loss = forward_base(engine, batch)
            if scores.needs_backward:
                backward_base(engine, loss)
            scores.end_row()


def _choose(model: SRDEModel, scores: _Scores, experts: list[int] | None) -> None:
    """Write the best entries of each layer into the supports of `experts`, or into the shared one (None)."""
    for number, layer in enumerate(model.layers):
        found = scores.of_layer(number)
        if not bool(found.isfinite().all()) or not bool(found.any()):
            raise SRDEError(
                f"layer {number}: its scores on the calibration rows are "
                f"{'all zero' if bool(found.isfinite().all()) else 'not finite'}, so no support can be chosen by them. "
                "Check that the rows hold responses, raise --calibration_rows, or give --support_strategy magnitude."
            )
        best = best_entries(found, layer.support.shape[-1]).to(layer.support)
        broadcast_from_main(best)
        if experts is None:
            layer.support.copy_(best)
        else:
            layer.support[experts] = best


class _LayerSums:
    """A float64 vector of sums for each layer, over rows that are divided among the ranks."""

    def __init__(self, sizes: list[int], device: torch.device) -> None:
        self._row = torch.zeros(sum(sizes), dtype=torch.float64, device=device)
        self.row_of_layer = self._row.split(sizes)
        self._sum = ReproducibleSum(sum(sizes), device)
        self.of_layer = self._sum.total.split(sizes)

    def end_row(self) -> None:
        self._sum.add(self._row)
        self._row.zero_()

    def merge(self, other: _LayerSums) -> None:
        self._sum.merge(other._sum)


class _ActivationScores:
    """Squares of the inputs of gate and up, then of down: D + F sums for each layer."""

    needs_backward = False

    def __init__(self, model: SRDEModel, device: torch.device) -> None:
        self._model = model
        shapes = _block_shapes(model)
        self._hidden = [hidden for hidden, _ in shapes]
        self._sums = _LayerSums([hidden + intermediate for hidden, intermediate in shapes], device)
        self.end_row = self._sums.end_row

    def hook(self, layer: int, role: str, projection: Any) -> Any:
        def add(module: Any, inputs: tuple[Tensor, ...]) -> None:
            if role == "up":  # its input is gate's
                return
            start, width = (0, self._hidden[layer]) if role == "gate" else (self._hidden[layer], inputs[0].shape[-1])
            real = self._model.routing.policy.token_mask
            tokens = inputs[0].detach().reshape(-1, inputs[0].shape[-1])
            tokens = tokens if real is None else tokens[real.reshape(-1)]
            squares = torch.linalg.vector_norm(tokens, dim=0, dtype=torch.float64).square()
            self._sums.row_of_layer[layer].narrow(0, start, width).add_(squares)

        return projection.register_forward_pre_hook(add)

    def of_layer(self, layer: int) -> Tensor:
        module = self._model.layers[layer]
        hidden = self._hidden[layer]
        squares = self._sums.of_layer[layer]
        projections = [getattr(module.block, module.roles[role]) for role in ROLES]
        with gather([projection.weight for projection in projections]):
            gate, up, down = map(_readable, projections)
            norms = squares[:hidden].sqrt(), squares[hidden:].sqrt()
            return activation_scores(module.granularity, gate, up, down, *norms)

    def merge(self, other: _ActivationScores) -> None:
        self._sums.merge(other._sums)


class _GradientScores:
    """Squares of weight times gradient, for one projection at a time as the backward reaches it."""

    needs_backward = True

    def hook(self, layer: int, role: str, projection: Any) -> Any:
        # Registered before DeepSpeed's hook, so it runs after it in the backward, when the weight is gathered.
        return projection.register_forward_hook(partial(self._watch, layer, role), prepend=True)

    def _watch(self, layer: int, role: str, module: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        if output.requires_grad:  # False in the first of two forwards, when activations are recomputed
            output.register_hook(partial(self._square, layer, role, module, inputs[0].detach()))

    def _square(self, layer: int, role: str, module: Any, x: Tensor, gradient: Tensor) -> None:
        precision = torch.promote_types(x.dtype, torch.float32)
        x_TI, gradient_TO = (t.reshape(-1, t.shape[-1]).to(precision) for t in (x, gradient))
        self._add(layer, role, (gradient_TO.T @ x_TI).mul_(_readable(module)).square_())

    def _add(self, layer: int, role: str, squares: Tensor) -> None:
        raise NotImplementedError


class _SummedGradientScores(_GradientScores):
    """A sum for each neuron or block of a layer."""

    def __init__(self, model: SRDEModel, device: torch.device) -> None:
        self._granularity = model.config.granularity
        sizes = [candidates(self._granularity, *shape) for shape in _block_shapes(model)]
        self._sums = _LayerSums(sizes, device)
        self.end_row = self._sums.end_row

    def _add(self, layer: int, role: str, squares: Tensor) -> None:
        row = self._sums.row_of_layer[layer]
        if self._granularity == "neuron":
            row.add_(squares.sum(0 if role == "down" else 1, dtype=torch.float64))
        else:
            blocks = by_block(squares).sum((1, 3), dtype=torch.float64).flatten()
            row.narrow(0, ROLES.index(role) * len(blocks), len(blocks)).add_(blocks)

    def of_layer(self, layer: int) -> Tensor:
        return self._sums.of_layer[layer]

    def merge(self, other: _SummedGradientScores) -> None:
        self._sums.merge(other._sums)


class _ElementGradientScores(_GradientScores):
    """3 * D * F fp32 sums for each layer; together the ranks hold one copy, in host memory."""

    def __init__(self, model: SRDEModel, device: torch.device) -> None:
        self._device = device
        sizes = [hidden * intermediate for hidden, intermediate in _block_shapes(model)]
        self._sums = [{role: ShardedReproducibleSum(size) for role in ROLES} for size in sizes]

    def _add(self, layer: int, role: str, squares: Tensor) -> None:
        self._sums[layer][role].add(squares.flatten().float())  # a collective, in the order of the backward

    def end_row(self) -> None:
        """Nothing to do: the hooks have added everything."""

    def of_layer(self, layer: int) -> Tensor:
        return torch.cat([self._sums[layer][role].whole(self._device) for role in ROLES])

    def merge(self, other: _ElementGradientScores) -> None:
        for own, others in zip(self._sums, other._sums, strict=True):
            for role in ROLES:
                own[role].merge(others[role])
