"""A feed-forward block with the experts of every adapter."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, NoReturn

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from srde_ds.errors import SRDEError
from srde_ds.model.layer import SRDEFeedForward
from srde_ds.weights.schema import is_printable, shown

EXPERTS = "srde_experts"
"""Attribute of `SRDELayer`, so it is also part of the tensors' names in a model's state"""


def check_adapter_name(name: Any, model: nn.Module) -> None:
    """Raise SRDEError for a name that torch refuses for modules, or that would make PEFT confuse the model's tensors.

    Args:
        model: the model that gets the adapter; it may already have others.
    """
    paths = [path for path, _ in [*model.named_modules(), *model.named_parameters()]]
    parts = {part for path in paths for part in re.sub(rf"\.{EXPERTS}\.[^.]+", f".{EXPERTS}", path).split(".")}
    reason = None
    if not is_printable(name) or not name.strip():
        reason = "it must be printable text"
    elif "." in name or Path(name).is_absolute():
        reason = "it becomes part of tensors' names and a folder's name, so it has no '.' and no '/' at its start"
    elif hasattr(nn.ModuleDict(), name):
        reason = "modules of torch have an attribute of this name"
    elif name in parts:
        reason = "a part of the model has this name, and PEFT tells tensors apart by their names"
    if reason is not None:
        raise SRDEError(f"adapter_name={shown(name)}: {reason}. Give another name.")


class SRDELayer(nn.Module, BaseTunerLayer):
    """Replaces a feed-forward block of the base.

    Attributes:
        base_layer: the base's block.
        srde_experts: each adapter's experts in this layer, by the adapter's name.
        empty: adapters whose values are not loaded yet.
    """

    adapter_layer_names = (EXPERTS,)

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.srde_experts = nn.ModuleDict()
        self.empty: set[str] = set()
        self._disable_adapters = False
        self.merged_adapters: list[str] = []

    def add(self, adapter: str, experts: SRDEFeedForward, *, empty: bool) -> None:
        """Add an adapter's experts.

        Args:
            empty: their values are not loaded yet.
        """
        # The block belongs to this layer: as a child of the experts it would be saved and counted with every adapter.
        del experts._modules["block"]
        experts.__dict__["block"] = self.base_layer
        self.srde_experts[adapter] = experts
        if empty:
            self.empty.add(adapter)

    def experts(self, adapter: str) -> SRDEFeedForward:
        """The experts of one adapter."""
        experts = self.srde_experts[adapter]
        assert isinstance(experts, SRDEFeedForward)
        return experts

    # torch.compile cannot trace a whole model whose backward adds to statistics.
    @torch.compiler.disable
    def forward(self, x: Tensor) -> Tensor:
        """`[..., D]` -> `[..., D]`, with the experts of the active adapter.

        Raises:
            SRDEError: the adapter's values were never loaded.
        """
        if self.disable_adapters or not self.active_adapters:
            return self.base_layer(x)
        adapter = self.active_adapters[0]
        if adapter in self.empty:
            raise SRDEError(
                f"adapter '{adapter}': its configuration belongs to a saved adapter, but its values were not loaded. "
                "Use PeftModel.from_pretrained, or give a new SRDEConfig for a new adapter."
            )
        return self.srde_experts[adapter](x)

    def set_adapter(self, adapter_names: str | list[str], inference_mode: bool = False) -> None:
        """Use the experts of this adapter from now on.

        Raises:
            SRDEError: more than one adapter is given.
        """
        if not isinstance(adapter_names, str) and len(adapter_names) > 1:
            raise SRDEError(
                f"set_adapter({adapter_names}): a block uses the experts of one adapter at a time. To make one adapter "
                "of several, run srde_ds.peft.statistics.measure_domains on each, save them, and run srde-ds combine."
            )
        super().set_adapter(adapter_names, inference_mode=inference_mode)

    def delete_adapter(self, adapter_name: str) -> None:
        """Remove an adapter's experts."""
        super().delete_adapter(adapter_name)
        self.empty.discard(adapter_name)

    def merge(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Raise SRDEError: experts cannot be merged in place."""
        raise SRDEError(
            "merge_adapter(): each token has its own experts, so there is no single change of the weights that could "
            "be added and removed again. Use merge_and_unload(expert=...) to merge one expert."
        )

    def unmerge(self) -> NoReturn:
        """Raise SRDEError, see `merge`."""
        raise SRDEError("unmerge_adapter(): SRDE merges nothing in place, so there is nothing to undo.")
