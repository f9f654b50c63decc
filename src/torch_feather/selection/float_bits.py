"""The bits of non-negative floats as integers of the same order."""

from __future__ import annotations

from typing import NamedTuple

import torch


class FloatBits(NamedTuple):
    """The bits of the non-negative numbers of a float type, read as integers.

    Example:
        >>> bits = FLOAT_BITS[torch.float32]
        >>> int(torch.tensor(torch.inf).view(bits.integer)) == bits.infinity
        True
    """

    integer: torch.dtype
    """Integer type of the same size."""
    infinity: int
    """The bits of infinity."""
    digits: tuple[int, ...]
    """Widths in bits of the digits, most significant first; together all bits but the sign."""


FLOAT_BITS = {
    torch.float32: FloatBits(torch.int32, 0x7F80_0000, (11, 10, 10)),
    torch.float64: FloatBits(torch.int64, 0x7FF0_0000_0000_0000, (11, 11, 11, 10, 10, 10)),
}


def wide(dtype: torch.dtype) -> torch.dtype:
    """Return the type in which numbers of a floating type are ranked.

    Example:
        >>> wide(torch.bfloat16), wide(torch.float64)
        (torch.float32, torch.float64)
    """
    return torch.float64 if dtype == torch.float64 else torch.float32
