"""From a resume checkpoint to the adapter in one file. Needs neither a GPU nor deepspeed."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from srde_ds.checkpoint.prune import PrunedLayers
from srde_ds.checkpoint.resume import load_common_tensors, load_run_state, verify_checkpoint
from srde_ds.checkpoint.shards import ShardIndex
from srde_ds.errors import SRDEError
from srde_ds.model.adapter import AdapterMetadata, save_weights
from srde_ds.model.supports import support_hash

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def export_weights(
    checkpoint_folder: str | Path, output_path: str | Path, *, dtype: torch.dtype = torch.float32
) -> Path:
    """Write the adapter of a checkpoint as `srde_weights.safetensors`: master weights in `dtype`, supports in int32.

    Of supports that are still being learned it takes the best candidates, those that count in eval mode; their number
    comes from the configuration of the base that the checkpoint names.

    Raises:
        SRDEError: the checkpoint is damaged or holds no adapter, the dtype is neither float32 nor bfloat16, or supports
            are being learned and the base is not found.
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
    if any(name.endswith(".scores") for _, name in index.shapes):
        tensors, common, metadata = _learned_so_far(folder, state["config"]["adapter"]["density"], dtype)
    else:
        tensors = {name: index.tensor(kind, name).to(dtype) for kind, name in sorted(index.shapes) if kind == "master"}
        common = load_common_tensors(folder)
    common = {name: tensor for name, tensor in common.items() if name.endswith((".support", ".router_bias"))}
    if not tensors or not common:
        raise SRDEError(f"checkpoint '{folder}': it holds no master weights or no supports: nothing to export.")
    target.parent.mkdir(parents=True, exist_ok=True)
    save_weights(target, tensors | common, metadata)
    return target


def _learned_so_far(
    folder: Path, density: float, dtype: torch.dtype
) -> tuple[dict[str, Tensor], dict[str, Tensor], AdapterMetadata]:
    """Masters, common tensors and metadata of a checkpoint as if its supports were frozen now."""
    pruned = PrunedLayers(folder, density)
    masters: dict[str, Tensor] = {}
    supports = []
    for layer in range(len(pruned.sizes)):
        positions = pruned.positions(layer)
        kept = pruned.tensors(layer, positions, {"master"})
        masters |= {name: tensor.to(dtype) for (_, name), tensor in kept.items()}
        supports.append(pruned.support(layer, positions))
    return masters, pruned.common_tensors(supports), replace(pruned.metadata, support_hash=support_hash(supports))
