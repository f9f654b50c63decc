"""Roots of float32 numbers in [0, 1], by operations that all processors compute alike.

Only additions, products, quotients, conversions and shifts of float32 numbers are used, each
rounded to nearest. So PyTorch on any device, NumPy and compiled code give the same bits. The error
of the cube root is at most 0.52 units in the last place.

Its method: the bits divided by three give a first approximation (error 3.4%), one Newton step an
error of 0.12%. It is rounded to 8 bits, so that its cube is exact. Then the relative residual
e = (x - y^3) / y^3 is exact but for one rounding, and y (1 + e)^(1/3) is computed from three terms
of its series.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

THIRD = 1 / 3
TWO_THIRDS = 2 / 3
SHIFT = 709982100.0
"""Added to the bits divided by three; chosen for the smallest error."""
HALF_BIT, TOP_BITS = 0x8000, -0x10000
"""Rounding to 8 significant bits."""
FIRST, SECOND, THIRD_TERM = 1 / 3, 1 / 9, 5 / 81
"""Coefficients of e, -e^2 and e^3 in the series."""


def square_root(x: Tensor) -> Tensor:
    """Return the square root of each number >= 0, correctly rounded.

    On a CPU, PyTorch's own square root of float32 numbers may differ in the last bit.

    Args:
        x: float32 or float64, any shape.

    Example:
        >>> square_root(torch.tensor([4.0, 0.25]))
        tensor([2.0000, 0.5000])
    """
    if x.dtype == torch.float32 and x.device.type == "cpu":
        return x.double().sqrt().float()
    return x.sqrt()


def cube_root(x: Tensor) -> Tensor:
    """Return the cube root of each number in [0, 1].

    Args:
        x: float32 or float64, any shape. float64 numbers are computed by `torch.pow`.

    Example:
        >>> cube_root(torch.tensor([0.0, 0.125, 1.0]))
        tensor([0.0000, 0.5000, 1.0000])
    """
    if x.dtype != torch.float32:
        return x.pow(THIRD)
    if torch.is_grad_enabled() and x.requires_grad:
        return _CubeRoot.apply(x)
    return _cube_root(x)


def _cube_root(x: Tensor) -> Tensor:
    y = (x.view(torch.int32).to(x.dtype) * THIRD + SHIFT).to(torch.int32).view(x.dtype)
    y = y * TWO_THIRDS + x / (y * y) * THIRD
    y = ((y.view(torch.int32) + HALF_BIT) & TOP_BITS).view(x.dtype)
    cube = y * y * y
    e = (x - cube) / cube
    correction = (FIRST - (SECOND - e * THIRD_TERM) * e) * e
    return torch.where(x == 0, x, y + correction * y)


class _CubeRoot(torch.autograd.Function):
    """Differentiable, since operations on bits are not."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return _cube_root(x)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        ctx.save_for_backward(output)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (root,) = ctx.saved_tensors
        return gradient / (3 * root * root)
