"""Taps as they are stored in a library: values, and distances between positions as bytes.

A tap table (`GroupedTaps.table`) has an int32 offset per tap. A library stores one byte instead:
the distance from the tap before in the dense kernel of its group, whose positions are numbered by
input channel, row and column. The byte 255 stands for 255 positions without a tap. `create`
computes the tables once for all threads:

    for g in range(groups):
        position = 0
        for k in range(rows[g], rows[g + 1]):
            while (byte := next(distances)) == 255:
                position += 255
            position += byte
            channel, place = divmod(position, places)
            table[k] = channel * plane + offsets[place], values[k]
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from ..runtime.kernels import FunctionText
from ..runtime.plan import Sparse
from ..runtime.taps import GroupedTaps

SKIP = 255  # positions that a byte skips at most


@dataclass
class PackedTaps:
    """Stored taps of a layer.

    Attributes:
        distances: bytes, see above.
        values: (taps, channels of a group) float32.
        offsets: int64, distance in pixels of each place of the kernel, from input channel 0.
        plane: pixels between consecutive channels.
        rows: int32 (groups + 1,), the first tap of each group.

    Example:
        >>> nothing = np.zeros(0)
        >>> PackedTaps(nothing, np.zeros((0, 2)), nothing, 16, np.zeros(4)).table_bytes
        0
    """

    distances: np.ndarray
    values: np.ndarray
    offsets: np.ndarray
    plane: int
    rows: np.ndarray

    @property
    def table_bytes(self) -> int:
        """Size of the table that a kernel reads."""
        taps, channels = self.values.shape
        return 4 * taps * (1 + channels)


def pack(step: Sparse, grouped: GroupedTaps, table: np.ndarray, plane: int) -> PackedTaps:
    """Return the stored form of a tap table.

    Args:
        step: the layer.
        grouped: its taps in groups.
        table: the tap table.
        plane: pixels between consecutive channels.

    Example:
        >>> import torch
        >>> from ..runtime.layer import Layer
        >>> from ..runtime.planes import PlaneLayout, Planes
        >>> from ..runtime.taps import Taps
        >>> layer = Layer("weight", torch.eye(4), torch.zeros(4))
        >>> x, out = (Planes(PlaneLayout(1, 1), 4, 1, 1, (4,), linear=True) for _ in range(2))
        >>> step = Sparse(layer, Taps.from_layer(layer), x, out)
        >>> grouped = step.taps.grouped(1)
        >>> pack(step, grouped, grouped.table(x, 1), 16).distances
        array([0, 1, 2, 3], dtype=uint8)
    """
    layer = step.layer
    height, width = layer.weight.shape[2:] or (1, 1)
    channels = layer.channels[0]
    phase, channel = np.divmod(grouped.channel, channels)
    starts = np.array(step.taps.phases)[phase].reshape(-1, 2)
    found = []
    for axis, steps in enumerate((grouped.dy, grouped.dx)):
        pixels = steps * layer.stride[axis] + starts[:, axis] + layer.padding[axis]
        found.append(pixels // layer.dilation[axis])
    place = found[0] * width + found[1]
    offsets = np.zeros(height * width, np.int64)
    offsets[place] = table[:, 0] - channel * plane
    position = channel * (height * width) + place
    before = np.concatenate([[0], position[:-1]])
    before[grouped.rows[:-1][np.diff(grouped.rows) > 0]] = 0  # each group starts again
    skips, rest = np.divmod(position - before, SKIP)
    ends = np.cumsum(skips + 1) - 1
    distances = np.full(int((skips + 1).sum()), SKIP, np.uint8)
    distances[ends] = rest
    return PackedTaps(distances, grouped.values, offsets, plane, grouped.rows)


def emit_unpack() -> Iterator[str]:
    """Yield the lines of the function that computes a tap table.

    Example:
        >>> next(emit_unpack()).partition("(")[0]
        'define internal void @unpack'
    """
    arguments = "ptr %table, ptr %distances, ptr %values, ptr %rows, ptr %offsets"
    sizes = "i64 %groups, i64 %places, i64 %plane, i64 %channels"
    yield f"define internal void @unpack({arguments}, {sizes}) noinline {{"
    yield "entry:"
    code = FunctionText()
    code("%byte.at = alloca ptr")
    code("%position.at = alloca i64")
    code("store ptr %distances, ptr %byte.at")
    code("%size = add i64 %channels, 1")
    with code.loop("%g", "0", "%groups"):
        code("store i64 0, ptr %position.at")
        code("%row = getelementptr i32, ptr %rows, i64 %g")
        code("%row.after = getelementptr i32, ptr %row, i64 1")
        for name, at in (("k0", "row"), ("k1", "row.after")):
            code(f"%{name}.short = load i32, ptr %{at}")
            code(f"%{name} = zext i32 %{name}.short to i64")
        with code.loop("%k", "%k0", "%k1"):
            _next_position(code)
            code("%channel = udiv i64 %position, %places")
            code("%channel.first = mul i64 %channel, %places")
            code("%place = sub i64 %position, %channel.first")
            code("%offset.at = getelementptr i64, ptr %offsets, i64 %place")
            code("%offset = load i64, ptr %offset.at")
            code("%channel.pixels = mul i64 %channel, %plane")
            code("%pixels = add i64 %channel.pixels, %offset")
            code("%pixels.short = trunc i64 %pixels to i32")
            code("%tap.first = mul i64 %k, %size")
            code("%tap = getelementptr i32, ptr %table, i64 %tap.first")
            code("store i32 %pixels.short, ptr %tap")
            code("%value.first = mul i64 %k, %channels")
            with code.loop("%c", "0", "%channels"):
                code("%value.place = add i64 %value.first, %c")
                code("%value.at = getelementptr i32, ptr %values, i64 %value.place")
                code("%value = load i32, ptr %value.at")
                code("%c.after = add i64 %c, 1")
                code("%weight.at = getelementptr i32, ptr %tap, i64 %c.after")
                code("store i32 %value, ptr %weight.at")
    yield from code.lines
    yield "  ret void"
    yield "}"


def _next_position(code: FunctionText) -> None:
    """Read bytes up to the one of the next tap, and add them to the position."""
    code("br label %read")
    code.label("read")
    code("%byte = load ptr, ptr %byte.at")
    code("%distance.short = load i8, ptr %byte")
    code("%byte.after = getelementptr i8, ptr %byte, i64 1")
    code("store ptr %byte.after, ptr %byte.at")
    code("%distance = zext i8 %distance.short to i64")
    code("%position.before = load i64, ptr %position.at")
    code("%position = add i64 %position.before, %distance")
    code("store i64 %position, ptr %position.at")
    code(f"%skips = icmp eq i64 %distance, {SKIP}")
    code("br i1 %skips, label %read, label %tap.found")
    code.label("tap.found")
