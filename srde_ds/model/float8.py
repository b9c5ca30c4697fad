"""Frozen linear maps in 8-bit floating point, for tensor cores that multiply such numbers (NVIDIA Hopper and later).

Weights are stored in e4m3 with a scale for each output; inputs are rounded to it as they come, with a scale for each
token (row-wise scaling, see torch's `_scaled_mm`). One copy of a weight serves both directions: the backward takes its
scales into the gradient before that is rounded, and transposes the weight on the fly.

    >>> linear = torch.nn.Linear(64, 32, bias=False).bfloat16()
    >>> x = torch.randn(3, 64).bfloat16()
    >>> found, expected = Float8Linear.of(linear)(x), linear(x)
    >>> bool((found - expected).norm() < 0.06 * expected.norm())
    True
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from srde_ds.errors import SRDEError

E4M3 = torch.float8_e4m3fn
LARGEST = torch.finfo(E4M3).max
PRODUCT_DEVICES = {"cuda"}  # torch 2.11 has no such product on a CPU
MULTIPLE = 16
"""The products take matrices whose sizes are multiples of this."""
OLDEST_GPU = (9, 0)
"""Compute capability from which a GPU multiplies with row-wise scales"""


def rowwise(values: Tensor) -> tuple[Tensor, Tensor]:
    """`[N, width]` in e4m3, and the scale `[N, 1]` fp32 by which each of the N is to be multiplied."""
    scale = values.abs().amax(1, keepdim=True).float() / LARGEST
    scale = scale.where(scale > 0, 1.0)  # where all are zero
    return (values / scale).to(E4M3), scale


def scaled_product(a: Tensor, b: Tensor, scale_a: Tensor, scale_b: Tensor, dtype: torch.dtype) -> Tensor:
    """`[N, M]`: a b, with the scales of a's N rows and of b's M columns.

    Args:
        a: `[N, K]` e4m3, one row after the other in memory.
        b: `[K, M]` e4m3, one column after the other.
        scale_a, scale_b: `[N, 1]` and `[1, M]` fp32.
    """
    if a.device.type in PRODUCT_DEVICES:
        return torch._scaled_mm(a, b, scale_a=scale_a, scale_b=scale_b, out_dtype=dtype)
    return (a.float() @ b.float() * scale_a * scale_b).to(dtype)


class Float8Product(torch.autograd.Function):
    """x W^T for a frozen W: `[N, in]` -> `[N, out]`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
        """Multiply.

        Args:
            x: `[N, in]` bfloat16.
            weight: `[out, in]` e4m3.
            scale: `[out, 1]` fp32.
        """
        ctx.save_for_backward(weight, scale)
        rounded, own = rowwise(x)
        return scaled_product(rounded, weight.T, own, scale.T, x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, of_y: Tensor) -> tuple[Tensor, None, None]:
        """The gradient of x."""
        weight, scale = ctx.saved_tensors
        rounded, own = rowwise(of_y * scale.T)
        column_major = weight.T.contiguous().T
        ones = scale.new_ones(1, weight.shape[1])
        return scaled_product(rounded, column_major, own, ones, of_y.dtype), None, None


class Float8Linear(nn.Module):
    """A frozen linear map with its weight in e4m3.

    Attributes:
        weight: `[out, in]` e4m3.
        scale: `[out, 1]` fp32.
        bias: `[out]`, or None.
    """

    scale: Tensor

    def __init__(self, weight: Tensor, scale: Tensor, bias: nn.Parameter | None) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.register_buffer("scale", scale)
        self.bias = bias

    @staticmethod
    @torch.no_grad()
    def of(linear: nn.Linear) -> Float8Linear:
        """The map with its weight rounded."""
        return Float8Linear(*rowwise(linear.weight), linear.bias)

    def forward(self, x: Tensor) -> Tensor:
        """`[..., in]` -> `[..., out]` in bfloat16."""
        y: Tensor = Float8Product.apply(x.flatten(0, -2), self.weight, self.scale)
        return (y if self.bias is None else y + self.bias).unflatten(0, x.shape[:-1])

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Move to a device; another dtype would change what the weight's bits mean."""

        def move(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

        return super()._apply(move, recurse)

    def dense(self) -> Tensor:
        """`[out, in]` fp32: the weight that the products are made with."""
        return self.weight.float() * self.scale


def to_float8(base: nn.Module, keep: nn.Module | None) -> None:
    """Replace all linear maps of a base, apart from `keep`, the head. It then counts as quantised."""
    for owner in list(base.modules()):
        for name, child in owner.named_children():
            if type(child) is not nn.Linear or child is keep:
                continue
            setattr(owner, name, Float8Linear.of(child))
    # As transformers notes it. Nothing reads files of such weights; it would take them for plain ones.
    vars(base).update(is_quantized=True, save_pretrained=_refuse_to_save)


def _refuse_to_save(*_: object, **__: object) -> None:
    raise SRDEError(
        "base_quantization=fp8: a base in this form cannot be saved. Load it without the option to save it."
    )


def check_sizes(shapes: Iterable[tuple[int, int]]) -> None:
    """Raise an SRDEError if a map `(out, in)` does not fit the products."""
    for out, width in shapes:
        if out % MULTIPLE or width % MULTIPLE:
            raise SRDEError(
                f"base_quantization=fp8: the base maps {width} values to {out}, and products in FP8 need multiples of "
                f"{MULTIPLE}. Give --base_quantization int8 or nf4."
            )


def check_device(device: torch.device) -> None:
    """Raise an SRDEError if a GPU is too old. A CPU does the same arithmetic slowly."""
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < OLDEST_GPU:
        raise SRDEError(
            f"base_quantization=fp8: {torch.cuda.get_device_name(device)} cannot multiply in FP8 with row-wise scales. "
            "Give a Hopper GPU (H100) or a later one, or --base_quantization int8 or nf4."
        )
