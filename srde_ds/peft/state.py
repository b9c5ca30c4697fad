"""An adapter's tensors: their names in a model and in a file, and the checks before they are loaded."""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from srde_ds.model.layer import SRDEFeedForward
from srde_ds.peft.layer import EXPERTS, SRDELayer
from srde_ds.weights.file import AdapterMetadata
from srde_ds.weights.origins import DomainStatistics
from srde_ds.weights.peft_folder import PEFT_PREFIX
from srde_ds.weights.schema import STATISTICS, check_fits_base, check_shapes, check_values
from srde_ds.weights.tensors import LazyTensor

BIAS_IN_MODEL, BIAS_IN_FILE = "router.selection_bias", "router_bias"


def experts_of(model: nn.Module, adapter: str) -> list[SRDEFeedForward]:
    """One adapter's experts, in the order in which tokens pass the layers."""
    layers = [m.experts(adapter) for m in model.modules() if isinstance(m, SRDELayer) and adapter in m.srde_experts]
    return sorted(layers, key=lambda experts: experts.layer)


def keep_statistics(experts: SRDEFeedForward, statistics: DomainStatistics | None) -> None:
    """Store in a layer's experts, to be saved with them, the layer's statistics of each domain; None removes them."""
    for name in STATISTICS:
        if statistics is not None:
            part = getattr(statistics, name.removeprefix("domain_"))
            experts.register_buffer(name, part.to(experts.support.device))
        elif hasattr(experts, name):
            delattr(experts, name)


def empty_statistics(domains: int, hidden: int) -> DomainStatistics | None:
    """Zeros that a file's statistics are loaded into; None if there are no domains."""
    zeros = torch.zeros(domains, hidden)
    return DomainStatistics.independent(zeros, zeros.clone()) if domains else None


def name_in_file(name: str, adapter: str) -> str | None:
    """The file's name for a tensor of a model's state; None if the tensor does not belong to this adapter's experts."""
    match = re.fullmatch(rf"(?:.+\.)?(\d+)\.\w+\.{EXPERTS}\.{re.escape(adapter)}\.(.+)", name)
    if match is None:
        return None
    return f"{PEFT_PREFIX}layers.{match[1]}.{BIAS_IN_FILE if match[2] == BIAS_IN_MODEL else match[2]}"


def without_zero_biases(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Drop selection biases that are zero, since files leave them out, as `srde_weights.safetensors` does."""
    return {name: tensor for name, tensor in state.items() if not name.endswith(BIAS_IN_MODEL) or bool(tensor.any())}


def with_zeros(tensors: Mapping[str, Tensor], layers: list[SRDEFeedForward]) -> dict[str, Tensor]:
    """A file's tensors, completed by selection biases and factors that it leaves out."""
    zeros = {f"{PEFT_PREFIX}layers.{m.layer}.{BIAS_IN_FILE}": torch.zeros_like(m.router.selection_bias) for m in layers}
    for experts in layers:
        factors = getattr(experts, "domain_factors", None)
        if factors is not None:
            zeros[f"{PEFT_PREFIX}layers.{experts.layer}.domain_factors"] = torch.zeros_like(factors)
    return zeros | dict(tensors)


def check_tensors(
    tensors: Mapping[str, Tensor], metadata: AdapterMetadata, layers: list[SRDEFeedForward], place: str
) -> None:
    """Check a file's tensors before they are loaded into a model.

    Args:
        place: where they come from, for messages.

    Raises:
        SRDEError: they fail a check of `weights.schema`, or do not fit the base.
    """
    own = {
        name.removeprefix(PEFT_PREFIX): LazyTensor.of(tensor)
        for name, tensor in tensors.items()
        if name.startswith(f"{PEFT_PREFIX}layers.")
    }
    check_shapes(metadata.config, own, place, domains=len(metadata.domain_tokens))
    check_values(own, metadata.support_hash, place)
    check_fits_base(metadata.config, own, [(m.hidden, m.intermediate) for m in layers], place)
