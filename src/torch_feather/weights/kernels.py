"""LLVM IR of the passes over float32 weights on a CPU: copy, collect, sum, write.

Each loop takes whole vectors, and the rest as one masked vector. All floating-point operations
round as NumPy's do: nothing is fused or reordered, so the results have the bits of `plain.py`.

The weights of a large network come from memory. A processor waits for few loads at a time, so each
loop prefetches what it reads and writes; that saves a third of the time of a copy.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from .. import roots
from .lanes import Body, Lanes, function, loop

SIGNLESS = 0x7FFFFFFF
INFINITY = 0x7F800000
BLOCK = 2048
"""Weights whose kept values are computed together: they stay in the L1 cache."""
WEIGHTS = "ptr noalias %w, ptr noalias %u, i64 %n"
"""Arguments: weights, memory for as many, their number."""


def _scores(v: Lanes, w: str, scale: str | None) -> str:
    """Return the bits of |w|, times the scale if there is one, as integers without sign."""
    scaled = w if scale is None else v.op("fmul", "float", w, scale)
    return v.op(
        "and", "i32", v.cast("bitcast", scaled, "float", "i32"), v.constant("i32", SIGNLESS)
    )


def _power_values(v: Lanes, w: str, tau: str, p: int) -> str:
    """Return T_p(w; tau) of kept weights; the operations of `plain.plain_values`."""
    bits = v.cast("bitcast", w, "float", "i32")
    magnitude = v.op("and", "i32", bits, v.constant("i32", SIGNLESS))
    if p == 1:
        sign = v.op("and", "i32", bits, v.constant("i32", -0x80000000))
        signed = v.op("or", "i32", sign, v.cast("bitcast", tau, "float", "i32"))
        return v.op("fsub", "float", w, v.cast("bitcast", signed, "i32", "float"))
    ratio = v.op("fdiv", "float", tau, v.cast("bitcast", magnitude, "i32", "float"))
    power = v.op("fmul", "float", ratio, ratio)
    if p == 3:
        power = v.op("fmul", "float", power, ratio)
    rest = v.op("fsub", "float", v.constant("float", 1.0), power)
    least = v.constant("float", 0.0 if p == 2 else 2.0**-24)
    small = v.new(f"fcmp olt {v.type('float')} {rest}, {least}")  # false for NaN, which stays
    rest = v.new(
        f"select {v.type('i1')} {small}, {v.type('float')} {least}, {v.type('float')} {rest}"
    )
    if p == 2:
        kind = v.type("float")
        found = v.new(f"call {kind} @llvm.sqrt.v{v.width}f32({kind} {rest})")
    else:
        found = _cube_root(v, rest)
    return v.op("fmul", "float", found, w)


def _cube_root(v: Lanes, x: str) -> str:
    """Return the cube root of numbers in (0, 1]; the operations of `roots.cube_root`."""

    def number(value: float) -> str:
        return v.constant("float", value)

    def binary(name: str) -> Callable[[str, str], str]:
        return lambda a, b: v.op(name, "float", a, b)

    add, subtract, multiply, divide = map(binary, ("fadd", "fsub", "fmul", "fdiv"))
    bits = v.op("udiv", "i32", v.cast("bitcast", x, "float", "i32"), v.constant("i32", 3))
    bits = v.op("add", "i32", bits, v.constant("i32", roots.START))
    y = v.cast("bitcast", bits, "i32", "float")
    quotient = divide(x, multiply(multiply(y, y), y))
    step = divide(number(3.0), add(quotient, number(2.0)))
    y = multiply(y, subtract(number(2.0), step))
    rest = subtract(divide(x, multiply(y, y)), y)
    return add(y, multiply(rest, number(roots.THIRD)))


def _kept(v: Lanes, w: str) -> str:
    """Return which weights have a score above `%limit`."""
    scores = _scores(v, w, v.spread("float", "%scale"))
    return v.new(f"icmp sgt {v.type('i32')} {scores}, {v.spread('i32', '%limit')}")


def emit_write(name: str, p: int | None, width: int, packs: bool) -> str:
    """Return the function that writes effective weights; p = None keeps their values.

    Its arguments: latent weights, effective weights, their number, the largest pruned score as
    bits, tau, the scale of the scores.

    Args:
        name: of the function.
        p: exponent of the operator.
        width: numbers in a vector.
        packs: compute kept weights side by side, as fast instructions move them there.

    Example:
        >>> emit_write('write_2', 2, 8, packs=False).splitlines()[0].split('(')[0]
        'define internal void @write_2'
    """
    arguments = "i32 %limit, float %tau, float %scale"

    def write(v: Lanes, i: str) -> None:
        w = v.load(v.at("%w", i))
        kept = _kept(v, w)
        kind, none = v.type("float"), "zeroinitializer"
        if p is not None:
            v.do(f"br i1 {v.any(kept)}, label %some{v.prefix}, label %none{v.prefix}")
            v.do(f"some{v.prefix}:")
        values = w if p is None else _power_values(v, w, v.spread("float", "%tau"), p)
        u = v.new(f"select {v.type('i1')} {kept}, {kind} {values}, {kind} {none}")
        if p is not None:
            v.do(f"br label %both{v.prefix}")
            v.do(f"none{v.prefix}:\nbr label %both{v.prefix}\nboth{v.prefix}:")
            u = v.new(f"phi {kind} [{u}, %some{v.prefix}], [{none}, %none{v.prefix}]")
        v.store(u, v.at("%u", i))

    if p is not None and packs:
        return _emit_packed(name, p, width)
    signature = f"internal void @{name}({WEIGHTS}, {arguments})"
    return function(signature, loop(width, "a", "%n", write))


def _emit_packed(name: str, p: int, width: int) -> str:
    """Return the function of `_emit_write` that moves the kept weights of a block side by side."""

    def pack(v: Lanes, i: str) -> None:
        w = v.load(v.at("%w", i))
        kept = _kept(v, w)
        if v.mask is not None:
            kept = v.op("and", "i1", kept, v.mask)
        end = v.advance("%found", v.count(kept))
        packed = v.new(f"getelementptr float, ptr %packed, i64 {end}")
        v.do(f"store {v.type('float')} {v.pack(w, kept)}, ptr {packed}, align 4")

    def compute(v: Lanes, i: str) -> None:
        address = v.new(f"getelementptr float, ptr %packed, i64 {i}")
        v.store(_power_values(v, v.load(address), v.spread("float", "%tau"), p), address)

    def unpack(v: Lanes, i: str) -> None:
        kept = _kept(v, v.load(v.new(f"getelementptr float, ptr %w, i64 {i}")))
        if v.mask is not None:
            kept = v.op("and", "i1", kept, v.mask)
        start = v.advance("%taken", v.count(kept))
        packed = v.new(f"getelementptr float, ptr %packed, i64 {start}")
        v.store(v.unpack(packed, kept), v.at("%u", i))

    cutoff = "i32 %limit, float %tau, float %scale"
    block = function(
        f"internal void @{name}_block({WEIGHTS}, {cutoff}, ptr noalias %packed)",
        "%found = alloca i64\n%taken = alloca i64",
        "store i64 0, ptr %found\nstore i64 0, ptr %taken",
        loop(width, "a", "%n", pack),
        "%kept = load i64, ptr %found",
        loop(width, "b", "%kept", compute),
        loop(width, "c", "%n", unpack),
    )
    blocks = f"""
