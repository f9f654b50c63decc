"""Roots and powers of float32 numbers, computed alike by all processors where possible.

The cube root uses only sums, products and quotients of float32 numbers, each rounded to nearest,
and operations on whole numbers. So PyTorch on any device, NumPy and compiled code give the same
bits. Its error is at most 0.74 units in the last place.

Its method: the bits divided by three give a first approximation y (error 3.2%). One step of Halley,
y (2 - 3 / (x / y^3 + 2)), leaves an error of 0.002%, and one step of Newton that of rounding. NumPy
needs a pass for each operation, so the steps are the ones with the fewest operations.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

THIRD = 1 / 3
START = 0x2A510800
"""Added to the bits divided by three; chosen for the smallest error."""


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


def power(x: Tensor, exponent: float) -> Tensor:
    """Return x^exponent of numbers >= 0.

    On a CPU, PyTorch's own float32 powers differ in the last bit between the end of a tensor and
    its rest, so that results would depend on blocks and threads. Those of float64 differ too, but
    hardly ever after rounding to float32.

    Args:
        x: float32 or float64, any shape.
        exponent: any number > 0.

    Example:
        >>> power(torch.tensor([4.0, 0.25]), 1.5)
        tensor([8.0000, 0.1250])
    """
    if x.dtype == torch.float32 and x.device.type == "cpu":
        return x.double().pow(exponent).float()
    return x.pow(exponent)


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
    y = (torch.div(x.view(torch.int32), 3, rounding_mode="floor") + START).view(x.dtype)
    three = x.new_full((), 3.0)  # a number over a tensor would be rounded twice
    y = y * (2 - three / (x / (y * y * y) + 2))
    y = y + (x / (y * y) - y) * THIRD
    return torch.where(x == 0, x, y)


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
