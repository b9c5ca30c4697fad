"""The names of dtypes, and which of them a machine is slow at."""

from __future__ import annotations

import logging

import torch

_log = logging.getLogger(__name__)

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "I64": torch.int64,
    "I32": torch.int32,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
"""Dtypes by their name in safetensors files"""
SLOW_CPUS = {"NO AVX", "AVX2"}
"""What torch calls x86 processors without AVX-512"""
SAFETENSORS_NAMES = {dtype: name for name, dtype in DTYPES.items()}


def dtype_name(dtype: torch.dtype) -> str:
    """The name of a dtype in options and configurations, such as "bfloat16"."""
    return str(dtype).removeprefix("torch.")


def warn_of_slow_bfloat16(bf16: bool) -> None:
    """Warn if a run that could as well be in float32 would be much slower in bfloat16.

    Without AVX-512 a CPU converts the operands of every product: a block took 24 times as long (cpu_dtype.json).
    """
    slow = not torch.cuda.is_available() and torch.backends.cpu.get_cpu_capability() in SLOW_CPUS
    if bf16 and slow:
        _log.warning("bf16=true: this CPU has no instructions for bfloat16. --bf16 false is several times as fast.")
