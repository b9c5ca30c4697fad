"""Exports the adapter of a checkpoint to one file. Needs neither a GPU nor deepspeed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from srde_ds.checkpoint.resume import verify_checkpoint
from srde_ds.errors import SRDEError
from srde_ds.export.streaming import METADATA, complete_file, complete_folder, tensors_size, write_lazily
from srde_ds.model.adapter_source import AdapterSource, checkpoint_adapter
from srde_ds.utils.dtypes import dtype_name
from srde_ds.weights.file import AdapterMetadata
from srde_ds.weights.peft_folder import PEFT_CONFIG, PEFT_PREFIX, PEFT_TYPE, PEFT_WEIGHTS
from srde_ds.weights.schema import SHARED_KINDS
from srde_ds.weights.tensors import LazyTensor

DTYPES = {dtype_name(dtype): dtype for dtype in (torch.float32, torch.bfloat16)}


def export_weights(
    checkpoint_folder: str | Path, output_path: str | Path, *, dtype: torch.dtype = torch.float32
) -> Path:
    """Write the adapter of a checkpoint as `srde_weights.safetensors`, see `write_weights`.

    Raises:
        SRDEError: the checkpoint is damaged or holds no adapter, the dtype is unknown, supports are being
            learned and the base is not found, or the file cannot be written.
    """
    folder = Path(checkpoint_folder)
    verify_checkpoint(folder)
    return write_weights(checkpoint_adapter(folder), output_path, dtype=dtype)


def write_weights(adapter: AdapterSource, output: str | Path, *, dtype: torch.dtype | None) -> Path:
    """Write an adapter as one file: trained values in `dtype` (None: unchanged), supports in int32, selection biases
    and the domains' statistics in float32. A crash leaves the old file or the new one; memory holds one tensor.

    Raises:
        SRDEError: the dtype is not one of DTYPES, or the file cannot be written.
    """
    target, tensors = Path(output), _as_written(adapter, dtype)
    with complete_file(target, tensors_size(tensors.values())) as partial:
        write_lazily(partial, tensors, adapter.metadata.header())
    return target


def write_peft(adapter: AdapterSource, output: str | Path, *, dtype: torch.dtype | None) -> Path:
    """Write an adapter as a folder that PEFT loads, with the same tensors and metadata as `write_weights`.

    Raises:
        SRDEError: the dtype is not one of DTYPES, or `output` exists or cannot be written.
    """
    target, tensors = Path(output), _as_written(adapter, dtype)
    with complete_folder(target, tensors_size(tensors.values())) as folder:
        named = {PEFT_PREFIX + name: tensor for name, tensor in tensors.items()}
        write_lazily(folder / PEFT_WEIGHTS, named, METADATA)
        text = json.dumps(_peft_config(adapter.metadata), indent=2, sort_keys=True)
        (folder / PEFT_CONFIG).write_text(f"{text}\n", encoding="utf-8")
    return target


def _peft_config(metadata: AdapterMetadata) -> dict[str, Any]:
    """The adapter's configuration as `save_pretrained` of PEFT writes it, without PEFT's defaults."""
    options = {name: value for name, value in metadata.to_dict()["config"].items() if name != "preset"}
    return options | {
        "peft_type": PEFT_TYPE,
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": metadata.model_name or None,
        "revision": metadata.model_revision or None,
        "inference_mode": True,
        "expert_names": metadata.expert_names,
        "metadata": metadata.to_json(),
    }


def _as_written(adapter: AdapterSource, dtype: torch.dtype | None) -> dict[str, LazyTensor]:
    if dtype is not None and dtype not in DTYPES.values():
        raise SRDEError(f"dtype={dtype}: choose one of {', '.join(DTYPES)}.")
    return {
        name: tensor if name.rpartition(".")[2] in SHARED_KINDS else tensor.to(dtype)
        for name, tensor in adapter.tensors.items()
    }
