"""From a resume checkpoint to the adapter in one file. Needs neither a GPU nor deepspeed."""

from __future__ import annotations

import math
from pathlib import Path

import torch
from torch import Tensor

from srde_ds.checkpoint.resume import load_common_tensors, load_run_state, verify_checkpoint
from srde_ds.checkpoint.shards import ShardIndex
from srde_ds.errors import SRDEError
from srde_ds.model.adapter import AdapterMetadata, save_weights
from srde_ds.parallel.pieces import TensorPiece

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def export_weights(
    checkpoint_folder: str | Path, output_path: str | Path, *, dtype: torch.dtype = torch.float32
) -> Path:
    """Write the adapter of a checkpoint as `srde_weights.safetensors`: master weights in `dtype`, supports in int32.

    Raises:
        SRDEError: the checkpoint is damaged or holds no adapter, or the dtype is neither float32 nor bfloat16.
    """
    if dtype not in DTYPES.values():
        raise SRDEError(f"dtype={dtype}: choose one of {', '.join(DTYPES)}.")
    folder, target = Path(checkpoint_folder), Path(output_path)
    verify_checkpoint(folder)
    state = load_run_state(folder)
    if "adapter" not in state:
        raise SRDEError(f"checkpoint '{folder}': its run state has no 'adapter': nothing to export.")
    metadata = AdapterMetadata.from_dict(state["adapter"])
    index = ShardIndex(folder)
    tensors: dict[str, Tensor] = {}
    for (kind, name), shape in sorted(index.shapes.items()):
        if kind == "master":
            piece = TensorPiece(name, kind, shape, 0, torch.empty(math.prod(shape)))
            index.read([piece])
            tensors[name] = piece.data.view(shape).to(dtype)
    supports = {name: tensor for name, tensor in load_common_tensors(folder).items() if name.endswith(".support")}
    if not tensors or not supports:
        raise SRDEError(f"checkpoint '{folder}': it holds no master weights or no supports: nothing to export.")
    target.parent.mkdir(parents=True, exist_ok=True)
    save_weights(target, tensors | supports, metadata)
    return target
