"""Where the nonzeros of a sparse tensor are, in few bits: the gaps between them.

A code of `width` bits below the largest one, `escape` = 2^width - 1, says: skip that many zeros,
then comes a value. The escape itself says: skip `escape` zeros, no value. So width 1 is a bitmask
(a 0 for each value), and wider codes are run lengths; the width is chosen per tensor so that the
codes are shortest. With a share d of random nonzeros they take 1 bit per weight at d = 0.5, 6.2
bits per nonzero at d = 0.05 and 8.7 at d = 0.01; 16-bit columns of CSR take 16 and row pointers.
"""

from __future__ import annotations

import numpy as np

WIDTHS = range(1, 17)

Array = np.ndarray


def encode(positions: Array) -> tuple[Array, int]:
    """The codes of rising `positions` (int64), packed into uint8 from the lowest bit on; width.

    What is left of the last byte is filled with ones, which a reader takes for escapes.
    """
    gaps = np.diff(positions, prepend=-1) - 1
    width = _best_width(gaps)
    escape = 2**width - 1
    escapes, rest = np.divmod(gaps, escape)
    last = np.cumsum(escapes + 1) - 1  # where each position's own code stands
    codes = np.full(last[-1] + 1 if len(last) else 0, escape, dtype="<u2")
    codes[last] = rest
    bits = np.unpackbits(
        codes.view(np.uint8).reshape(-1, 2), axis=1, count=width, bitorder="little"
    ).reshape(-1)
    filling = np.ones(-len(bits) % 8, dtype=np.uint8)
    return np.packbits(np.concatenate([bits, filling]), bitorder="little"), width


def _best_width(gaps: Array) -> int:
    lengths, counts = np.unique(gaps, return_counts=True)
    return min(WIDTHS, key=lambda w: w * int(np.sum(counts * (lengths // (2**w - 1) + 1))))


def decode(packed: Array, width: int, count: int, size: int) -> Array:
    """The rising positions (int64) of `count` nonzeros among `size` weights.

    Raises:
        ValueError: these bytes do not say that.
    """
    bits = np.unpackbits(packed, bitorder="little")
    whole = bits[: len(bits) // width * width].reshape(-1, width)
    codes = np.packbits(whole, axis=1, bitorder="little").view("u1" if width <= 8 else "<u2")[:, 0]
    escape = 2**width - 1
    ends = codes != escape
    positions = np.cumsum(codes + ends, dtype=np.int64)[ends] - 1
    if len(positions) != count:
        raise ValueError(f"{len(positions)} positions for {count} values")
    if count and positions[-1] >= size:
        raise ValueError(f"position {positions[-1]} in a tensor of {size}")
    return positions
