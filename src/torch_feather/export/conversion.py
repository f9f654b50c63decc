"""Values in other types: nothing overflows, and no nonzero value becomes zero."""

from __future__ import annotations

import torch
from torch import Tensor

INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def as_integers(tensor: Tensor) -> Tensor:
    """Return a view of a tensor that has an integer type of the same size.

    Example:
        >>> as_integers(torch.tensor([0.0, -0.0]))
        tensor([          0, -2147483648], dtype=torch.int32)
    """
    return tensor.view(INTEGERS[tensor.dtype.itemsize])


def is_zero(tensor: Tensor) -> Tensor:
    """Return which values are zero, of either sign; also for types that cannot be compared.

    Args:
        tensor: any shape; on a CPU.

    Example:
        >>> is_zero(torch.tensor([-0.0, 1.0, 0.0]).to(torch.float8_e5m2))
        tensor([ True, False,  True])
    """
    if tensor.is_complex():
        return is_zero(torch.view_as_real(tensor)).all(-1)
    bits = as_integers(tensor)
    if tensor.is_floating_point():
        bits = bits & (2 ** (8 * bits.itemsize - 1) - 1)  # without the sign
    return bits == 0


def without_negative_zeros(tensor: Tensor) -> Tensor:
    """Return a tensor in which -0.0 is 0.0, with the bits of all other values.

    The sign of a zero has no effect on a network, but its bits would have to be stored.

    Args:
        tensor: contiguous, on a CPU. It is not changed.

    Returns:
        The tensor itself if it has no -0.0.

    Example:
        >>> without_negative_zeros(torch.tensor([-0.0, -1.0]))
        tensor([ 0., -1.])
    """
    if tensor.is_complex():
        return torch.view_as_complex(without_negative_zeros(torch.view_as_real(tensor)))
    if not tensor.is_floating_point():
        return tensor
    bits = as_integers(tensor)
    negative = is_zero(tensor) & (bits != 0)
    if not negative.any():
        return tensor
    return bits.masked_fill(negative, 0).view(tensor.dtype)


def convert(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Return a tensor in another type.

    Floating-point values are rounded. A nonzero value that would become zero becomes the smallest
    number of the type and of its sign. Between other types, all values must be exact.

    Args:
        tensor: any shape, on any device.
        dtype: type of the result.

    Raises:
        OverflowError: the type cannot hold a value.

    Example:
        >>> convert(torch.tensor([1e-12, -0.5]), torch.float16)
        tensor([ 5.9605e-08, -5.0000e-01], dtype=torch.float16)
    """
    if tensor.dtype == dtype:
        return tensor
    if not tensor.dtype.is_floating_point or not dtype.is_floating_point:
        real = tensor.real if tensor.is_complex() and not dtype.is_complex else tensor
        converted = real.to(dtype)
        if not torch.equal(converted.to(tensor.dtype), tensor):
            raise OverflowError(f"values that {dtype} cannot hold exactly")
        return converted
    exact, converted = tensor.double(), tensor.to(dtype)
    rounded = converted.double()
    if ((exact.abs() > torch.finfo(dtype).max) & (exact != rounded)).any():
        raise OverflowError(f"values out of the range of {dtype}")
    lost = (rounded == 0) & (exact != 0)
    as_integers(converted)[lost] |= 1  # the smallest number of the same sign
    return converted
