"""The memory layout of activations: one plane of pixels per channel, with padding around images.

    channel 0: image 0, image 1, ...; channel 1: image 0, image 1, ...

Each row is followed by enough padding for windows that extend over its end or over the start of
the next row. Each image is followed by enough rows of padding. Activations that share a layout have
the same strides, so that a weight is a constant distance between input and output pixels.
"""

from __future__ import annotations

from collections.abc import Iterable, Set
from dataclasses import dataclass, replace

import numpy as np
from torch import Tensor

from .memory import LINE, round_up

# A size that depends on the batch: a constant, and a number that is multiplied by the batch size.
Size = tuple[int, int]


class PlaneLayout:
    """Strides and padding of planes, as large as its users require.

    Layouts that are merged share the strides from then on; `root` returns the shared one.

    Args:
        height: rows of an image.
        width: columns of an image.
        is_fixed: whether the strides must stay as they are, without padding.

    Example:
        >>> layout = PlaneLayout(height=3, width=4)
        >>> layout.require(3, 4, pad_y=1, pad_x=1)
        >>> layout.row_stride, layout.image_stride, layout.channel_stride(batch=2)
        (5, 20, 48)
    """

    def __init__(self, height: int, width: int, is_fixed: bool = False) -> None:
        self.height, self.width, self.pad_y, self.pad_x = height, width, 0, 0
        self._is_fixed = is_fixed
        self._parent: PlaneLayout | None = None

    def root(self) -> PlaneLayout:
        """Return the layout that this one was merged into, or itself."""
        return self if self._parent is None else self._parent.root()

    def merge(self, other: PlaneLayout) -> None:
        """Give both layouts the same strides from now on."""
        a, b = self.root(), other.root()
        if a is not b:
            b._parent = a
            a.require(b.height, b.width, b.pad_y, b.pad_x)
            a._is_fixed = a._is_fixed or b._is_fixed

    def require(self, height: int, width: int, pad_y: int, pad_x: int) -> None:
        """Make room for images of at least this size with at least this much padding."""
        root = self.root()
        root.height, root.width = max(root.height, height), max(root.width, width)
        root.pad_y, root.pad_x = max(root.pad_y, pad_y), max(root.pad_x, pad_x)

    def can_merge(self, other: PlaneLayout) -> bool:
        """Return whether `merge` keeps layouts that are fixed as they are."""
        a, b = self.root(), other.root()
        return a is b or not (a._is_fixed or b._is_fixed) or a.strides == b.strides

    def can_have(self, pad_y: int, pad_x: int) -> bool:
        """Return whether at least this much padding is possible."""
        root = self.root()
        return not root._is_fixed or (pad_y <= root.pad_y and pad_x <= root.pad_x)

    def fix(self) -> bool:
        """Keep the strides as they are from now on. Return whether there is no padding."""
        root = self.root()
        if root.pad_x or root.pad_y:
            return False
        root._is_fixed = True
        return True

    @property
    def strides(self) -> tuple[int, int]:
        """Pixels between consecutive rows, and between consecutive images."""
        return self.row_stride, self.image_stride

    @property
    def row_stride(self) -> int:
        """Pixels between consecutive rows."""
        return self.width + self.pad_x

    @property
    def image_stride(self) -> int:
        """Pixels between consecutive images."""
        return (self.height + self.pad_y) * self.row_stride

    @property
    def lead(self) -> int:
        """Pixels before the first pixel of a channel that windows may read."""
        return self.pad_y * self.row_stride + self.pad_x

    @property
    def edge(self) -> int:
        """Pixels in memory before the first and after the last channel."""
        return round_up(self.lead)

    def channel_stride(self, batch: int) -> int:
        """Return the number of pixels between consecutive channels."""
        return round_up(batch * self.image_stride)


