"""Shapes of the convolution kernels."""

from __future__ import annotations

import functools
from typing import NamedTuple


class Tile(NamedTuple):
    """The part of the output that a convolution kernel keeps in registers.

    The channels of a tile share each load of a pixel and process the union of their taps. Several
    channels pay off if few weights are zero.

    Attributes:
        vectors: vectors of consecutive pixels.
        width: float32 values in a vector.
        channels: output channels.

    Example:
        >>> Tile(vectors=2, width=8)
        Tile(vectors=2, width=8, channels=1)
    """

    vectors: int
    width: int
    channels: int = 1


@functools.cache
def tiles(widths: tuple[int, ...]) -> tuple[Tile, ...]:
    """Return all tiles that have kernels.

    Args:
        widths: vector widths of the processor in float32 values, widest first.

    Example:
        >>> max(tile.width for tile in tiles((8,)))
        8
    """
    widest = widths[0]
    single = {16: (*range(1, 11), 13, 15, 16), 8: (2, 4, 6, 8, 10, 13), 4: (1, 2, 4, 8, 13)}
    found = [Tile(n, w) for w in widths for n in single[w]]
    if widest == 16:  # AVX-512, which has 32 registers
        shared = {2: (1, 2, 3, 4, 6, 8, 9), 4: (1, 2, 3, 4, 5, 6), 8: (1, 2, 3)}
    else:
        shared = {2: (1, 2, 3, 4), 4: (1, 2)}
    found += [Tile(n, widest, channels) for channels, ns in shared.items() for n in ns]
    return tuple(found)
