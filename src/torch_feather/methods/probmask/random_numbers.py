"""Counter-based random numbers: number i of a seed, on any device, without a generator.

A generator has a state, which would have to be saved for every device, and a captured graph would
repeat one draw. Number i of a seed needs no state but i.
"""

from __future__ import annotations

import torch
from torch import Tensor


def _signed(x: int) -> int:
    """Return a number modulo 2^64 as a signed 64-bit integer."""
    return (x & (2**64 - 1)) - (x >> 63 << 64)


_WEYL = _signed(0x9E3779B97F4A7C15)
_MIX_1, _MIX_2 = _signed(0xBF58476D1CE4E5B9), _signed(0x94D049BB133111EB)


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
    z = torch.arange(1, count + 1, device=position.device)
    z.add_(position).mul_(_WEYL).add_(_signed(seed % 2**64))
    # A shift of signed integers brings in copies of the sign, which are masked off.
    z.bitwise_xor_((z >> 30).bitwise_and_(2**34 - 1)).mul_(_MIX_1)
    z.bitwise_xor_((z >> 27).bitwise_and_(2**37 - 1)).mul_(_MIX_2)
    upper = z.bitwise_right_shift_(41).bitwise_and_(2**23 - 1)
    return upper.to(dtype).add_(0.5).mul_(2.0**-23)
