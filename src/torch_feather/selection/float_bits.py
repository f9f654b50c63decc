"""How non-negative floats read as integers of the same order."""

from __future__ import annotations

from typing import NamedTuple

import torch


class FloatBits(NamedTuple):
    """How the non-negative numbers of a float type read as integers."""

    integer: torch.dtype
    infinity: int
    digits: tuple[int, ...]
    """Widths in bits of the digits, most significant first; together all bits but the sign."""


FLOAT_BITS = {
    torch.float32: FloatBits(torch.int32, 0x7F80_0000, (11, 10, 10)),
    torch.float64: FloatBits(torch.int64, 0x7FF0_0000_0000_0000, (11, 11, 11, 10, 10, 10)),
}
