"""Counts over all values of a tensor, on a CPU block by block without masks in memory."""

from __future__ import annotations

import ctypes
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from .. import devices
from ..threads import for_each

BLOCK = 1 << 16
"""Values at a time on a CPU."""
KNOWN = {torch.float32: np.float32, torch.float64: np.float64, torch.bool: np.bool_}
"""Types that NumPy compares fast."""


def count_zeros(tensor: Tensor) -> Tensor:
    """Return the number of values that are 0, a 0-dimensional int64.

    Example:
        >>> count_zeros(torch.tensor([0.0, -0.0, 1.0]))
        tensor(2)
    """
    if tensor.is_floating_point() and tensor.itemsize == 1:
        tensor = tensor.float()  # there is no count_nonzero for 8 bits
    return _count(tensor, lambda x: x == 0, lambda x: x.numel() - x.count_nonzero())


def count_nan(tensor: Tensor) -> Tensor:
    """Return the number of values that are NaN, a 0-dimensional int64.

    Example:
        >>> count_nan(torch.tensor([0.0, torch.nan, torch.inf]))
        tensor(1)
    """
    return _count(tensor, lambda x: x != x, lambda x: x.isnan().sum())


def count_not_finite(tensor: Tensor) -> Tensor:
    """Return the number of values that are NaN or infinite, a 0-dimensional int64.

    Example:
        >>> count_not_finite(torch.tensor([0.0, torch.nan, torch.inf]))
        tensor(2)
    """
    return _count(tensor, lambda x: ~np.isfinite(x), lambda x: x.isfinite().logical_not_().sum())


def count_true(mask: Tensor) -> Tensor:
    """Return the number of True, a 0-dimensional int64.

    Example:
        >>> count_true(torch.tensor([True, False, True]))
        tensor(2)
    """
    return _count(mask, lambda x: x, torch.sum)


def _count(
    tensor: Tensor,
    of_array: Callable[[np.ndarray], np.ndarray],
    of_tensor: Callable[[Tensor], Tensor],
) -> Tensor:
    """Return the number of values with a property.

    Args:
        tensor: the values.
        of_array: returns which values of an array have it.
        of_tensor: returns their number in a tensor of any type.
    """
    tensor = tensor.detach()
    known = tensor.dtype in KNOWN and tensor.layout == torch.strided and type(tensor) is Tensor
    if not known or devices.synchronizes(tensor.device):
        return of_tensor(tensor)
    order = sorted(range(tensor.dim()), key=tensor.stride, reverse=True)
    ordered = tensor.permute(order)
    if not ordered.is_contiguous():
        return of_tensor(tensor)
    flat = _memory(ordered)
    counts = for_each(
        lambda a: int(np.count_nonzero(of_array(flat[a : a + BLOCK]))),
        range(0, flat.size, BLOCK),
    )
    return torch.tensor(sum(counts))


def _memory(tensor: Tensor) -> np.ndarray:
    """Return the memory of a contiguous tensor as a flat array, valid as long as the tensor.

    `Tensor.numpy` would make the storage of the tensor fixed in size, and `fully_shard` could no
    longer free a gathered parameter.
    """
    if tensor.numel() == 0:
        return np.empty(0, KNOWN[tensor.dtype])
    memory = (ctypes.c_byte * tensor.nbytes).from_address(tensor.data_ptr())
    return np.frombuffer(memoryview(memory), KNOWN[tensor.dtype])
