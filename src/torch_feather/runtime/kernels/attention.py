"""LLVM IR of the attention kernel: softmax(scale · qᵀk + mask) · vᵀ of tokens in planes.

A channel of the tokens is a row of memory, so several queries are the numbers of a vector. The
softmax over the keys then needs no sums within a vector, and nothing is transposed. A work item is
some vectors of queries of one head of one sequence:

    packed = scale · q                                    # (depth, queries)
    high, total, results = -inf, 0, 0
    for block of keys:
        for tile of keys in the block:
            scores[tile] = k[:, tile]ᵀ · packed           # stays in registers
        scores += mask
        high, before = max(high, scores), high
        scores = exp(scores - high)
        total = total · exp(before - high) + sum of scores
        for tile of channels:
            results[tile] = results[tile] · exp(before - high) + v[tile, block] · scores
    out = results / total                                 # 0 if all keys are masked

The scratch memory of a thread holds `scores`, `packed` and `results`.

The order of the sums follows "Self-attention Does Not Need O(n²) Memory" (Rabe & Staats, 2021).
"""

from __future__ import annotations

from collections.abc import Iterator

from .attention_block import KEYS, POINTERS, Block, load_record
from .plane_copy import MASKED_WIDTHS
from .text import FunctionText

VECTORS = 3  # vectors of queries in a work item, at most


def scratch_size(width: int, depth: int, v_depth: int) -> int:
    """Return the number of float32 values of scratch memory that a thread needs.

    Args:
        width: float32 values in a vector.
        depth: channels of a head of queries and keys.
        v_depth: channels of a head of values.

    Example:
        >>> scratch_size(16, 64, 64)
        12288
    """
    return (KEYS + depth + v_depth) * VECTORS * width


def emit_attention(width: int) -> Iterator[str]:
    """Yield the lines of the function `attention(record, i0, i1)`, and of those that it calls.

    Args:
        width: float32 values in a vector.

    Example:
        >>> next(emit_attention(8))[:43]
        'define internal void @attention_1(ptr noali'
    """
    if width not in MASKED_WIDTHS:  # `declare_masked` declares it for the others
        v, bv = f"<{width} x float>", f"<{width} x i1>"
        yield f"declare void @llvm.masked.store.v{width}f32.p0({v}, ptr, i32, {bv})"
    for vectors in range(1, VECTORS + 1):
        yield from Block(width, vectors).emit()
    code = FunctionText()
    load_record(code)
    # A thread computes the items from items · thread / threads on, rounded down.
    code("%i0.threads = mul i64 %i0, %threads")
    code("%i0.up = add i64 %i0.threads, %items")
    code("%i0.less = sub i64 %i0.up, 1")
    code("%thread = udiv i64 %i0.less, %items")
    code("%thread.scratch = mul i64 %thread, %scratch_size")
    code("%scratch.here = getelementptr float, ptr %scratch, i64 %thread.scratch")
    code(f"%queries.up = add i64 %queries, {width - 1}")
    code(f"%vectors = udiv i64 %queries.up, {width}")
    code("%is.whole = icmp eq ptr %mask, null")
    with code.loop("%i", "%i0", "%i1"):
        _item(code, width)
    yield "define void @attention(ptr noalias %record, i64 %i0, i64 %i1) {"
    yield "entry:"
    yield from code.lines
    yield "  ret void"
    yield "}"


def _item(code: FunctionText, width: int) -> None:
    """Locate an item, and call the function for its number of vectors."""
    code("%block = urem i64 %i, %blocks")
    code("%i.blocks = udiv i64 %i, %blocks")
    code("%head = urem i64 %i.blocks, %heads")
    code("%sequence = udiv i64 %i.blocks, %heads")
    code("%block.after = add i64 %block, 1")
    for name, block in (("from", "%block"), ("to", "%block.after")):
        code(f"%{name}.all = mul i64 {block}, %vectors")
        code(f"%{name} = udiv i64 %{name}.all, %blocks")
    code("%count = sub i64 %to, %from")
    code(f"%first = mul i64 %from, {width}")
    code("%query.sequence = mul i64 %sequence, %queries")
    code("%query = add i64 %query.sequence, %first")
    code("%key = mul i64 %sequence, %keys")
    for name, depth, pixel in (
        ("q", "depth", "query"),
        ("k", "depth", "key"),
        ("v", "v_depth", "key"),
        ("out", "v_depth", "query"),
    ):
        code(f"%{name}.channel = mul i64 %head, %{depth}")
        code(f"%{name}.head = mul i64 %{name}.channel, %{name}_plane")
        code(f"%{name}.place = add i64 %{name}.head, %{pixel}")
        code(f"%{name}.here = getelementptr float, ptr %{name}, i64 %{name}.place")
    code("%mask.turn = urem i64 %sequence, %masks")
    code("%mask.s = mul i64 %mask.turn, %mask_sequence")
    code("%mask.h = mul i64 %head, %mask_head")
    code("%mask.sh = add i64 %mask.s, %mask.h")
    code("%mask.place = add i64 %mask.sh, %first")
    code("%mask.some = getelementptr float, ptr %mask, i64 %mask.place")
    code("%mask.here = select i1 %is.whole, ptr null, ptr %mask.some")
    pointers = ", ".join(f"ptr %{name}.here" for name in POINTERS)
    for n in range(1, VECTORS + 1):
        code(f"%is.{n} = icmp eq i64 %count, {n}")
        code(f"%turns.{n} = zext i1 %is.{n} to i64")
        with code.loop(f"%turn.{n}", "0", f"%turns.{n}"):
            code(f"call void @attention_{n}(ptr %record, {pointers}, i64 %first)")
