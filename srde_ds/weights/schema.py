"""Checks an adapter once, before memory is allocated for it: metadata, tensors, values, and the base's sizes.

Sizes come from the tensors, whose bytes really exist; the claims of the metadata are only compared with them.
"""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor

from srde_ds.config import AdapterConfig
from srde_ds.config.checks import check_neuron_parts
from srde_ds.config.granularity import candidates, entry_weights
from srde_ds.config.values import checked
from srde_ds.errors import SRDEError, nearest
from srde_ds.utils.dtypes import dtype_name
from srde_ds.weights.tensors import LazyTensor

VALUE_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
BASE_KEYS = ("name", "architecture", "hash")
LONGEST_TEXT = 1000  # most characters of a name; a message shows a tenth of this
FACTORS = 8
"""Number of factors that are stored of each domain, see `origins.DomainStatistics`"""
STATISTICS = ("domain_mean", "domain_spread", "domain_factors")
"""Kinds of tensors that hold statistics of the domains"""
SHARED_KINDS = ("support", "neurons", "router_bias", *STATISTICS)
"""Kinds of tensors that are not trained by gradients: they keep their dtype, and every rank holds them whole"""
OPTIONAL = {"router_bias", "domain_factors"}
"""Tensors that a file may lack: a bias of zero, and factors in files that are older than they are"""
NEURONS, SHARED_DELTA = "shared_expert.neurons", "shared_expert.delta"
"""Names of a shared expert's tensors within a layer"""
LONGEST_HISTORY = 1000  # entries
_TENSOR = re.compile(r"layers\.(0|[1-9][0-9]{0,4})\.(.+)")


def adapter_config(values: Any) -> AdapterConfig:
    """The adapter's options from a weights file's metadata.

    Raises:
        SRDEError: the value is not a mapping, an option is unknown, or an option has an impossible value.
    """
    if not isinstance(values, dict):
        raise SRDEError(f"weights: config={shown(values)} in the metadata must be a mapping. Export the weights again.")
    config, known = AdapterConfig(), {field.name for field in fields(AdapterConfig)}
    for key, value in values.items():
        if key not in known:
            raise SRDEError(f"weights: unknown adapter option {shown(key)} in the metadata.{nearest(key[:99], known)}")
        if not isinstance(value, str | int | float) or len(str(value)[: LONGEST_TEXT + 1]) > LONGEST_TEXT:
            raise SRDEError(f"weights: {key}={shown(value)} in the metadata is not a value of an option.")
        setattr(config, key, checked(config, key, value))
    if config.top_k > config.num_experts:
        raise SRDEError(f"weights: top_k={config.top_k} exceeds num_experts={config.num_experts} in the metadata.")
    try:
        check_neuron_parts(config)
    except SRDEError as error:
        raise SRDEError(f"weights, in the metadata: {error}") from None
    return config


def check_names(expert_names: Any, config: AdapterConfig) -> None:
    """Raise an SRDEError unless there is one printable, unique name for each expert."""
    names = expert_names if isinstance(expert_names, list) else [expert_names]
    for name in names:
        if not is_printable(name) or not name.strip():
            raise SRDEError(f"weights: the expert name {shown(name)} is not printable text. Export the weights again.")
    name, times = Counter(names).most_common(1)[0] if names else ("", 0)
    if times > 1:
        raise SRDEError(f"weights: {times} experts are called {shown(name)}. Export the weights with other names.")
    if len(names) != config.num_experts:
        raise SRDEError(f"weights: num_experts={config.num_experts}, but {len(names)} expert names in the metadata.")


def check_base_identity(base: Any) -> None:
    """Raise an SRDEError unless this identifies the adapter's base: `BASE_KEYS`, as printable text."""
    if not isinstance(base, dict) or base.keys() != set(BASE_KEYS) or not all(map(is_printable, base.values())):
        raise SRDEError(f"weights: base={shown(base)} in the metadata must give {', '.join(BASE_KEYS)} as text.")


def check_domain_tokens(counts: Any) -> None:
    """Raise an SRDEError unless this gives the number of tokens behind each domain's statistics."""
    known = isinstance(counts, dict) and all(
        is_printable(name) and name.strip() and type(count) is int and 0 < count < 2**63
        for name, count in counts.items()
    )
    if not known:
        raise SRDEError(
            f"weights: domain_tokens={shown(counts)} in the metadata must give each domain's tokens, above 0. "
            "Export the weights again."
        )


