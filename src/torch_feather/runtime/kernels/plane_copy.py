"""LLVM IR of the kernels that copy a tensor into planes.

A work item is one image of one block of channels of one phase. It copies the rows of the image
and fills the padding to the right of each row, below the image, and after the last image:

    if i0 == 0:
        fill the memory before and after the output
    for i in range(i0, i1):
        phase, block, image = index of item i
        for y in range(rows):                    # including the padding below the image
            for square in the columns of row y:
                for c in block:
                    copy the columns of the square
            for c in block:
                fill the rest of the row
        for c in block:
            fill the rest of the plane           # after the last image only

Channels are copied in squares of `CHANNEL_BLOCK` channels by as many columns: if the channels of a
pixel are adjacent in the source, each of its cache lines is used completely.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import contextmanager

from .records import COPY, fields

# Distances between columns of the source for which there is a kernel; None is any distance.
COLUMN_STRIDES = (1, 2, None)
CHANNEL_BLOCK = 16  # channels in a work item of the kernel for any distance

# Types of the fields of a record that are not int64.
FIELD_TYPES = {"source": "ptr", "phases": "ptr", "out": "ptr", "fill": "float"}


class FunctionText:
    """The text of a function with counted loops.

    Example:
        >>> code = FunctionText()
        >>> code("ret void")
        >>> code.lines
        ['  ret void']
    """

    def __init__(self) -> None:
        self.lines: list[str] = []
        self._block = "entry"
        self._numbers = itertools.count()

    def __call__(self, line: str) -> None:
        """Append an instruction."""
        self.lines.append("  " + line)

    def label(self, name: str) -> None:
        """Begin a basic block."""
        self.lines.append(f"{name}:")
        self._block = name

    @contextmanager
    def loop(self, counter: str, start: str, stop: str) -> Iterator[None]:
        """Repeat the instructions in the `with` block for each integer in [start, stop)."""
        name, before = f"{counter[1:]}.{next(self._numbers)}", self._block
        self(f"br label %{name}.test")
        self.label(f"{name}.test")
        self(f"{counter} = phi i64 [ {start}, %{before} ], [ {counter}.next, %{name}.end ]")
        self(f"%{name}.more = icmp slt i64 {counter}, {stop}")
        self(f"br i1 %{name}.more, label %{name}.body, label %{name}.after")
        self.label(f"{name}.body")
        yield
        self(f"br label %{name}.end")
        self.label(f"{name}.end")
        self(f"{counter}.next = add nsw i64 {counter}, 1")
        self(f"br label %{name}.test")
        self.label(f"{name}.after")

    def fill(self, counter: str, base: str, start: str, stop: str) -> None:
        """Store the fill value in the elements [start, stop) of an array."""
        with self.loop(f"%{counter}", start, stop):
            self(f"%{counter}.at = getelementptr float, ptr {base}, i64 %{counter}")
            self(f"store float %fill, ptr %{counter}.at")


def emit_copy(column_stride: int | None) -> Iterator[str]:
    """Yield the lines of the function `copy_{column_stride}(record, i0, i1)`.

    Args:
        column_stride: distance between columns of the source; None if it is known at run time only.

    Example:
        >>> next(emit_copy(2))
        'define void @copy_2(ptr noalias %record, i64 %i0, i64 %i1) {'
    """
    code = FunctionText()
    _load_record(code)
    _fill_edges(code)
    block = CHANNEL_BLOCK if column_stride is None else 1
    code(f"%channels.up = add i64 %channels, {block - 1}")
    code(f"%blocks = udiv i64 %channels.up, {block}")
    with code.loop("%i", "%i0", "%i1"):
        _locate_item(code, block)
        with code.loop("%y", "0", "%rows"):
            _copy_row(code, column_stride)
            with code.loop("%g", "%c0", "%c1"):
                code("%g.channel = add i64 %to.phase, %g")
                code("%g.plane = mul i64 %g.channel, %plane")
                code("%g.yc = add i64 %to.y, %g.plane")
                code("%g.row = getelementptr float, ptr %out, i64 %g.yc")
                code.fill("right", "%g.row", "%count", "%pitch")
        _fill_rest_of_plane(code)
    yield f"define void @copy_{column_stride}(ptr noalias %record, i64 %i0, i64 %i1) {{"
    yield "entry:"
    yield from code.lines
    yield "  ret void"
    yield "}"


def _load_record(code: FunctionText) -> None:
    for name, offset in fields(COPY):
        code(f"%{name}.field = getelementptr i8, ptr %record, i64 {offset}")
        code(f"%{name} = load {FIELD_TYPES.get(name, 'i64')}, ptr %{name}.field")


def _fill_edges(code: FunctionText) -> None:
    code("%first = icmp eq i64 %i0, 0")
    code("%edge.here = select i1 %first, i64 %edge, i64 0")
    code("%lead = sub i64 0, %edge.here")
    code.fill("before", "%out", "%lead", "0")
    code("%end = mul i64 %all_channels, %plane")
    code("%end.edge = add i64 %end, %edge.here")
    code.fill("behind", "%out", "%end", "%end.edge")


def _locate_item(code: FunctionText, block: int) -> None:
    """Compute image, channels and phase of an item, and where it begins in source and output."""
    code("%n = urem i64 %i, %images")
    code("%i.block = udiv i64 %i, %images")
    code("%block = urem i64 %i.block, %blocks")
    code("%phase = udiv i64 %i.block, %blocks")
    code(f"%c0 = mul i64 %block, {block}")
    code(f"%c.full = add i64 %c0, {block}")
    code("%c.over = icmp sgt i64 %c.full, %channels")
    code("%c1 = select i1 %c.over, i64 %channels, i64 %c.full")
    code("%phase.first = mul i64 %phase, 3")
    for k, name in enumerate(("start", "height", "width")):
        code(f"%{name}.place = add i64 %phase.first, {k}")
        code(f"%{name}.at = getelementptr i64, ptr %phases, i64 %{name}.place")
        code(f"%{name} = load i64, ptr %{name}.at")
    code("%from.n = mul i64 %n, %source_image")
    code("%from = add i64 %from.n, %start")
    code("%to.phase = mul i64 %phase, %channels")
    code("%to.n = mul i64 %n, %image")


def _copy_row(code: FunctionText, column_stride: int | None) -> None:
    """Copy row y of all channels of the block; a row of padding has no columns."""
    code("%inside = icmp slt i64 %y, %height")
    code("%count = select i1 %inside, i64 %width, i64 0")
    code("%from.row = mul i64 %y, %source_row")
    code("%from.y = add i64 %from, %from.row")
    code("%to.row = mul i64 %y, %pitch")
    code("%to.y = add i64 %to.n, %to.row")
    code(f"%squares.up = add i64 %count, {CHANNEL_BLOCK - 1}")
    if column_stride is None:
        size, stride = str(CHANNEL_BLOCK), "%source_column"
        code(f"%squares = udiv i64 %squares.up, {CHANNEL_BLOCK}")
    else:  # one square for the whole row
        size, stride = "%count", str(column_stride)
        code("%squares = add i64 1, 0")
    with code.loop("%square", "0", "%squares"):
        code(f"%x0 = mul i64 %square, {size}")
        code(f"%x.full = add i64 %x0, {size}")
        code("%x.over = icmp sgt i64 %x.full, %count")
        code("%x1 = select i1 %x.over, i64 %count, i64 %x.full")
        with code.loop("%c", "%c0", "%c1"):
            code("%from.c = mul i64 %c, %source_channel")
            code("%from.yc = add i64 %from.y, %from.c")
            code("%row.in = getelementptr float, ptr %source, i64 %from.yc")
            code("%channel = add i64 %to.phase, %c")
            code("%to.c = mul i64 %channel, %plane")
            code("%to.yc = add i64 %to.y, %to.c")
            code("%row.out = getelementptr float, ptr %out, i64 %to.yc")
            with code.loop("%x", "%x0", "%x1"):
                code(f"%x.place = mul nsw i64 %x, {stride}")
                code("%x.in = getelementptr inbounds float, ptr %row.in, i64 %x.place")
                code("%pixel = load float, ptr %x.in")
                code("%x.out = getelementptr inbounds float, ptr %row.out, i64 %x")
                code("store float %pixel, ptr %x.out")


def _fill_rest_of_plane(code: FunctionText) -> None:
    """Fill the planes of the block after the last image."""
    code("%n.next = add i64 %n, 1")
    code("%is.last = icmp eq i64 %n.next, %images")
    code("%rest = add i64 %to.n, %image")
    code("%rest.end = select i1 %is.last, i64 %plane, i64 %rest")
    with code.loop("%s", "%c0", "%c1"):
        code("%s.channel = add i64 %to.phase, %s")
        code("%s.plane = mul i64 %s.channel, %plane")
        code("%s.out = getelementptr float, ptr %out, i64 %s.plane")
        code.fill("slack", "%s.out", "%rest", "%rest.end")