%packed = alloca [{BLOCK + width} x float], align 64
br label %head
head:
%i = phi i64 [0, %entry], [%next, %body]
%more = icmp slt i64 %i, %n
br i1 %more, label %body, label %done
body:
%left = sub i64 %n, %i
%size = call i64 @llvm.smin.i64(i64 %left, i64 {BLOCK})
%source = getelementptr float, ptr %w, i64 %i
%target = getelementptr float, ptr %u, i64 %i
call void @{name}_block(ptr %source, ptr %target, i64 %size, {cutoff}, ptr %packed)
%next = add i64 %i, {BLOCK}
br label %head
done:"""
    return block + "\n" + function(f"internal void @{name}({WEIGHTS}, {cutoff})", blocks)


def emit_collect(width: int, copies: bool) -> str:
    """Return the function that counts and collects scores.

    Its arguments: weights, memory for their copy, their number, scale, bounds as bits, memory for
    collected scores and one more vector, how many it holds, their number so far. It returns how
    many are at most `low`, and collects those above it and below `high`.

    Args:
        width: numbers in a vector.
        copies: whether to copy weights; if so, their scores are their magnitudes.

    Example:
        >>> emit_collect(8, copies=True).splitlines()[0].split('(')[0]
        'define internal i64 @read'
    """

    def collect(v: Lanes, i: str) -> None:
        w = v.load(v.at("%w", i))
        if copies:
            v.store(w, v.at("%u", i))
        bits = _scores(v, w, None if copies else v.spread("float", "%scale"))
        above = v.new(f"icmp sgt {v.type('i32')} {bits}, {v.spread('i32', '%low')}")
        if v.mask is not None:
            above = v.op("and", "i1", above, v.mask)
        below = v.new(f"icmp slt {v.type('i32')} {bits}, {v.spread('i32', '%high')}")
        within = v.op("and", "i1", above, below)
        v.advance("%above", v.count(above))
        v.do(f"br i1 {v.any(within)}, label %take{v.prefix}, label %skip{v.prefix}")
        v.do(f"take{v.prefix}:")
        end = v.advance("%found", v.count(within))
        end = v.new(f"call i64 @llvm.smin.i64(i64 {end}, i64 %room)")
        near = v.new(f"getelementptr i32, ptr %near, i64 {end}")
        v.do(f"store {v.type('i32')} {v.pack(bits, within, 'i32')}, ptr {near}, align 4")
        v.do(f"br label %skip{v.prefix}\nskip{v.prefix}:")

    bounds = "float %scale, i32 %low, i32 %high, ptr noalias %near, i64 %room, ptr noalias %found"
    return function(
        f"internal i64 @{'read' if copies else 'count'}({WEIGHTS}, {bounds})",
        "%above = alloca i64\nstore i64 0, ptr %above",
        loop(width, "a", "%n", collect),
        end="%all = load i64, ptr %above\n%upto = sub i64 %n, %all\nret i64 %upto",
    )


def emit_copy(width: int) -> str:
    """Return the function that copies weights; memcpy is slower on some virtual machines.

    Example:
        >>> emit_copy(8).splitlines()[0].split('(')[0]
        'define internal void @copy'
    """

    def copy(v: Lanes, i: str) -> None:
        v.store(v.load(v.at("%w", i)), v.at("%u", i))

    return function(f"internal void @copy({WEIGHTS})", loop(width, "a", "%n", copy))


def _emit_fold(width: int, factors: Sequence[int]) -> str:
    """Return the function that adds the columns of a checksum, times their factors."""
    words = f"<{width // 2} x i64>"

    def multiply(v: Lanes, i: str) -> None:
        column, factor = (
            v.load(v.new(f"getelementptr i64, ptr {array}, i64 {i}"), "i64")
            for array in ("%columns", "@factors")
        )
        total = v.new(f"load {words}, ptr %total")
        total = v.op("add", "i64", total, v.op("mul", "i64", column, factor))
        v.do(f"store {words} {total}, ptr %total")

    constants = ", ".join(f"i64 {factor}" for factor in factors)
    table = f"@factors = internal constant [{len(factors)} x i64] [{constants}], align 64"
    return f"{table}\n" + function(
        "internal i64 @fold(ptr noalias %columns)",
        f"%total = alloca {words}\nstore {words} zeroinitializer, ptr %total",
        loop(width // 2, "a", str(len(factors)), multiply),
        f"%totals = load {words}, ptr %total",
        f"%sum = call i64 @llvm.vector.reduce.add.v{width // 2}i64({words} %totals)",
        end="ret i64 %sum",
    )


def _add_to_columns(width: int) -> Body:
    """Return the work on a part of a row: its words are added to `%columns`.

    `%most` becomes the largest magnitudes, as bits.
    """
    both, signless = f"<{width} x i32>", Lanes(width, "").constant("i32", SIGNLESS)

    def add(v: Lanes, i: str) -> None:
        word = v.load(v.at("%row", i, "i64"), "i64")
        column = v.new(f"getelementptr i64, ptr %columns, i64 {i}")
        v.store(v.op("add", "i64", v.load(column, "i64"), word), column, "i64")
        bits = v.new(f"bitcast {v.type('i64')} {word} to {both}")
        bits = v.new(f"and {both} {bits}, {signless}")
        most = v.new(f"load {both}, ptr %most")
        most = v.new(f"call {both} @llvm.smax.v{width}i32({both} {most}, {both} {bits})")
        v.do(f"store {both} {most}, ptr %most")

    return add


def emit_sum(width: int, factors: Sequence[int]) -> str:
    """Return the function that computes a checksum, see `checksum.py`.

    Its arguments: weights from the start of a row on, their number, memory for the checksum. It
    returns whether a weight is NaN or infinite.

    Args:
        width: numbers in a vector.
        factors: of the columns.

    Example:
        >>> [line for line in emit_sum(8, [3, 5]).splitlines() if "@sum" in line][0].split("(")[0]
        'define internal i32 @sum'
    """
    columns, both = len(factors), f"<{width} x i32>"
    return f"{_emit_fold(width, factors)}\n" + function(
        "internal i32 @sum(ptr noalias %w, i64 %n, ptr noalias %checksum)",
        f"%most = alloca {both}\nstore {both} zeroinitializer, ptr %most",
        f"""%columns = alloca [{columns} x i64], align 64