def check_history(history: Any) -> None:
    """Raise an SRDEError unless this is a list of mappings from names to printable texts or whole numbers."""
    if not isinstance(history, list) or len(history) > LONGEST_HISTORY:
        raise SRDEError(
            f"weights: history={shown(history)} in the metadata must be a list of at most {LONGEST_HISTORY} entries."
        )
    for entry in history:
        values = [*entry, *entry.values()] if isinstance(entry, dict) else [None]
        if not all(is_printable(value) or (type(value) is int and abs(value) < 2**63) for value in values):
            raise SRDEError(
                f"weights: history: the entry {shown(entry)} must be a mapping to texts and whole numbers. "
                "Export the weights again."
            )


def is_printable(value: Any) -> bool:
    """Whether a value is text of a reasonable length that a terminal can show unchanged; it may be empty."""
    return isinstance(value, str) and len(value) <= LONGEST_TEXT and value.isprintable()


def shown(value: Any) -> str:
    """A value of somebody else's file, for a one-line message."""
    text = repr(value[:LONGEST_TEXT] if isinstance(value, str) else value)
    return text if len(text) <= LONGEST_TEXT // 10 else f"{text[: LONGEST_TEXT // 10]}…"


def check_shapes(config: AdapterConfig, tensors: Mapping[str, LazyTensor], place: object, *, domains: int = 0) -> None:
    """Check names, dtypes and shapes of all tensors of an adapter against each other and the options.

    Args:
        domains: number of domains with statistics.

    Raises:
        SRDEError: a tensor is missing or unknown, or has another dtype or shape; the message names it.
    """

    def refuse(reason: str) -> SRDEError:
        return SRDEError(f"weights '{place}': {reason}; the file contradicts its own config. Export it again.")

    layers: dict[int, dict[str, LazyTensor]] = {}
    for name, tensor in tensors.items():
        match = _TENSOR.fullmatch(name)
        if match is None:
            raise refuse(f"unknown tensor {shown(name)}")
        layers.setdefault(int(match[1]), {})[match[2]] = tensor
    if not layers:
        raise refuse("it holds no tensors")
    hidden = None
    for number in range(len(layers)):
        own = layers.get(number)
        if own is None:
            raise refuse(f"tensor layers.{number}.support is missing")
        for part in ("support", "router.weight"):
            if part not in own:
                raise refuse(f"tensor layers.{number}.{part} is missing")
        if hidden is None and len(own["router.weight"].shape) == 2:
            hidden = own["router.weight"].shape[1]
        size = own["support"].shape[-1] if own["support"].shape else 0
        neurons = own.get(NEURONS)
        moved = neurons.shape[-1] if neurons is not None and neurons.shape else 0
        expected = layer_shapes(config, hidden or 0, size, domains, moved)
        for part in expected.keys() - own.keys() - OPTIONAL:
            raise refuse(f"tensor layers.{number}.{part} is missing")
        for part, tensor in own.items():
            name = f"layers.{number}.{part}"
            if part not in expected:
                raise refuse(f"unknown tensor {shown(name)}")
            indices = part in ("support", NEURONS)
            if tensor.dtype not in ((torch.int32,) if indices else VALUE_DTYPES):
                wanted = "int32" if indices else "a floating-point type"
                raise refuse(f"{name} has dtype {dtype_name(tensor.dtype)}, expected {wanted}")
            if tensor.shape != expected[part] or 0 in tensor.shape:
                raise refuse(f"{name} has shape {list(tensor.shape)}, expected {list(expected[part])}")


