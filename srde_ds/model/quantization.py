"""Frozen bases whose linear maps are stored in 8 or 4 bits: loaded so, read, and counted."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable
from importlib.util import find_spec
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from transformers import BitsAndBytesConfig, PretrainedConfig

from srde_ds.config import ModelConfig
from srde_ds.errors import SRDEError
from srde_ds.model.float8 import Float8Linear, check_device, check_sizes

log = logging.getLogger(__name__)

FP32 = 4
BLOCK = 64  # weights in 4 bits that share a scale
SCALES = 256  # scales that share a scale of their own


class Packing(NamedTuple):
    """How linear maps are stored.

    Attributes:
        bits: 8 or 4.
        nested: with 4 bits: whether the scales are stored in 8 bits ("double quantisation").
        own: whether the package does it, see `float8.py`; else bitsandbytes.
    """

    bits: int
    nested: bool = False
    own: bool = False

    def stored_bytes(self, out: int, width: int) -> int:
        """Bytes of a matrix `[out, width]` with its scales."""
        values = out * width
        if self.bits == 8:  # and a scale for each output
            return values + out * FP32
        blocks, table = math.ceil(values / BLOCK), 2**4 * FP32
        packed = math.ceil(values / 2) + table
        if not self.nested:
            return packed + blocks * FP32
        return packed + blocks + math.ceil(blocks / SCALES) * FP32 + 2**8 * FP32 + FP32  # table and offset of scales


PACKINGS = {"int8": Packing(8), "nf4": Packing(4, nested=True), "fp8": Packing(8, own=True)}
"""Those of `base_quantization`"""


def packing_of(name: str, quantization: str, config: PretrainedConfig) -> Packing | None:
    """How the linear maps of a base will be stored; None: as plain matrices, or in a way that is not known here.

    Args:
        name: of the base, for the message.
        quantization: the option `base_quantization`.
        config: the base's configuration.

    Raises:
        SRDEError: the base is to be quantised, and its files already are.
    """
    stored: Any = getattr(config, "quantization_config", None)
    if stored is None:
        return PACKINGS.get(quantization)
    own = stored if isinstance(stored, dict) else stored.to_dict()
    if quantization != "none":
        raise SRDEError(
            f"base_quantization={quantization}: the files of model_name={name!r} are already quantised "
            f"({own.get('quant_method')}). Leave --base_quantization out, or give the unquantised base."
        )
    if own.get("load_in_8bit"):
        return PACKINGS["int8"]
    return Packing(4, bool(own.get("bnb_4bit_use_double_quant"))) if own.get("load_in_4bit") else None


def check_float8(config: ModelConfig, packing: Packing | None, shapes: Iterable[tuple[int, int]]) -> None:
    """Raise an SRDEError if a base is to be in FP8 and no GPU could multiply so.

    Args:
        shapes: `(out, in)` of its linear maps.
    """
    if packing is None or not packing.own:
        return
    if not config.bf16:
        raise SRDEError("base_quantization=fp8 with bf16=false: products in FP8 give bfloat16. Leave --bf16 false out.")
    check_sizes(shapes)


def check_quantized(config: ModelConfig, packing: Packing | None) -> None:
    """Raise an SRDEError if a base in 8 or 4 bits cannot be loaded or used on this machine."""
    if packing is None:
        return
    if packing.own:
        if torch.cuda.is_available():
            check_device(torch.device("cuda"))
    elif find_spec("bitsandbytes") is None:
        raise SRDEError(
            f"base_quantization={config.base_quantization}, model_name={config.model_name!r}: a base in {packing.bits} "
            "bits needs package 'bitsandbytes'. Install it with pip install 'srde-ds[quantized]', or give a plain base "
            "without this option."
        )


def loading_options(quantization: str, dtype: torch.dtype) -> BitsAndBytesConfig | None:
    """transformers' options for `base_quantization`; None: not quantised, or not by bitsandbytes.

    Args:
        dtype: of the products; the weights are turned into it as they are used.
    """
    # It would warn of each product in bfloat16, which it computes in float16.
    logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)
    if quantization == "int8":
        return BitsAndBytesConfig(load_in_8bit=True)
    if quantization == "nf4":
        return BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
        )
    return None


def keep_differentiable(base: nn.Module) -> None:
    """Keep bitsandbytes from repacking 4-bit weights for a CPU's bfloat16 instructions in a forward in eval mode.

    The repacked weights have coarser scales, and no gradient passes them, not even back in train mode. A warning says
    if that has happened before.
    """
    if any(_is_repacked(parameter) for parameter in base.parameters()):
        log.warning(
            "bitsandbytes has repacked the base's 4-bit weights for inference on this CPU, in a forward in eval mode. "
            "No gradient passes them: to train, load the base again and add the experts before any forward."
        )
    for module in base.modules():
        if "support_avx512bf16_for_cpu" in vars(module):
            vars(module)["support_avx512bf16_for_cpu"] = False


def weight_of(projection: nn.Module) -> Tensor | None:
    """The matrix of a linear-like module, which may be quantised; None if there is none, only packed buffers.

    So it is with GPTQ and AWQ, where `weight` is missing or only describes a matrix.
    """
    weight = getattr(projection, "weight", None)
    return weight if isinstance(weight, Tensor) else None


def dense_weight(projection: nn.Module) -> Tensor | None:
    """`weight_of`, dequantised if it is stored in 8 or 4 bits.

    None also if bitsandbytes has repacked it for inference, see `keep_differentiable`.
    """
    weight = weight_of(projection)
    if isinstance(projection, Float8Linear):
        return projection.dense()
    if weight is None or type(weight).__name__ not in ("Params4bit", "Int8Params"):
        return weight
    if _is_repacked(weight):
        return None
    from transformers.integrations.bitsandbytes import dequantize_bnb_weight  # late: it imports bitsandbytes

    with torch.no_grad():
        dense: Tensor = dequantize_bnb_weight(cast("nn.Parameter", weight), state=getattr(projection, "state", None))
    return dense


def _is_repacked(weight: Tensor) -> bool:
    return bool(getattr(getattr(weight, "quant_state", None), "packing_format_for_cpu", False))
