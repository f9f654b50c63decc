"""LLVM IR of the kernels that copy a tensor into planes.

A work item is one image of one block of channels of one phase. It copies the rows of the image
and fills the padding to the right of each row, below the image, and after the last image:

    if i0 == 0:
        fill the memory before the output
    for i in range(i0, i1):
        block, image, phase = index of item i    # phases innermost: they read the same cache lines
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

If the distance between columns is known, a row is copied in vectors instead, and its end with its
padding in masked vectors, on processors that have them (`MASKED_WIDTHS`).
"""

from __future__ import annotations

from collections.abc import Iterator

from .records import COPY, fields
from .text import FunctionText

# Distances between columns of the source for which there is a kernel; None is any distance.
COLUMN_STRIDES = (1, 2, None)
MASKED_WIDTHS = (16, 8)  # AVX-512 and AVX2 have masked loads and stores
CHANNEL_BLOCK = 16  # channels in a work item of the kernel for any distance

# Types of the fields of a record that are not int64.
FIELD_TYPES = {"source": "ptr", "phases": "ptr", "out": "ptr", "fill": "float"}


def emit_copy(column_stride: int | None, width: int = 4) -> Iterator[str]:
    """Yield the lines of the function `copy_{column_stride}(record, i0, i1)`.

    Args:
        column_stride: distance between columns of the source; None if it is known at run time only.
        width: float32 values in a vector.

    Example:
        >>> next(emit_copy(2))
        'define void @copy_2(ptr noalias %record, i64 %i0, i64 %i1) {'
    """
    code = FunctionText()
    _load_record(code)
    _fill_edges(code)
    masked = column_stride is not None and width in MASKED_WIDTHS
    if masked:
        _prepare_masks(code, width)
    block = CHANNEL_BLOCK if column_stride is None else 1
    with code.loop("%i", "%i0", "%i1"):
        _locate_item(code, block)
        with code.loop("%y", "0", "%rows"):
            if masked:
                assert column_stride is not None
                _copy_row_masked(code, column_stride, width)
            else:
                _copy_row(code, column_stride)
                _fill_rest_of_row(code)
        _fill_rest_of_plane(code)
    yield f"define void @copy_{column_stride}(ptr noalias %record, i64 %i0, i64 %i1) {{"
    yield "entry:"
    yield from code.lines
    yield "  ret void"
    yield "}"


def declare_masked(width: int) -> Iterator[str]:
    """Yield the declarations that copies with masked vectors need.

    Example:
        >>> list(declare_masked(4))
        []
    """
    if width in MASKED_WIDTHS:
        v, bv = f"<{width} x float>", f"<{width} x i1>"
        yield f"declare {v} @llvm.masked.load.v{width}f32.p0(ptr, i32, {bv}, {v})"
        yield f"declare void @llvm.masked.store.v{width}f32.p0({v}, ptr, i32, {bv})"


def _load_record(code: FunctionText) -> None:
    for name, offset in fields(COPY):
        code(f"%{name}.field = getelementptr i8, ptr %record, i64 {offset}")
        code(f"%{name} = load {FIELD_TYPES.get(name, 'i64')}, ptr %{name}.field")


def _fill_edges(code: FunctionText) -> None:
    code("%first = icmp eq i64 %i0, 0")
    code("%edge.here = select i1 %first, i64 %edge, i64 0")
    code("%lead = sub i64 0, %edge.here")
    code.fill("before", "%out", "%lead", "0")