def layer_shapes(
    config: AdapterConfig, hidden: int, size: int, domains: int, neurons: int = 0
) -> dict[str, tuple[int, ...]]:
    """The shapes of a layer's tensors, by their names within the layer.

    Args:
        hidden: D.
        size: number of entries in an expert's support.
        domains: number of domains with statistics.
        neurons: number of neurons that the shared expert changes, if there is one.
    """
    experts, atoms, neuron = config.num_experts, config.num_atoms, config.granularity == "neuron"
    width = hidden // config.neuron_parts
    shapes: dict[str, tuple[int, ...]] = {"router.weight": (experts, hidden), "router_bias": (experts,)}
    if domains:
        of_dimensions = (domains, hidden)
        shapes |= {"domain_mean": of_dimensions, "domain_spread": of_dimensions}
        shapes["domain_factors"] = (domains, FACTORS, hidden)
    if config.shared_expert_density:
        shapes |= {NEURONS: (neurons,), SHARED_DELTA: (hidden, 3, neurons)}
    shapes["support"] = (size,) if config.support_scope == "shared" else (experts, size)
    values = size * entry_weights(config.granularity, hidden)
    if atoms == 0:
        return shapes | {"deltas.free": (width, 3 * experts, size) if neuron else (experts, values)}
    return shapes | {
        "deltas.atoms": (width, 3 * atoms, size) if neuron else (values, 1, atoms),
        "deltas.importance": (experts, 3, width, size) if neuron else (experts, values),
        "deltas.mixing": (experts, atoms),
    }


def check_values(tensors: Mapping[str, LazyTensor], expected_hash: str, place: object) -> None:
    """Check the values of tensors whose shapes are correct; memory holds one tensor and the supports.

    Raises:
        SRDEError: values are not finite, indices of neurons or weights are negative or do not ascend, a shared expert
            changes neurons of routed ones, or supports do not match `expected_hash`.
    """
    supports: dict[int, Tensor] = {}
    for name, tensor in tensors.items():
        values = tensor.load()
        if not name.endswith((".support", f".{NEURONS}")):
            if not bool(values.isfinite().all()):
                raise SRDEError(f"weights '{place}': {name} holds values that are not finite. Export them again.")
            continue
        if bool((values[..., 1:] <= values[..., :-1]).any()):
            raise SRDEError(f"weights '{place}': the indices of {name} do not ascend. Export them again.")
        if int(values.min()) < 0:
            raise SRDEError(f"weights '{place}': {name} holds the index {int(values.min())}. Export them again.")
        if name.endswith(".support"):
            supports[int(name.split(".")[1])] = values
    for layer, support in supports.items():
        shared = tensors.get(f"layers.{layer}.{NEURONS}")
        if shared is not None and bool(torch.isin(shared.load(), support).any()):
            raise SRDEError(
                f"weights '{place}': layers.{layer}.{NEURONS} names neurons of the routed experts. Export them again."
            )
    if support_hash([supports[layer] for layer in sorted(supports)]) != expected_hash:
        raise SRDEError(f"weights '{place}': the supports do not match support_hash; the file is damaged.")


def check_fits_base(
    config: AdapterConfig, tensors: Mapping[str, LazyTensor], sizes: Sequence[tuple[int, int]], place: object
) -> None:
    """Check an adapter, valid by itself, against the base that it is for.

    Args:
        sizes: the hidden and intermediate size of each decoder layer.

    Raises:
        SRDEError: the number of layers or the hidden size differs, or support indices exceed the base's weights.
    """
    supports = [name for name in tensors if name.endswith(".support")]
    if len(supports) != len(sizes):
        missing = f"layers.{len(supports)}.support is missing" if len(supports) < len(sizes) else "too many"
        raise SRDEError(f"weights '{place}': {len(supports)} layers, but the base has {len(sizes)} ({missing}).")
    for layer, (hidden, intermediate) in enumerate(sizes):
        found = tensors[f"layers.{layer}.router.weight"].shape[1]
        if found != hidden:
            raise SRDEError(f"weights '{place}': layer {layer} is made for a hidden size of {found}, not {hidden}.")
        existing = candidates(config.granularity, hidden, intermediate)
        for part in ("support", NEURONS) if config.shared_expert_density else ("support",):
            largest = int(tensors[f"layers.{layer}.{part}"].load().max())
            if largest >= existing:
                raise SRDEError(
                    f"weights '{place}': layers.{layer}.{part} holds the index {largest}, the base has {existing} "
                    f"{config.granularity}s in a layer. Give the base that they were trained on."
                )


def support_hash(supports: Iterable[Tensor]) -> str:
    """SHA-256 over the supports of all layers, in order."""
    digest = hashlib.sha256()
    for support in supports:
        digest.update(f"{tuple(support.shape)}".encode())
        digest.update(support.detach().to(device="cpu", dtype=torch.int32).contiguous().numpy().tobytes())
    return digest.hexdigest()
