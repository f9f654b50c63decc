"""Aligned memory, memory that is never written, freed memory, and garbage collection."""

from __future__ import annotations

import ctypes
import functools
import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

LINE = 16  # float32 values in a cache line, and in the widest vector


def round_up(n: int) -> int:
    """Round a number of float32 values up to whole cache lines.

    Example:
        >>> round_up(17)
        32
    """
    return -(-n // LINE) * LINE


def aligned_zeros(count: int, dtype: Any = np.float32) -> np.ndarray:
    """Return a one-dimensional array of zeros that starts at a cache line.

    Args:
        count: number of elements.
        dtype: their type.

    Example:
        >>> aligned_zeros(100).ctypes.data % 64
        0
    """
    size = count * np.dtype(dtype).itemsize
    memory = np.zeros(size + 64, np.uint8)
    start = -memory.ctypes.data % 64
    return memory[start : start + size].view(dtype)


def zeros_like(tensor: Tensor) -> Tensor:
    """Return zeros of the same shape and strides. Until they are written, they take no memory.

    Args:
        tensor: a tensor or parameter; of other types, it is returned itself.

    Example:
        >>> zeros_like(torch.ones(2, 3).t()).stride()
        (1, 3)
    """
    if type(tensor) not in (Tensor, nn.Parameter):
        return tensor
    size = 1 + sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))
    count = (size if tensor.numel() else 0) * tensor.element_size()
    # torch.zeros would write the zeros. NumPy lets the system provide them when they are read.
    memory = torch.from_numpy(np.zeros(count, np.uint8)).view(tensor.dtype)
    zeros = memory.as_strided(tensor.shape, tensor.stride())
    if isinstance(tensor, nn.Parameter):
        return nn.Parameter(zeros, requires_grad=tensor.requires_grad)
    return zeros


@contextmanager
def without_collections() -> Iterator[None]:
    """Pause Python's garbage collection.

    The objects of a capture would start a collection of all objects of the process, which takes
    0.2 s after `import timm`, and finds next to nothing.

    Example:
        >>> with without_collections():
        ...     gc.isenabled()
        False
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def return_freed_memory() -> None:
    """Return freed memory to the system.

    The C library keeps it for later allocations. But those of a large weight rarely fit into the
    gaps that smaller ones left. This takes about 5 ms.

    Example:
        >>> return_freed_memory()
    """
    if (trim := _malloc_trim()) is not None:
        trim(0)


@functools.cache
def _malloc_trim() -> Callable[[int], int] | None:
    try:
        return ctypes.CDLL(None).malloc_trim
    except (AttributeError, OSError, TypeError):  # only the GNU C library has it
        return None