def _locate_item(code: FunctionText, block: int) -> None:
    """Compute image, channels and phase of an item, and where it begins in source and output."""
    code("%phase = urem i64 %i, %n_phases")
    code("%i.image = udiv i64 %i, %n_phases")
    code("%n = urem i64 %i.image, %images")
    code("%block = udiv i64 %i.image, %images")
    code(f"%c0 = mul i64 %block, {block}")
    code(f"%c.full = add i64 %c0, {block}")
    code("%c.over = icmp sgt i64 %c.full, %channels")
    code("%c1 = select i1 %c.over, i64 %channels, i64 %c.full")
    code("%phase.first = mul i64 %phase, 5")
    for k, name in enumerate(("start", "height", "width", "to.phase", "end")):
        code(f"%{name}.place = add i64 %phase.first, {k}")
        code(f"%{name}.at = getelementptr i64, ptr %phases, i64 %{name}.place")
        code(f"%{name} = load i64, ptr %{name}.at")
    code("%from.n = mul i64 %n, %source_image")
    code("%from = add i64 %from.n, %start")
    code("%to.image = mul i64 %n, %image")
    code("%to.n = add i64 %to.phase, %to.image")


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
            code("%to.c = mul i64 %c, %plane")
            code("%to.yc = add i64 %to.y, %to.c")
            code("%row.out = getelementptr float, ptr %out, i64 %to.yc")
            with code.loop("%x", "%x0", "%x1"):
                code(f"%x.place = mul nsw i64 %x, {stride}")
                code("%x.in = getelementptr inbounds float, ptr %row.in, i64 %x.place")
                code("%pixel = load float, ptr %x.in")
                code("%x.out = getelementptr inbounds float, ptr %row.out, i64 %x")
                code("store float %pixel, ptr %x.out")


def _fill_rest_of_row(code: FunctionText) -> None:
    with code.loop("%g", "%c0", "%c1"):
        code("%g.plane = mul i64 %g, %plane")
        code("%g.yc = add i64 %to.y, %g.plane")
        code("%g.row = getelementptr float, ptr %out, i64 %g.yc")
        code.fill("right", "%g.row", "%count", "%pitch")


def _splat(code: FunctionText, name: str, kind: str, scalar: str, width: int) -> None:
    v = f"<{width} x {kind}>"
    code(f"%{name}.one = insertelement {v} poison, {kind} {scalar}, i32 0")
    code(f"%{name} = shufflevector {v} %{name}.one, {v} poison, <{width} x i32> zeroinitializer")


def _prepare_masks(code: FunctionText, width: int) -> None:
    code("%pitch.short = trunc i64 %pitch to i32")
    _splat(code, "pitch.all", "i32", "%pitch.short", width)
    _splat(code, "fill.all", "float", "%fill", width)
    code(f"%vectors.up = add i64 %pitch, {width - 1}")
    code(f"%vectors = udiv i64 %vectors.up, {width}")


