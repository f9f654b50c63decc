"""How activations lie in memory: a plane of pixels per channel, with zeros around the images.

    channel 0: image 0, image 1, ...; channel 1: image 0, ...

A row is followed by enough zeros for what looks over its end, or back over the start of the next;
an image by enough rows of zeros. Planes of one grid have the same layout, so that the pixels that a
weight meets are a constant distance from those it contributes to.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from .kernels import aligned
from .layer import Layer

LINE = 16  # floats in a cache line, and in the widest vector


def round_up(n: int) -> int:
    """To whole lines."""
    return -(-n // LINE) * LINE


class Grid:
    """A layout of planes, as large as its users need; joined with others it becomes one of them."""

    def __init__(self, height: int, width: int) -> None:
        self.height, self.width, self.pad_y, self.pad_x = height, width, 0, 0
        self._joined: Grid | None = None

    def root(self) -> Grid:
        """The grid that this one has become."""
        return self if self._joined is None else self._joined.root()

    def join(self, other: Grid) -> None:
        """Make both the same."""
        a, b = self.root(), other.root()
        if a is not b:
            b._joined = a
            a.require(b.height, b.width, b.pad_y, b.pad_x)

    def require(self, height: int, width: int, pad_y: int, pad_x: int) -> None:
        """Hold images of that size with zeros so far around them."""
        me = self.root()
        me.height, me.width = max(me.height, height), max(me.width, width)
        me.pad_y, me.pad_x = max(me.pad_y, pad_y), max(me.pad_x, pad_x)

    @property
    def pitch(self) -> int:
        """Pixels from a row to the next."""
        return self.width + self.pad_x

    @property
    def image(self) -> int:
        """Pixels from an image to the next."""
        return (self.height + self.pad_y) * self.pitch

    @property
    def edge(self) -> int:
        """Pixels that may be looked at before the first and after the last."""
        return round_up(self.pad_y * self.pitch + self.pad_x)

    def plane(self, batch: int) -> int:
        """Pixels from a channel to the next."""
        return round_up(batch * self.image)


@dataclass(eq=False)
class Planes:
    """An activation of this layout.

    Attributes:
        shape: of one sample, as PyTorch has it: (channels, height, width), or (..., channels).
        linear: the channels are the last dimension; all others together are one row of pixels.
    """

    grid: Grid
    channels: int
    height: int
    width: int
    shape: tuple[int, ...]
    linear: bool = False

    def pixels(self, batch: int) -> int:
        """Size in memory, with the edges."""
        grid = self.grid.root()
        return 2 * grid.edge + LINE + self.channels * grid.plane(batch)

    def view(self, memory: Tensor, batch: int) -> Tensor:
        """As PyTorch's shape; `memory` holds `pixels(batch)` floats."""
        grid = self.grid.root()
        plane, start = grid.plane(batch), memory.storage_offset() + grid.edge
        if not self.linear:
            shape = (batch, self.channels, self.height, self.width)
            return memory.as_strided(shape, (grid.image, plane, grid.pitch, 1), start)
        strides = [1]
        for n in self.shape[-2:0:-1]:
            strides.append(strides[-1] * n)
        inner = tuple(reversed(strides[: len(self.shape) - 1]))
        return memory.as_strided((batch, *self.shape), (grid.image, *inner, plane), start)

    def mask(self, batch: int) -> np.ndarray | None:
        """int32 (plane,): all bits set where there are pixels; None where nothing lies between."""
        grid = self.grid.root()
        if (grid.height, grid.width, grid.pad_y, grid.pad_x) == (self.height, self.width, 0, 0):
            return None
        mask = np.zeros(grid.plane(batch), np.int32)
        images = mask[: batch * grid.image].reshape(batch, grid.height + grid.pad_y, grid.pitch)
        images[:, : self.height, : self.width] = -1
        return mask


