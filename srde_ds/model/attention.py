"""Attention within each document of a row, without a mask over all pairs of positions."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from srde_ds.model.targets import on_device

DOCUMENT_ATTENTION = "srde_documents"
"""Its name in transformers, for `attn_implementation`"""

OLDEST_GPU = (8, 0)
"""Compute capability from which a GPU has the kernel for documents: Ampere"""

# Arguments of transformers' attention functions that affect the weights beyond the position in a document.
_CHANGES = ("sliding_window", "softcap", "position_bias", "s_aux")
# Rotations that depend on the longest document, for which the positions must be read.
_LOOKING_ROTATIONS = ("dynamic", "longrope")


@dataclass(frozen=True)
class Documents:
    """The positions of the documents in a micro-batch `[B, S]`, whose rows are concatenated.

    Attributes:
        lengths: lengths in tokens; padding counts as a document.
        borders: int32 `[documents + 1]`, the start of each document, and the end.
        no_mask: bool `[1, 1, 1, 1]`, for the base's forward, which makes no mask if it gets one with four axes.
    """

    lengths: tuple[int, ...]
    borders: Tensor
    no_mask: Tensor

    @classmethod
    def of(cls, position_ids: Tensor) -> Documents:
        """Find where positions restart, which begins a document. Call it on the CPU, since it reads values."""
        begins = torch.ones_like(position_ids, dtype=torch.bool)
        begins[:, 1:] = position_ids.diff(dim=1) != 1
        starts = begins.flatten().nonzero().squeeze(1)
        borders = torch.cat([starts, starts.new_tensor([position_ids.numel()])])
        return cls(tuple(borders.diff().tolist()), borders.int(), torch.ones(1, 1, 1, 1, dtype=torch.bool))

    def to(self, device: torch.device) -> Documents:
        """A copy on a device, made without waiting."""
        return replace(self, borders=on_device(self.borders, device), no_mask=on_device(self.no_mask, device))


def inputs_of(base: PreTrainedModel, batch: Mapping[str, Tensor], device: torch.device) -> dict[str, Any]:
    """An SRDEModel's inputs, on `device`, from a CPU batch of the loader, without its labels.

    A base made with DOCUMENT_ATTENTION gets the documents; without them it would make a mask of S x S.
    """
    inputs: dict[str, Any] = {key: on_device(batch[key], device) for key in ("input_ids", "position_ids", "token_mask")}
    if base.config.get_text_config()._attn_implementation == DOCUMENT_ATTENTION:
        documents = Documents.of(batch["position_ids"]).to(device)
        inputs |= {"documents": documents, "attention_mask": documents.no_mask}
    return inputs


def document_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    documents: Documents | None = None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """Causal attention within each document; without `documents` it is torch's attention, with the mask.

    Args:
        query, key, value: `[B, heads, S, width]`; keys and values may have fewer heads.
        documents: the documents, for a base that `takes_documents`.

    Returns:
        `[B, S, heads, width]`, and no weights.
    """
    if documents is None:
        result: tuple[Tensor, None] = sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **options
        )
        return result
    rows, heads, length, width = query.shape
    flat = [t.transpose(1, 2).flatten(0, 1) for t in (query, key, value)]
    if (
        query.is_cuda
        and not dropout
        and _has_kernel(torch.cuda.get_device_capability(query.device), query.dtype, width, value.shape[3])
    ):
        output = _by_kernel(flat[0], flat[1], flat[2], documents, scaling)
    else:
        causal: dict[str, Any] = {"dropout": dropout, "scaling": scaling, "is_causal": True}
        outputs = []
        for part in zip(*(t.split(documents.lengths) for t in flat), strict=True):
            q, k, v = (t.transpose(0, 1)[None] for t in part)
            outputs.append(sdpa_attention_forward(module, q, k, v, None, **causal)[0][0])
        output = torch.cat(outputs)
    return output.view(rows, length, heads, -1), None


def _has_kernel(capability: tuple[int, int], dtype: torch.dtype, width: int, value_width: int) -> bool:
    """Whether `_by_kernel` can compute on a GPU of this compute capability."""
    fits = width <= 256 and width % 8 == 0 and value_width == width
    return capability >= OLDEST_GPU and dtype in (torch.float16, torch.bfloat16) and fits


def _by_kernel(query: Tensor, key: Tensor, value: Tensor, documents: Documents, scaling: float | None) -> Tensor:
    """The same for `[tokens, heads, width]`, with one kernel for all documents."""
    from torch.nn.attention.varlen import varlen_attn

    options: dict[str, Any] = {"scale": scaling, "window_size": (-1, 0)}  # causal
    if "enable_gqa" in _parameters(varlen_attn):  # older releases accept fewer keys than queries without it
        options["enable_gqa"] = True
    borders, longest = documents.borders, max(documents.lengths)
    output = varlen_attn(query, key, value, borders, borders, longest, longest, **options)
    assert isinstance(output, Tensor)
    return output


@cache
def _parameters(function: Any) -> frozenset[str]:
    return frozenset(inspect.signature(function).parameters)


_TAKES_DOCUMENTS: dict[tuple[type, str], bool] = {}


def takes_documents(empty: PreTrainedModel) -> bool:
    """Whether all layers of a base attend as `document_attention` does: to all of a document, without a cap or sinks.

    This is tried out, once for each class and configuration: a forward must pass the documents to every layer's
    attention, and nothing that changes it.

    Args:
        empty: the base without storage (`base.empty_base`), made with DOCUMENT_ATTENTION.
    """
    tried = type(empty), empty.config.to_json_string(use_diff=False)
    if tried not in _TAKES_DOCUMENTS:
        _TAKES_DOCUMENTS[tried] = _try_documents(empty)
    return _TAKES_DOCUMENTS[tried]


def _try_documents(empty: PreTrainedModel) -> bool:
    text = empty.config.get_text_config()
    kinds = set(getattr(text, "layer_types", None) or ["full_attention"])
    rotation = (getattr(text, "rope_parameters", None) or {}).get("rope_type", "default")
    if kinds != {"full_attention"} or rotation in _LOOKING_ROTATIONS:
        return False
    asked: list[bool] = []

    def look(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
    ) -> tuple[Tensor, None]:
        plain = options.get("documents") is documents and not options.get("dropout")
        asked.append(plain and all(options.get(name) is None for name in _CHANGES))
        return query.new_zeros(*query.shape[:1], query.shape[2], query.shape[1], value.shape[3]), None

    documents = Documents.of(torch.tensor([[0, 1, 0, 1]])).to(empty.device)
    positions = torch.tensor([[0, 1, 0, 1]], device=empty.device)
    AttentionInterface.register(DOCUMENT_ATTENTION, look)
    try:
        with torch.no_grad():
            empty(
                input_ids=torch.zeros_like(positions),
                position_ids=positions,
                attention_mask=documents.no_mask,
                documents=documents,
                use_cache=False,
            )
    finally:
        AttentionInterface.register(DOCUMENT_ATTENTION, document_attention)
    return len(asked) == text.num_hidden_layers and all(asked)


AttentionInterface.register(DOCUMENT_ATTENTION, document_attention)
AttentionMaskInterface.register(DOCUMENT_ATTENTION, sdpa_mask)
