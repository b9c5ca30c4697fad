"""Gathers small values of all ranks as JSON. Unlike pickle, it executes nothing that another process sends."""

from __future__ import annotations

import json
from typing import Any

import torch
import torch.distributed as dist


def gather_json(value: Any, device: torch.device, group: dist.ProcessGroup | None = None) -> list[Any]:
    """Every rank's value, by rank, after a trip through JSON; a collective of `group`, by default of all ranks.

    Args:
        device: device of the tensors that carry the values; under NCCL, a GPU.

    Raises:
        TypeError: a value cannot be written as JSON.
    """
    own = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8).to(device)
    sizes = torch.empty(dist.get_world_size(group), dtype=torch.int64, device=device)
    dist.all_gather_into_tensor(sizes, torch.tensor([len(own)], device=device), group=group)
    longest = int(sizes.max())
    padded = torch.zeros(longest, dtype=torch.uint8, device=device)
    padded[: len(own)] = own
    everyone = torch.empty(len(sizes), longest, dtype=torch.uint8, device=device)
    dist.all_gather_into_tensor(everyone.view(-1), padded, group=group)
    texts = zip(everyone.cpu(), sizes.tolist(), strict=True)
    return [json.loads(bytes(text[:size].tolist())) for text, size in texts]