@dataclass(frozen=True)
class Taps:
    """The nonzero weights of a layer, and what each looks at.

    The input of a layer with stride is split: phase (a, b) has the pixels of every stride-th row
    from a and column from b, and is a channel of its own.

    Attributes:
        values: the weights, by output channel.
        out: the output channel.
        key: a number for (channel, dy, dx).
        channel: of the (split) input.
        dy, dx: rows and columns from the output's pixel.
        phases: of the input, each (row, column); ((0, 0),) without stride.
        channels: of the output.
    """

    values: np.ndarray
    out: np.ndarray
    key: np.ndarray
    channel: np.ndarray
    dy: np.ndarray
    dx: np.ndarray
    phases: tuple[tuple[int, int], ...]
    channels: int

    @classmethod
    def of(cls, layer: Layer) -> Taps:
        """Those of a layer."""
        weight = layer.weight.reshape(*layer.weight.shape[:2], *layer.weight.shape[2:] or (1, 1))
        out, per_group, *kernel = weight.shape
        o, c, ky, kx = weight.numpy().nonzero()
        values = weight.numpy()[o, c, ky, kx].astype(np.float32)
        c = c + o // (out // layer.groups) * per_group
        y = ky * layer.dilation[0] - layer.padding[0]
        x = kx * layer.dilation[1] - layer.padding[1]
        (dy, a), (dx, b) = np.divmod(y, layer.stride[0]), np.divmod(x, layer.stride[1])
        used, phase = np.unique(a * layer.stride[1] + b, return_inverse=True)
        phases = tuple(divmod(int(p), layer.stride[1]) for p in used) or ((0, 0),)
        channel = phase * layer.channels[0] + c
        key = (c * kernel[0] + ky) * kernel[1] + kx
        return cls(values, o, key, channel, dy, dx, phases, out)

    @property
    def reach(self) -> tuple[int, int]:
        """How far rows and columns look at most."""
        return int(np.abs(self.dy).max(initial=0)), int(np.abs(self.dx).max(initial=0))

    def grouped(self, size: int) -> Grouped:
        """With `size` output channels, which divides them, to a group.

        Channels with about as many taps are put together: what one of a group needs is done for
        all of them.
        """
        counts = np.bincount(self.out, minlength=self.channels)
        order = np.argsort(counts, kind="stable") if size > 1 else np.arange(self.channels)
        place = np.empty(self.channels, np.int64)
        place[order] = np.arange(self.channels)
        group, member = np.divmod(place[self.out], size)
        most = int(self.key.max(initial=0)) + 1
        found, first, tap = np.unique(
            group * most + self.key, return_index=True, return_inverse=True
        )
        values = np.zeros((len(found), size), np.float32)
        values[tap, member] = self.values
        rows = np.zeros(self.channels // size + 1, np.int32)
        np.cumsum(np.bincount(group[first], minlength=len(rows) - 1), out=rows[1:])
        where = self.channel[first], self.dy[first], self.dx[first]
        return Grouped(order.astype(np.int32), rows, values, *where)


@dataclass(frozen=True)
class Grouped:
    """Taps of groups of output channels.

    Attributes:
        order: (out,) the output channels, group after group.
        rows: (groups + 1,) where each group begins.
        values: (taps, size of a group).
        channel, dy, dx: as in `Taps`.
    """

    order: np.ndarray
    rows: np.ndarray
    values: np.ndarray
    channel: np.ndarray
    dy: np.ndarray
    dx: np.ndarray

    def table(self, grid: Grid, batch: int) -> np.ndarray:
        """int32 (taps, 1 + size): the pixels from the output's to that looked at; the values.

        Raises:
            OverflowError: planes of more than 2^31 pixels.
        """
        grid = grid.root()
        offsets = self.channel * grid.plane(batch) + self.dy * grid.pitch + self.dx
        if offsets.max(initial=0) > np.iinfo(np.int32).max - 2 * grid.edge:
            raise OverflowError
        size = 1 + self.values.shape[1]
        table = aligned(size * len(offsets), np.int32).reshape(len(offsets), size)
        table[:, 0] = offsets
        table[:, 1:] = self.values.view(np.int32)
        return table

    def blocks(self, count: int) -> np.ndarray:
        """(count + 1,): cuts the groups into parts of about as much work."""
        groups = len(self.rows) - 1
        work = self.rows[1:] + np.arange(1, groups + 1) * 4  # a group costs some taps by itself
        wanted = work[-1] * np.arange(1, count) / count
        return np.array([0, *np.searchsorted(work, wanted), groups], np.int64)


def split_size(size: int, stride: int, phases: Iterable[int]) -> int:
    """The most pixels that one of the phases has of `size`."""
    return max(max(0, -(-(size - phase) // stride)) for phase in phases)
