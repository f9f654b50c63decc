"""LLVM IR of the kernels that move pixels to other positions, see `plane_operations`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from .text import FunctionText


def interleave(code: FunctionText, factor: int) -> None:
    """Compute one channel: pixel (y, x) is pixel (y / b, x / a) of channel (y mod b) · a + x mod a.

    Here a is the factor, and b is `factor_rows`. The channels are those of x that follow channel
    a · b · i. With `x_part` = 0 and `x_group` = `x_plane`, all of them are channel i, whose pixels
    are repeated. Pixels after the images are set to 0.

    Args:
        code: of a function that has loaded its record; %i is the channel.
        factor: columns of the result for each column of the input.

    Example:
        >>> code = FunctionText()
        >>> interleave(code, 2)
        >>> code.lines[0]
        '  %full = udiv i64 %columns, 2'
    """
    code(f"%full = udiv i64 %columns, {factor}")
    code(f"%full.columns = mul i64 %full, {factor}")
    code("%rest = sub i64 %columns, %full.columns")
    with rows_of_channel(code):
        code("%q = udiv i64 %line, %factor_rows")
        code("%q.first = mul i64 %q, %factor_rows")
        code("%a = sub i64 %line, %q.first")
        code(f"%part = mul i64 %a, {factor}")
        row = (("%i", "%x_group"), ("%n", "%x_image"), ("%q", "%x_pitch"))
        for b in range(factor):
            code(f"%part.{b} = add i64 %part, {b}")
            code.pointer(f"from.{b}", "%x", (f"%part.{b}", "%x_part"), *row)
        with code.loop("%p", "0", "%full"):
            code(f"%p.to = mul nsw i64 %p, {factor}")
            for b in range(factor):
                code(f"%at.{b} = getelementptr inbounds float, ptr %from.{b}, i64 %p")
                code(f"%pixel.{b} = load float, ptr %at.{b}")
                code(f"%p.to.{b} = add nsw i64 %p.to, {b}")
                code(f"%put.{b} = getelementptr inbounds float, ptr %to, i64 %p.to.{b}")
                code(f"store float %pixel.{b}, ptr %put.{b}")
        with code.loop("%r", "0", "%rest"):
            code("%r.part = add i64 %part, %r")
            code.pointer("r.from", "%x", ("%r.part", "%x_part"), *row, ("%full", "1"))
            code("%r.pixel = load float, ptr %r.from")
            code.pointer("r.to", "%to", ("%full.columns", "1"), ("%r", "1"))
            code("store float %r.pixel, ptr %r.to")


@contextmanager
def rows_of_channel(code: FunctionText) -> Iterator[None]:
    """Execute the `with` block for each row of a channel of the result; set the padding to 0.

    In the block, %n is the image, %line the row, and %to the address of its first pixel.

    Args:
        code: of a function that has loaded its record; %i is the channel.

    Example:
        >>> code = FunctionText()
        >>> with rows_of_channel(code):
        ...     code("store float 1.0, ptr %to")
        >>> code.lines[0]
        '  %padding = sub i64 %pitch, %columns'
    """
    code("%padding = sub i64 %pitch, %columns")
    code("%padding.bytes = mul i64 %padding, 4")
    code("%out.rows = udiv i64 %image, %pitch")
    code.pointer("channel", "%out", ("%i", "%plane"))
    with code.loop("%n", "0", "%images"):
        with code.loop("%line", "0", "%rows"):
            code.pointer("to", "%channel", ("%n", "%image"), ("%line", "%pitch"))
            yield
            code("%end = getelementptr float, ptr %to, i64 %columns")
            code.clear("%end", "%padding.bytes")
        code("%below = sub i64 %out.rows, %rows")
        code("%below.pixels = mul i64 %below, %pitch")
        code("%below.bytes = mul i64 %below.pixels, 4")
        code.pointer("below.at", "%channel", ("%n", "%image"), ("%rows", "%pitch"))
        code.clear("%below.at", "%below.bytes")
    clear_after_images(code, "%channel")


def gather(code: FunctionText) -> None:
    """Copy the pixels of a channel in another order.

    Args:
        code: of a function that has loaded its record; %i is the channel of the result.

    Example:
        >>> code = FunctionText()
        >>> gather(code)
        >>> code.lines[0]
        '  %group = udiv i64 %i, %channels'
    """
    code("%group = udiv i64 %i, %channels")
    code("%own = urem i64 %i, %channels")
    code("%table.first = mul i64 %group, %pixels")
    code("%table = getelementptr i32, ptr %index, i64 %table.first")
    with code.loop("%n", "0", "%images"):
        code.pointer("from", "%x", ("%own", "%x_plane"), ("%n", "%x_image"))
        code.pointer("to", "%out", ("%i", "%plane"), ("%n", "%image"))
        with code.loop("%p", "0", "%pixels"):
            code("%place.at = getelementptr inbounds i32, ptr %table, i64 %p")
            code("%place.short = load i32, ptr %place.at")
            code("%place = zext i32 %place.short to i64")
            code("%at = getelementptr inbounds float, ptr %from, i64 %place")
            code("%pixel = load float, ptr %at")
            code("%put = getelementptr inbounds float, ptr %to, i64 %p")
            code("store float %pixel, ptr %put")
    code.pointer("channel", "%out", ("%i", "%plane"))
    clear_after_images(code, "%channel")


def clear_after_images(code: FunctionText, channel: str) -> None:
    """Set the pixels after the last image of a channel to 0: they are above the next channel.

    Args:
        code: of a function that has loaded its record.
        channel: address of the channel.

    Example:
        >>> code = FunctionText()
        >>> clear_after_images(code, "%channel")
        >>> code.lines[0]
        '  %images.end = mul i64 %images, %image'
    """
    code("%images.end = mul i64 %images, %image")
    code("%after = sub i64 %plane, %images.end")
    code("%after.bytes = mul i64 %after, 4")
    code(f"%after.at = getelementptr float, ptr {channel}, i64 %images.end")
    code.clear("%after.at", "%after.bytes")