call void @llvm.memset.p0.i64(ptr %columns, i8 0, i64 {8 * columns}, i1 false)
%words = lshr i64 %n, 1
br label %head
head:
%r = phi i64 [0, %entry], [%next, %donea]
%more = icmp slt i64 %r, %words
br i1 %more, label %body, label %rest
body:
%left = sub i64 %words, %r
%count = call i64 @llvm.smin.i64(i64 %left, i64 {columns})
%row = getelementptr i64, ptr %w, i64 %r""",
        loop(width // 2, "a", "%count", _add_to_columns(width)),
        f"""%next = add i64 %r, {columns}
br label %head
rest:
%all = load {both}, ptr %most
%top = call i32 @llvm.vector.reduce.smax.v{width}i32({both} %all)
%half = trunc i64 %n to i1
br i1 %half, label %odd, label %done
odd:
%end = sub i64 %n, 1
%last = getelementptr i32, ptr %w, i64 %end
%bits = load i32, ptr %last
%magnitude = and i32 %bits, {SIGNLESS}
%column = getelementptr i64, ptr %columns, i64 {columns - 1}
%old = load i64, ptr %column
%word = zext i32 %bits to i64
%new = add i64 %old, %word\nstore i64 %new, ptr %column
br label %done
done:
%other = phi i32 [0, %rest], [%magnitude, %odd]
%most2 = call i32 @llvm.smax.i32(i32 %top, i32 %other)
%nonfinite = icmp sge i32 %most2, {INFINITY}
%result = zext i1 %nonfinite to i32""",
        "%folded = call i64 @fold(ptr %columns)\nstore i64 %folded, ptr %checksum",
        end="ret i32 %result",
    )