@dataclass(eq=False)
class Planes:
    """An activation in planes.

    Attributes:
        layout: its strides and padding.
        channels: number of channels.
        height: rows of an image.
        width: columns of an image.
        shape: shape of one sample in PyTorch: (channels, height, width), (..., channels), or
            (channels / depth, depth, height, width) for volumes, whose slices are channels here.
        linear: whether channels are the last dimension.
        tokens: sizes of the other dimensions, whose pixels form one row without padding. None if
            these dimensions are the batch, rows and columns.
        base: larger planes in which these are some channels, or None.
        first: their first channel there.
        grows: whether these are memory for a concatenation, to which channels can be appended.
        phases: number of phases that are stored as further images, see `Taps`; phase k of all
            images follows phase k - 1.

    Example:
        >>> import torch
        >>> planes = Planes(PlaneLayout(3, 4), 8, 3, 4, (8, 3, 4))
        >>> planes.view(torch.zeros(planes.size(2)), batch=2).stride()
        (12, 32, 4, 1)
    """

    layout: PlaneLayout
    channels: int
    height: int
    width: int
    shape: tuple[int, ...]
    linear: bool = False
    tokens: tuple[Size, ...] | None = None
    base: Planes | None = None
    first: int = 0
    grows: bool = False
    phases: int = 1

    @property
    def root(self) -> Planes:
        """The planes that have memory of their own: the largest that contain these."""
        return self if self.base is None else self.base.root

    @property
    def is_volume(self) -> bool:
        """Whether the channels are the slices of volumes."""
        return len(self.shape) == 4

    @property
    def start(self) -> int:
        """The first channel within `root`."""
        return 0 if self.base is None else self.first + self.base.start

    def is_within(self, others: Set[Planes]) -> bool:
        """Return whether these are, or are channels of, some planes."""
        return self in others or (self.base is not None and self.base.is_within(others))

    def channels_from(self, first: int, count: int) -> Planes:
        """Return some of the channels, as planes in the same memory."""
        shape = (*self.shape[:-1], count) if self.linear else (count, *self.shape[1:])
        return replace(self, channels=count, shape=shape, base=self, first=first, grows=False)

    def channel_stride(self, batch: int) -> int:
        """Return the number of pixels between consecutive channels."""
        return self.layout.root().channel_stride(batch * self.phases)

    def pixels(self, batch: int) -> int:
        """Return the number of pixels of a channel without the padding below the last image.

        They are rounded up to whole cache lines.
        """
        layout, whole = self.layout.root(), self.channel_stride(batch)
        if self.tokens is not None:
            return whole
        last = (batch * self.phases - 1) * layout.image_stride
        return min(whole, round_up(last + self.height * layout.row_stride))

    def size(self, batch: int) -> int:
        """Return the number of float32 values in memory, including the edges."""
        return 2 * self.layout.root().edge + LINE + self.channels * self.channel_stride(batch)

    def view(self, memory: Tensor, batch: int) -> Tensor:
        """Return a view of memory that has the shape of the activation in PyTorch.

        Args:
            memory: one-dimensional tensor of `size(batch)` values.
            batch: number of samples.
        """
        layout = self.layout.root()
        channel = self.channel_stride(batch)
        start = memory.storage_offset() + layout.edge + self.start * channel
        if self.tokens is not None:
            sizes = [constant + per_sample * batch for constant, per_sample in self.tokens]
            inner = [1]
            for n in reversed(sizes[1:]):
                inner.append(inner[-1] * n)
            return memory.as_strided((*sizes, self.channels), (*inner[::-1], channel), start)
        rows = (layout.image_stride, layout.row_stride, 1)
        if self.linear:
            shape = (batch, self.height, self.width, self.channels)
            return memory.as_strided(shape, (*rows, channel), start)
        if self.is_volume:
            depth = self.shape[1]
            volumes = (batch, *self.shape)
            return memory.as_strided(volumes, (rows[0], depth * channel, channel, *rows[1:]), start)
        shape = (batch, self.channels, self.height, self.width)
        return memory.as_strided(shape, (rows[0], channel, *rows[1:]), start)

    def spread(self, values: np.ndarray, batch: int) -> np.ndarray:
        """Return one channel that has the same values (height, width) in each image, and 0 around.

        Returns:
            float32 of shape (channel stride,).
        """
        layout = self.layout.root()
        channel = np.zeros(self.channel_stride(batch), np.float32)
        size = batch, layout.height + layout.pad_y, layout.row_stride
        images = channel[: batch * layout.image_stride].reshape(size)
        images[:, : self.height, : self.width] = values
        return channel

    def mask(self, batch: int) -> np.ndarray | None:
        """Return the mask of the pixels of one channel that belong to images.

        Returns:
            int32 of shape (channel stride,), with all bits set at pixels of images; None if there
            is no padding.
        """
        layout = self.layout.root()
        used = (layout.height, layout.width, layout.pad_y, layout.pad_x)
        if used == (self.height, self.width, 0, 0) or self.tokens is not None:
            return None
        mask, count = np.zeros(self.channel_stride(batch), np.int32), batch * self.phases
        rows = layout.height + layout.pad_y
        images = mask[: count * layout.image_stride].reshape(count, rows, layout.row_stride)
        images[:, : self.height, : self.width] = -1
        return mask


def alike(a: Planes, b: Planes) -> bool:
    """Return whether the pixels of two planes are in the same places, apart from their padding.

    Example:
        >>> x = Planes(PlaneLayout(3, 4), 8, 3, 4, (8, 3, 4))
        >>> alike(x, Planes(PlaneLayout(3, 4), 5, 3, 4, (5, 3, 4)))
        True
    """
    same = (a.linear, a.height, a.width) == (b.linear, b.height, b.width)
    if a.is_volume or b.is_volume:
        return same and a.shape[1:] == b.shape[1:]
    return same and (a.tokens is None) == (b.tokens is None)


def split_size(size: int, stride: int, phases: Iterable[int]) -> int:
    """Return the largest number of pixels that one of the phases has.

    Args:
        size: number of pixels.
        stride: distance of the pixels of a phase.
        phases: first pixel of each phase.

    Example:
        >>> split_size(7, 2, [0, 1])  # pixels 0, 2, 4, 6 and pixels 1, 3, 5
        4
    """
    return max(max(0, -(-(size - phase) // stride)) for phase in phases)
