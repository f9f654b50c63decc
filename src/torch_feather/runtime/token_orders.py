"""Orders of the tokens of a sample: windows, cyclic shifts, and neighbors as channels.

Such functions move the same tokens in all channels. In planes, each channel is a row of memory, so
one table of positions describes them all.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from .dimensions import CHANNEL, Dimensions, Part


class Order(NamedTuple):
    """Where the tokens of a sample are.

    Attributes:
        table: int32 (groups, tokens): position in memory. If neighbors became channels, there are
            several groups of channels, and fewer tokens.
        first: first channel.
        channels: number of channels of a group.

    Example:
        >>> Order(np.array([[1, 0]], np.int32), first=0, channels=8).table.shape
        (1, 2)
    """

    table: np.ndarray
    first: int
    channels: int

    def after(self, before: np.ndarray | None) -> Order:
        """Return the order in memory, if positions are those of an order before.

        Example:
            >>> order = Order(np.array([[1, 0]], np.int32), 0, 8)
            >>> order.after(np.array([5, 7], np.int32)).table.tolist()
            [[7, 5]]
        """
        return self if before is None else self._replace(table=before[self.table])


def order_of(values: Sequence[Dimensions], batches: Sequence[int], count: int) -> Order | None:
    """Return the order of tokens in a view of all of them, whose last dimension is channels.

    Args:
        values: dimensions of the view for each batch size.
        batches: batch sizes.
        count: tokens of a sample.

    Returns:
        None if a token is missing or repeated, or the order differs between samples.

    Example:
        >>> x = Dimensions.strided((1, 2, 3, 8), (6, 1, 2, CHANNEL))
        >>> order_of([x], batches=[1], count=6).table.tolist()
        [[0, 2, 4, 1, 3, 5]]
    """
    found: list[Order] = []
    for x, batch in zip(values, batches, strict=True):
        *neighbors, channel = x.merged(len(x.parts) - 1) or [(1, 0)]
        first, rest = divmod(x.offset, CHANNEL)
        if rest or channel[1] != CHANNEL:
            return None
        tokens = _positions(x.parts[:-1]).reshape(-1)
        index = _positions([neighbors]).reshape(-1, 1) + tokens
        if index.size != batch * count or (np.sort(index, axis=None) != range(index.size)).any():
            return None
        if index.shape[1] % batch:
            return None
        samples = index.reshape(len(index), batch, -1) - count * np.arange(batch)[:, None]
        if (samples != samples[:, :1]).any():
            return None
        found.append(Order(samples[:, 0].astype(np.int32), first, channel[0]))
    is_same = all(o[1:] == found[0][1:] and np.array_equal(o.table, found[0].table) for o in found)
    return found[0] if is_same else None


def rolled(
    x: Dimensions, shifts: Sequence[int], dims: Sequence[int], batch: int, count: int
) -> np.ndarray | None:
    """Return the positions of the tokens of a sample after a cyclic shift; None as in `order_of`.

    Args:
        x: dimensions before.
        shifts: of each dimension.
        dims: shifted dimensions.
        batch: batch size.
        count: tokens of a sample.

    Example:
        >>> rolled(Dimensions.strided((1, 4, 8), (4, 1, CHANNEL)), [1], [1], 1, 4).tolist()
        [3, 0, 1, 2]
    """
    rank = len(x.parts)
    dims = [d % rank for d in dims]
    if rank - 1 in dims or len(dims) != len(shifts) or order_of([x], [batch], count) is None:
        return None
    if x.merged(rank - 1)[:-1]:  # neighbors are channels
        return None
    tokens = np.roll(_positions(x.parts[:-1]), shifts, dims).reshape(batch, -1)
    samples = tokens - count * np.arange(batch)[:, None]
    if samples.shape[1] != count or (samples != samples[:1]).any():
        return None
    found: np.ndarray = samples[0].astype(np.int32)
    return found


def _positions(parts: Sequence[Sequence[Part]]) -> np.ndarray:
    """Return the sums of strides for each combination of indices, of shape (size of dim, ...)."""
    found = np.zeros((), np.int64)
    for dim in parts:
        one = np.zeros(1, np.int64)
        for size, stride in dim:
            one = (one[:, None] + stride * np.arange(size)).reshape(-1)
        found = found[..., None] + one
    return found
