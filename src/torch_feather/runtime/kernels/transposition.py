"""LLVM IR of the kernel that transposes a matrix: tokens to planes, and planes to tokens.

An item is a block of rows of the source, as many as numbers in a vector. Squares of these rows are
transposed in registers. The last square of a row, and the last rows, overlap the squares before
them, so a matrix must have at least as many rows and columns as numbers in a vector.
"""

from __future__ import annotations

from collections.abc import Iterator

from .plane_copy import FunctionText
from .records import TRANSPOSE, fields


def emit_transpose(width: int) -> Iterator[str]:
    """Yield the lines of the function `transpose(record, i0, i1)`.

    Args:
        width: float32 values in a vector, a power of 2.

    Example:
        >>> next(emit_transpose(8))
        'define void @transpose(ptr noalias %record, i64 %i0, i64 %i1) {'
    """
    code = FunctionText()
    for field, offset in fields(TRANSPOSE):
        code(f"%{field}.field = getelementptr i8, ptr %record, i64 {offset}")
        code(
            f"%{field} = load {'ptr' if field in ('source', 'out') else 'i64'}, ptr %{field}.field"
        )
    code(f"%last.row = sub i64 %rows, {width}")
    code(f"%last.column = sub i64 %columns, {width}")
    code(f"%columns.up = add i64 %columns, {width - 1}")
    code(f"%blocks = udiv i64 %columns.up, {width}")
    with code.loop("%i", "%i0", "%i1"):
        _block(code, "row", "%i", width)
        code("%row.place = mul i64 %row, %pitch")
        code("%row.at = getelementptr float, ptr %source, i64 %row.place")
        code("%to.row = getelementptr float, ptr %out, i64 %row")
        with code.loop("%j", "0", "%blocks"):
            _block(code, "column", "%j", width)
            code("%from = getelementptr float, ptr %row.at, i64 %column")
            code("%column.place = mul i64 %column, %out_pitch")
            code("%to = getelementptr float, ptr %to.row, i64 %column.place")
            _square(code, width)
    yield "define void @transpose(ptr noalias %record, i64 %i0, i64 %i1) {"
    yield "entry:"
    yield from code.lines
    yield "  ret void"
    yield "}"


def _block(code: FunctionText, name: str, counter: str, width: int) -> None:
    """Compute where a block begins; the last one overlaps the one before."""
    code(f"%{name}.free = mul i64 {counter}, {width}")
    code(f"%{name}.over = icmp sgt i64 %{name}.free, %last.{name}")
    code(f"%{name} = select i1 %{name}.over, i64 %last.{name}, i64 %{name}.free")


def _square(code: FunctionText, width: int) -> None:
    """Transpose a square: in step s, exchange the blocks of 2^s numbers of pairs of rows."""
    v = f"<{width} x float>"
    rows = []
    for k in range(width):
        code(f"%from.{k}.place = mul i64 %pitch, {k}")
        code(f"%from.{k} = getelementptr float, ptr %from, i64 %from.{k}.place")
        code(f"%square.0.{k} = load {v}, ptr %from.{k}, align 4")
        rows.append(f"%square.0.{k}")
    size, step = 1, 0
    while size < width:
        step += 1
        low = [k if not k & size else width + k - size for k in range(width)]
        high = [k + size if not k & size else width + k for k in range(width)]
        new = list(rows)
        for k in range(width):
            if k & size:
                continue
            for row, picks in ((k, low), (k + size, high)):
                indices = ", ".join(f"i32 {n}" for n in picks)
                code(
                    f"%square.{step}.{row} = shufflevector {v} {rows[k]}, {v} {rows[k + size]}, "
                    f"<{width} x i32> <{indices}>"
                )
                new[row] = f"%square.{step}.{row}"
        rows, size = new, 2 * size
    for k, name in enumerate(rows):
        code(f"%to.{k}.place = mul i64 %out_pitch, {k}")
        code(f"%to.{k} = getelementptr float, ptr %to, i64 %to.{k}.place")
        code(f"store {v} {name}, ptr %to.{k}, align 4")
