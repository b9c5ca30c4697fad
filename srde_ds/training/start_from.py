"""`start_from`: begins a new run with trained experts. Optimizer, data and length are those of the new run."""

from __future__ import annotations

from typing import TYPE_CHECKING

import datasets
import torch
from torch import Tensor

from srde_ds.config import Config
from srde_ds.distributed.engine import Engine, gather
from srde_ds.distributed.processes import Topology
from srde_ds.errors import SRDEError
from srde_ds.model.adapter import SRDEModel
from srde_ds.model.adapter_source import AdapterSource
from srde_ds.model.base import identity_in
from srde_ds.model.deltas import Storage, build_deltas
from srde_ds.model.router import Router
from srde_ds.training.domain_statistics import measure_domains
from srde_ds.training.warm_start.from_statistics import add_routing_vectors, fit_layers
from srde_ds.weights.file import AdapterMetadata
from srde_ds.weights.origins import DomainStatistics, Origins
from srde_ds.weights.schema import NEURONS, SHARED_DELTA

if TYPE_CHECKING:
    from srde_ds.model.deltas import Trainable


def start_from(engine: Engine, adapter: AdapterSource, seed: int) -> None:
    """Give a new engine the supports and values of an adapter; a collective, with the same adapter on all ranks.

    Experts that the adapter lacks keep their supports, and begin as in any new run; `route_to_new_experts` follows.

    Args:
        seed: seed for the initial values of the new experts.

    Raises:
        SRDEError: the adapter was trained on another base.
    """
    model, before = engine.model, adapter.metadata
    _check_base(before, model, adapter.place)
    for number, layer in enumerate(model.layers):
        prefix, config = f"layers.{number}.", model.config
        old = {name.removeprefix(prefix): t for name, t in adapter.tensors.items() if name.startswith(prefix)}
        support = old["support"].load().to(layer.support)
        rows = layer.support if support.dim() == 1 else layer.support[: len(support)]
        if rows.shape != support.shape:
            raise SRDEError(
                f"weights '{adapter.place}': layer {number} has supports of shape {list(support.shape)}, but the base "
                f"needs {list(rows.shape)}. Give the base that the weights were trained on."
            )
        rows.copy_(support)
        storage = Storage(torch.float32, torch.device("cpu"))
        bank = build_deltas(
            config, hidden=layer.hidden, size=support.shape[-1], seed=seed, layer=number, storage=storage
        )
        router = Router(layer.hidden, config.num_experts, config.top_k, seed=seed, layer=number, storage=storage)
        fresh = {f"deltas.{name}": p for name, p in bank.named_parameters()} | {"router.weight": router.weight}
        values = {}
        for name, parameter in fresh.items():
            values[prefix + name] = _continued(parameter, old[name].load().float())  # type: ignore[arg-type]
        if layer.shared_expert is not None:
            layer.shared_expert.neurons.copy_(old[NEURONS].load())
            values[prefix + SHARED_DELTA] = old[SHARED_DELTA].load().float()
        engine.set_trainables(values)
        bias = torch.zeros(config.num_experts)
        if "router_bias" in old:
            bias[: len(before.expert_names)] = old["router_bias"].load()
        layer.router.load_selection_bias(bias)
    model.origins = Origins.of(before, adapter.tensors)


def route_to_new_experts(
    engine: Engine, adapter: AdapterSource, config: Config, topology: Topology, rows: datasets.Dataset
) -> str:
    """Give new experts routing vectors that draw the tokens of their domains; a collective after `start_from`.

    They follow from statistics of the domains' inputs: those of the old experts' domains are stored in the adapter,
    those of the new ones are measured here. The old experts' vectors stay the same. New experts keep their random ones
    where statistics are missing.

    Args:
        rows: training rows as written by `build_dataset`, the same on all ranks.

    Returns:
        A line for the console; empty if there are no new experts.

    Raises:
        SRDEError: on every rank: the inputs of a new domain do not differ from those of the others.
    """
    old = adapter.metadata.expert_names
    new = config.expert_names[len(old) :]
    if not new:
        return ""
    unknown = [name for name in old if name not in adapter.metadata.domain_tokens]
    if not unknown and config.training.domain_statistics_rows:
        measure_domains(engine, config, topology, rows)
        unknown = [name for name in new if name not in engine.model.origins.domain_tokens]
    elif not unknown:
        unknown = new
    if unknown:
        return f"Routing vectors of {', '.join(new)}: random, without statistics of the domain {unknown[0]}."

    def extend(statistics: DomainStatistics, layer: int) -> tuple[Tensor, float]:
        try:
            old_router = adapter.router(layer).load().float()
            return add_routing_vectors(old_router, statistics, seed=config.training.seed, layer=layer)
        except SRDEError as error:
            raise SRDEError(
                f"domains={','.join(new)} with start_from={adapter.place}: {error} Give data of another kind, or "
                "--domain_statistics_rows 0, which leaves the new routing vectors random."
            ) from None

    weights, shares = fit_layers(engine.model, topology, [*old, *new], extend)
    engine.set_trainables(weights)
    return (
        f"Routing vectors of {', '.join(new)}: from the domains' inputs. In the mean over the layers, they draw "
        f"{sum(shares) / len(shares):.1%} of the other domains' tokens."
    )


def _continued(parameter: Trainable, old: Tensor) -> Tensor:
    """A trainable's initial values, with the old experts' values at the front."""
    axis = 0 if parameter.srde_kind == "router" else parameter.srde_expert_axis
    if axis is None:
        return old
    values = parameter.detach().clone()
    values.narrow(axis, 0, old.shape[axis]).copy_(old)
    return values


def _check_base(before: AdapterMetadata, model: SRDEModel, place: object) -> None:
    base, expected = model.base_identity, before.base["hash"]
    # A base that was float16 in training, as it may be with PEFT, is identified by its values in float16.
    if base["hash"] != expected and identity_in(model.base, torch.float16, gather=gather)["hash"] != expected:
        raise SRDEError(
            f"start_from={place}: trained on {before.base['name']} (hash {str(before.base['hash'])[:12]}), the base is "
            f"{base['name']} (hash {str(base['hash'])[:12]}). Give the base that they were trained on as --model_name."
        )
