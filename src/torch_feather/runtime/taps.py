"""The nonzero weights of a layer as taps: what the convolution kernels read.

A tap combines one input channel, at a constant distance in rows and columns from the output pixel,
with a weight.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from .layer import Layer
from .memory import aligned_zeros
from .planes import Planes

# Work of a group of channels without taps (bias, bounds, stores), in taps.
GROUP_COST = 4
# What is computed at once stays in the cache: keys of groups that are united, and rows of a table.
CELLS, BLOCK = 1 << 18, 1 << 15


@dataclass(frozen=True)
class Taps:
    """The taps of a layer.

    The input of a layer with stride is split into phases: phase (a, b) consists of every stride-th
    row from row a on and every stride-th column from column b on. Each phase has its own channels.

    A tap takes 8 bytes: its value and its key. A place is a row and a column of the kernel.

    Attributes:
        values: weights, ordered by output channel.
        starts: (out + 1,), the first tap of each output channel, and the number of taps.
        key: a number that identifies (input channel, place) of each tap.
        phase: phase of each place.
        dy: distance of each place from the output pixel, in rows of the split input.
        dx: distance in columns.
        phases: first row and column of each phase; ((0, 0),) for stride 1.
        reach: largest distance of a tap from its output pixel, in rows and in columns.
        inputs: number of input channels.
    """

    values: np.ndarray
    starts: np.ndarray
    key: np.ndarray
    phase: np.ndarray
    dy: np.ndarray
    dx: np.ndarray
    phases: tuple[tuple[int, int], ...]
    reach: tuple[int, int]
    inputs: int

    @classmethod
    def from_layer(cls, layer: Layer) -> Taps:
        """Return the taps of a layer, which keeps them for the next call.

        Example:
            >>> import torch
            >>> layer = Layer("weight", torch.eye(3), torch.zeros(3))
            >>> taps = Taps.from_layer(layer)
            >>> taps.values, taps.key
            (array([1., 1., 1.], dtype=float32), array([0, 1, 2], dtype=int32))
        """
        if layer.taps is None:
            layer.taps = cls._find(layer)
        found: Taps = layer.taps
        return found

    @classmethod
    def _find(cls, layer: Layer) -> Taps:
        weight = np.ascontiguousarray(layer.folded_weight().numpy()).reshape(-1)
        positions = np.flatnonzero(weight != 0)  # of booleans it is faster
        return cls.from_positions(
            layer, weight[positions].astype(np.float32, copy=False), positions
        )

    @classmethod
    def from_positions(cls, layer: Layer, values: np.ndarray, positions: np.ndarray) -> Taps:
        """Return taps whose positions in the weight are known.

        Args:
            layer: the layer. Only the shape of its weight is used.
            values: nonzero weights, in the order of their positions.
            positions: of each in the weight, in ascending order.

        Example:
            >>> import torch
            >>> layer = Layer("weight", torch.eye(3), torch.zeros(3))
            >>> Taps.from_positions(layer, np.ones(2), np.array([1, 8])).starts
            array([0, 1, 1, 2], dtype=int32)
        """
        first = np.arange(layer.channels[1] + 1) * layer.weight[0].numel()
        counts = np.diff(np.searchsorted(positions, first))
        # Beyond 32 bits both wrap around, and their difference is right.
        key = positions.astype(np.int32)
        key -= np.repeat(_before(layer).astype(np.int32), counts)
        return cls.from_keys(layer, values, counts, key)

    @classmethod
    def from_keys(
        cls, layer: Layer, values: np.ndarray, counts: np.ndarray, key: np.ndarray
    ) -> Taps:
        """Return taps whose keys are known.

        Args:
            layer: the layer; its weights are not used.
            values: nonzero weights, ordered by output channel and key.
            counts: number of nonzero weights of each output channel.
            key: position of each in the kernel, see `key`.

        Example:
            >>> import torch
            >>> layer = Layer("weight", torch.eye(3), torch.zeros(3))
            >>> Taps.from_keys(layer, np.ones(1), np.array([1, 0, 0]), np.ones(1, int)).starts
            array([0, 1, 1, 1], dtype=int32)
        """
        height, width = layer.weight.shape[2:] or (1, 1)
        places, (inputs, channels) = height * width, layer.channels
        ky, kx = np.divmod(np.arange(places, dtype=np.int32), np.int32(width))
        y = ky * layer.dilation[0] - layer.padding[0]
        x = kx * layer.dilation[1] - layer.padding[1]
        (dy, a), (dx, b) = np.divmod(y, layer.stride[0]), np.divmod(x, layer.stride[1])
        number = a * layer.stride[1] + b  # of the phase
        key = key.astype(np.int32, copy=False)
        occurs = _positions_that_occur(key, places)
        # Avoid numpy.unique: it imports numpy.ma, which takes longer than loading most files.
        used = np.array(sorted(set(number[occurs].tolist())), np.int32)
        phases = tuple(divmod(int(p), layer.stride[1]) for p in used) or ((0, 0),)
        reach = tuple(int(np.abs(d[occurs]).max(initial=0)) for d in (dy, dx))
        starts = np.zeros(channels + 1, np.int32)
        np.cumsum(counts, out=starts[1:])
        phase = np.searchsorted(used, number).astype(np.int32)
        return cls(values, starts, key, phase, dy, dx, phases, (reach[0], reach[1]), inputs)

    @property
    def channels(self) -> int:
        """Number of output channels."""
        return len(self.starts) - 1

    @property
    def out(self) -> np.ndarray:
        """Output channel of each tap."""
        return np.repeat(np.arange(self.channels), np.diff(self.starts))

    def sources(self, key: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return channel of the split input, distance in rows, and in columns, of taps.

        Args:
            key: of each tap.
        """
        places = len(self.phase)
        if places == 1:
            dy, dx = (np.broadcast_to(d, key.shape) for d in (self.dy, self.dx))
            return key, dy, dx
        channel = key // places
        place = key - channel * places
        if len(self.phases) > 1:
            channel += (self.phase * self.inputs)[place]
        return channel, self.dy[place], self.dx[place]

    def weight(self, layer: Layer) -> Tensor:
        """Return the weight of a layer from its nonzero values.

        Args:
            layer: the layer. Only the shape of its weight is used.
        """
        found = torch.zeros(layer.weight.shape)
        positions = torch.from_numpy(self.positions(layer))
        found.view(-1)[positions] = torch.from_numpy(self.values)
        return found

    def positions(self, layer: Layer) -> np.ndarray:
        """Return the position of each tap in the weight of a layer.

        Args:
            layer: the layer. Only the shape of its weight is used.
        """
        return np.repeat(_before(layer), np.diff(self.starts)) + self.key

    def grouped(self, size: int) -> GroupedTaps:
        """Return the taps of groups of output channels.

        A group processes the union of the taps of its channels, so channels with similar numbers
        of taps are grouped.

        Args:
            size: channels of a group; a divisor of the number of output channels.
        """
        counts = np.diff(self.starts)
        if size == 1:  # the taps are in this order already
            in_order = np.arange(self.channels, dtype=np.int32)
            values = self.values.reshape(-1, 1)
            return GroupedTaps(in_order, self.starts, values, *self.sources(self.key))
        order = np.argsort(counts, kind="stable").astype(np.int32)
        keys = int(self.key.max(initial=0)) + 1
        step = max(1, CELLS // keys) * size
        blocks = (order[i : i + step] for i in range(0, len(order), step))
        found = [self._united(block, size, keys) for block in blocks]
        lengths, key, values = (np.concatenate(parts) for parts in zip(*found, strict=True))
        rows = np.zeros(len(lengths) + 1, np.int32)
        np.cumsum(lengths, out=rows[1:])
        return GroupedTaps(order, rows, values, *self.sources(key))

    def _united(
        self, channels: np.ndarray, size: int, keys: int
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return the united taps of some groups: how many each has, their keys, and values.

        Args:
            channels: output channels, group after group.
            size: channels of a group.
            keys: no key is as large.
        """
        starts = self.starts[channels]
        counts = self.starts[channels + 1] - starts
        taps = np.repeat(starts - np.cumsum(counts) + counts, counts) + np.arange(counts.sum())
        group, member = np.divmod(np.arange(len(channels)), size)
        cell = np.repeat(group * keys, counts) + self.key.take(taps)
        groups = len(channels) // size
        # A table, which fits into the cache, is faster than sorting.
        occurs = np.zeros(groups * keys, bool)
        occurs[cell] = True
        lengths = np.count_nonzero(occurs.reshape(groups, keys), axis=1)
        found = np.flatnonzero(occurs)
        index = np.empty(len(occurs), np.int64)
        index[found] = np.arange(0, len(found) * size, size)
        values = np.zeros((len(found), size), np.float32)
        values.reshape(-1)[index.take(cell) + np.repeat(member, counts)] = self.values.take(taps)
        return lengths, (found % keys).astype(np.int32), values


def _before(layer: Layer) -> np.ndarray:
    """Return the weights before each output channel, less those of other groups' channels.

    This is the distance between positions in the weight and keys.
    """
    channel, per_channel = np.arange(layer.channels[1]), layer.weight[0].numel()
    per_group = max(1, len(channel) // layer.groups)
    return (channel - channel // per_group) * per_channel


@dataclass(frozen=True)
class GroupedTaps:
    """The taps of groups of output channels.

    Attributes:
        order: (out,), the output channels in the order of the groups.
        rows: (groups + 1,), the first tap of each group.
        values: (taps, channels of a group), the weights.
        channel: channel of the split input.
        dy: distance from the output pixel in rows of the split input.
        dx: distance in columns.

    Example:
        >>> import torch
        >>> layer = Layer("weight", torch.eye(4), torch.zeros(4))
        >>> Taps.from_layer(layer).grouped(2).rows  # two taps in each of two groups
        array([0, 2, 4], dtype=int32)
    """

    order: np.ndarray
    rows: np.ndarray
    values: np.ndarray
    channel: np.ndarray
    dy: np.ndarray
    dx: np.ndarray

    def table(self, x: Planes, batch: int) -> np.ndarray:
        """Return the table that a convolution kernel reads.

        Args:
            x: input, in the layout of the output.
            batch: number of samples.

        Returns:
            int32 of shape (taps, 1 + channels of a group): the offset from output to input pixel,
            then the bits of the weights.

        Raises:
            OverflowError: an offset does not fit into 32 bits.
        """
        layout, (count, size) = x.layout.root(), self.values.shape
        largest = np.iinfo(np.int32).max - 2 * layout.edge
        table = aligned_zeros((1 + size) * count, np.int32).reshape(count, 1 + size)
        for start in range(0, count, BLOCK):
            part = slice(start, start + BLOCK)
            phases, channel = np.zeros(1, np.int64), self.channel[part]
            if x.phases > 1:  # otherwise phases are channels
                phases, channel = np.divmod(channel, x.channels)
            offsets = channel * np.int64(x.channel_stride(batch))
            offsets += phases * np.int64(batch * layout.image_stride)
            offsets += self.dy[part] * np.int64(layout.row_stride) + self.dx[part]
            if offsets.max() > largest:
                raise OverflowError
            table[part, 0] = offsets
            table[part, 1:] = self.values[part].view(np.int32)
        return table

    def blocks(self, count: int | None) -> np.ndarray:
        """Return where to split the groups into blocks of about equal work.

        Args:
            count: number of blocks. None for a block per group.

        Returns:
            int64 of shape (count + 1,), the first group of each block.
        """
        groups = len(self.rows) - 1
        if count is None:
            return np.arange(groups + 1, dtype=np.int64)
        work = self.rows[1:] + np.arange(1, groups + 1) * GROUP_COST
        targets = work[-1] * np.arange(1, count) / count
        return np.array([0, *np.searchsorted(work, targets), groups], np.int64)


def _positions_that_occur(key: np.ndarray, places: int) -> np.ndarray:
    """Return for each kernel position whether a nonzero weight is there.

    Reading stops when all positions are found.
    """
    occurs = np.zeros(places, bool)
    for start in range(0, len(key), BLOCK):
        occurs |= np.bincount(key[start : start + BLOCK] % places, minlength=places) > 0
        if occurs.all():
            break
    return occurs
