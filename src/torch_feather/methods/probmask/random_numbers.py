"""Counter-based random numbers: number i of a seed, on any device, without a generator.

A generator has a state, which would have to be saved for every device, and a captured graph would
repeat one draw. Number i of a seed needs no state but i.
"""

from __future__ import annotations

import functools

import numpy as np
import torch
from torch import Tensor

from ... import devices
from ...threads import scratch


def _signed(x: int) -> int:
    """Return a number modulo 2^64 as a signed 64-bit integer."""
    return (x & (2**64 - 1)) - (x >> 63 << 64)


_WEYL = _signed(0x9E3779B97F4A7C15)
_MIX_1, _MIX_2 = _signed(0xBF58476D1CE4E5B9), _signed(0x94D049BB133111EB)

_BLOCK = 1 << 15
"""Numbers at a time on a CPU; they stay in the cache."""


def uniform(seed: int, position: Tensor, count: int, dtype: torch.dtype) -> Tensor:
    """Return numbers `position`, `position` + 1, ... of the sequence of a seed, uniform in (0, 1).

    They are multiples of 2^-24 between 2^-24 and 1 - 2^-24, so that their logit is finite in
    float32, and the same in every type. Source: SplitMix64 (Steele et al., Fast splittable
    pseudorandom number generators, OOPSLA 2014), of which the upper 23 bits are taken.

    Args:
        seed: selects the sequence.
        position: 0-dimensional int64.
        count: how many numbers.
        dtype: float32 or float64.

    Example:
        >>> uniform(0, torch.tensor(0), 2, torch.float32).shape
        torch.Size([2])
    """
    if not devices.synchronizes(position.device):
        numbers = np.empty(count, np.float64 if dtype == torch.float64 else np.float32)
        write_uniform(numbers, seed, int(position))
        return torch.from_numpy(numbers)
    z = torch.arange(1, count + 1, device=position.device)
    z.add_(position).mul_(_WEYL).add_(_signed(seed % 2**64))
    # A shift of signed integers brings in copies of the sign, which are masked off.
    z.bitwise_xor_((z >> 30).bitwise_and_(2**34 - 1)).mul_(_MIX_1)
    z.bitwise_xor_((z >> 27).bitwise_and_(2**37 - 1)).mul_(_MIX_2)
    upper = z.bitwise_right_shift_(41).bitwise_and_(2**23 - 1)
    return upper.to(dtype).add_(0.5).mul_(2.0**-23)


def write_uniform(out: np.ndarray, seed: int, position: int) -> None:
    """Write the numbers of `uniform` on a CPU, with fewer operations: NumPy has unsigned integers.

    Args:
        out: float32 or float64, flat.
        seed: selects the sequence.
        position: of the first number.

    Example:
        >>> numbers = np.empty(2, np.float32)
        >>> write_uniform(numbers, seed=0, position=3)
        >>> bool((uniform(0, torch.tensor(3), 2, torch.float32).numpy() == numbers).all())
        True
    """
    for a in range(0, out.size, _BLOCK):
        part = out[a : a + _BLOCK]
        offset = np.uint64(((position + a) * _WEYL + seed) % 2**64)
        z = np.add(_multiples()[: part.size], offset, out=scratch("z", part.size, np.uint64))
        shifted = scratch("shifted", part.size, np.uint64)
        for shift, factor in _MIXES:
            z ^= np.right_shift(z, shift, out=shifted)
            z *= factor
        z >>= np.uint64(41)
        bits = scratch("bits", part.size, np.uint32)
        np.copyto(bits, z, casting="unsafe")
        # Behind the exponent of 1, these bits are a number in [1, 2), and the difference is exact.
        bits |= np.uint32(0x3F800000)
        np.subtract(bits.view(np.float32), np.float32(1 - 2.0**-24), out=part)


_MIXES = [(np.uint64(30), np.uint64(_MIX_1 % 2**64)), (np.uint64(27), np.uint64(_MIX_2 % 2**64))]


@functools.cache
def _multiples() -> np.ndarray:
    """Return 1 to `_BLOCK` times the increment of the sequence."""
    return np.arange(1, _BLOCK + 1, dtype=np.uint64) * np.uint64(_WEYL % 2**64)
