"""Prints `true` if bfloat16 is the faster training dtype on this machine, else `false` (float32).

On GPUs it is always true. On CPUs either may be faster (docs/decisions.md), so this is measured: forward and backward
of a feed-forward block of the quick start's base, in both dtypes.
"""

import time

import torch
from torch import nn


def seconds(dtype: torch.dtype) -> float:
    """Best of three timings of a block's forward and backward."""
    block = nn.Sequential(nn.Linear(576, 1536, bias=False), nn.SiLU(), nn.Linear(1536, 576, bias=False)).to(dtype)
    block.requires_grad_(False)
    x = torch.randn(512, 576, dtype=dtype, requires_grad=True)
    timings = []
    for _ in range(4):  # the first one warms up
        started = time.perf_counter()
        for _ in range(5):
            block(x).sum().backward()
        timings.append(time.perf_counter() - started)
    return min(timings[1:])


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(str(torch.cuda.is_available() or seconds(torch.bfloat16) < seconds(torch.float32)).lower())
