"""Groups of neighbouring weights that stay in a CPU's cache from one pass to the next."""

from __future__ import annotations

from typing import NamedTuple

from .checksum import ROW_BYTES
from .latent import LatentWeights

GROUP = 256 * ROW_BYTES // 4
"""Most weights in a group. For all types, a multiple of this begins at a row of a checksum."""


class Group(NamedTuple):
    """The local weights start to stop, of one type: whole tensors, or a range of one tensor.

    Example:
        >>> import torch
        >>> groups(LatentWeights([torch.ones(2), torch.ones(3)]))
        [Group(start=0, stop=5, ranges=[(0, 0, 2), (1, 0, 3)])]
    """

    start: int
    stop: int
    ranges: list[tuple[int, int, int]]
    """Position of each weight tensor, and its range in the order of memory."""


def groups(weights: LatentWeights) -> list[Group]:
    """Return all local weights in groups, in their order.

    Args:
        weights: the latent weights.

    Example:
        >>> import torch
        >>> [group.stop - group.start for group in groups(LatentWeights([torch.ones(300_000)]))]
        [260608, 39392]
    """
    return weights.constant("groups", _groups)


def _groups(weights: LatentWeights) -> list[Group]:
    found: list[Group] = []
    for part in weights.parts:
        inside = [
            (span, i)
            for i, span in enumerate(weights.local_spans)
            if span[0] < span[1] and part.start <= span[0] < part.stop
        ]
        joined: list[tuple[int, int, int]] = []
        size, end = 0, part.start
        for (start, stop), i in sorted(inside):
            length = stop - start
            if joined and size + length > GROUP:
                found.append(Group(end - size, end, joined))
                joined, size = [], 0
            if length > GROUP:
                for a in range(0, length, GROUP):
                    b = min(a + GROUP, length)
                    found.append(Group(start + a, start + b, [(i, a, b)]))
            else:
                joined.append((i, 0, length))
                size += length
            end = stop
        if joined:
            found.append(Group(end - size, end, joined))
    return found