def _copy_row_masked(code: FunctionText, column_stride: int, width: int) -> None:
    """Copy row y of a channel, and fill its padding."""
    v, iv, bv = f"<{width} x float>", f"<{width} x i32>", f"<{width} x i1>"
    load = f"call {v} @llvm.masked.load.v{width}f32.p0"
    lanes = [", ".join(f"i32 {first + k}" for k in range(width)) for first in (0, width)]
    code("%inside = icmp slt i64 %y, %height")
    code("%count = select i1 %inside, i64 %width, i64 0")
    code("%from.row = mul i64 %y, %source_row")
    code("%from.y = add i64 %from, %from.row")
    code("%from.c = mul i64 %c0, %source_channel")
    code("%from.yc = add i64 %from.y, %from.c")
    code("%row.in = getelementptr float, ptr %source, i64 %from.yc")
    code("%to.row = mul i64 %y, %pitch")
    code("%to.y = add i64 %to.n, %to.row")
    code("%to.c = mul i64 %c0, %plane")
    code("%to.yc = add i64 %to.y, %to.c")
    code("%row.out = getelementptr float, ptr %out, i64 %to.yc")
    code("%count.short = trunc i64 %count to i32")
    _splat(code, "count.all", "i32", "%count.short", width)
    if column_stride == 2:  # the numbers up to the last pixel
        code("%end.long = mul i32 %count.short, 2")
        code("%end.short = sub i32 %end.long, 1")
        _splat(code, "end.all", "i32", "%end.short", width)
    code(f"%full = udiv i64 %count, {width}")
    with code.loop("%f", "0", "%full"):
        _copy_vector(code, column_stride, width)
    with code.loop("%x", "%full", "%vectors"):
        code(f"%x0 = mul i64 %x, {width}")
        code("%x0.short = trunc i64 %x0 to i32")
        _splat(code, "x.all", "i32", "%x0.short", width)
        code(f"%x.lanes = add {iv} %x.all, <{lanes[0]}>")
        code(f"%is.pixel = icmp slt {iv} %x.lanes, %count.all")
        code(f"%is.row = icmp slt {iv} %x.lanes, %pitch.all")
        code(f"%x.place = mul i64 %x0, {column_stride}")
        code("%x.in = getelementptr float, ptr %row.in, i64 %x.place")
        if column_stride == 1:
            code(f"%pixels = {load}(ptr %x.in, i32 4, {bv} %is.pixel, {v} %fill.all)")
        else:
            code(f"%x.double = shl {iv} %x.all, {_integers(1, width)}")
            for half in (0, 1):
                code(f"%half.{half} = add {iv} %x.double, <{lanes[half]}>")
                code(f"%half.mask.{half} = icmp slt {iv} %half.{half}, %end.all")
                code(f"%half.in.{half} = getelementptr float, ptr %x.in, i64 {half * width}")
                mask = f"{bv} %half.mask.{half}, {v} %fill.all"
                code(f"%half.x.{half} = {load}(ptr %half.in.{half}, i32 4, {mask})")
            even = ", ".join(f"i32 {2 * k}" for k in range(width))
            halves = f"{v} %half.x.0, {v} %half.x.1"
            code(f"%even = shufflevector {halves}, <{width} x i32> <{even}>")
            code(f"%pixels = select {bv} %is.pixel, {v} %even, {v} %fill.all")
        code("%x.out = getelementptr float, ptr %row.out, i64 %x0")
        store = f"call void @llvm.masked.store.v{width}f32.p0"
        code(f"{store}({v} %pixels, ptr %x.out, i32 4, {bv} %is.row)")


def _copy_vector(code: FunctionText, column_stride: int, width: int) -> None:
    """Copy vector f of a row, all of which are pixels: masked stores are slow with AVX2.

    With a stride of 2, the second load ends at the last pixel, since memory may end there.
    """
    v = f"<{width} x float>"
    code(f"%f.first = mul i64 %f, {width}")
    code(f"%f.place = mul i64 %f.first, {column_stride}")
    code("%f.in = getelementptr float, ptr %row.in, i64 %f.place")
    code(f"%f.0 = load {v}, ptr %f.in, align 4")
    pixels = "%f.0"
    if column_stride == 2:
        code(f"%f.in.1 = getelementptr float, ptr %f.in, i64 {width - 1}")
        code(f"%f.1 = load {v}, ptr %f.in.1, align 4")
        places = [*range(0, width, 2), *range(width + 1, 2 * width, 2)]
        even = ", ".join(f"i32 {k}" for k in places)
        code(f"%f.even = shufflevector {v} %f.0, {v} %f.1, <{width} x i32> <{even}>")
        pixels = "%f.even"
    code("%f.out = getelementptr float, ptr %row.out, i64 %f.first")
    code(f"store {v} {pixels}, ptr %f.out, align 4")


def _integers(value: int, width: int) -> str:
    """Return a vector of equal integers."""
    return f"<{', '.join([f'i32 {value}'] * width)}>"


def _fill_rest_of_plane(code: FunctionText) -> None:
    """Fill the planes of the block after the last image."""
    code("%n.next = add i64 %n, 1")
    code("%is.last = icmp eq i64 %n.next, %images")
    code("%rest = add i64 %to.n, %image")
    code("%rest.end = select i1 %is.last, i64 %end, i64 %rest")
    with code.loop("%s", "%c0", "%c1"):
        code("%s.plane = mul i64 %s, %plane")
        code("%s.out = getelementptr float, ptr %out, i64 %s.plane")
        code.fill("slack", "%s.out", "%rest", "%rest.end")
