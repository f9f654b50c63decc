"""LLVM IR of the passes over float32 weights on a CPU: copy, scan, collect, read, write.

Each loop takes whole vectors, and the rest as one masked vector. All floating-point operations
round as NumPy's do: nothing is fused or reordered, so the results have the bits of `plain.py`.

The weights of a large network come from memory. A processor waits for few loads at a time, so each
loop prefetches what it reads and writes; that saves a third of the time of a copy.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import dataclass, field

from .. import roots

SIGNLESS = 0x7FFFFFFF
INFINITY = 0x7F800000
AHEAD = 2048
"""Bytes from a load to its prefetch."""
BLOCK = 2048
"""Weights whose kept values are computed together: they stay in the L1 cache."""


@dataclass
class Lanes:
    """Emits instructions on vectors of `width` numbers; each method returns the name of its result.

    Attributes:
        width: numbers in a vector.
        prefix: of the names of results.
        mask: the lanes that are loaded and stored; None for all.
        lines: the instructions.

    Example:
        >>> lanes = Lanes(8, "v")
        >>> lanes.op("fmul", "float", "%a", "%b")
        '%v1'
        >>> lanes.lines
        ['%v1 = fmul <8 x float> %a, %b']
    """

    width: int
    prefix: str
    mask: str | None = None
    lines: list[str] = field(default_factory=list)
    _count: int = 0

    def type(self, kind: str) -> str:
        """Return the vector type of numbers of a kind, such as float or i32."""
        return f"<{self.width} x {kind}>"

    def do(self, text: str) -> None:
        """Append an instruction without a result."""
        self.lines.append(text)

    def new(self, text: str) -> str:
        """Append an instruction."""
        self._count += 1
        name = f"%{self.prefix}{self._count}"
        self.lines.append(f"{name} = {text}")
        return name

    def op(self, name: str, kind: str, a: str, b: str) -> str:
        """Append an operation on two vectors."""
        return self.new(f"{name} {self.type(kind)} {a}, {b}")

    def constant(self, kind: str, value: float) -> str:
        """Return a vector of equal constants."""
        one = hex_float(value) if kind == "float" else str(int(value))
        return "<" + ", ".join([f"{kind} {one}"] * self.width) + ">"

    def spread(self, kind: str, name: str) -> str:
        """Return a vector of equal values of an argument."""
        one = self.new(f"insertelement {self.type(kind)} poison, {kind} {name}, i32 0")
        zeros = f"<{self.width} x i32> zeroinitializer"
        return self.new(f"shufflevector {self.type(kind)} {one}, {self.type(kind)} poison, {zeros}")

    def cast(self, name: str, a: str, source: str, target: str) -> str:
        """Append a conversion."""
        return self.new(f"{name} {self.type(source)} {a} to {self.type(target)}")

    def at(self, pointer: str, index: str, kind: str = "float") -> str:
        """Return the address of a number, and prefetch what follows."""
        address = self.new(f"getelementptr {kind}, ptr {pointer}, i64 {index}")
        if self.mask is None:
            ahead = self.new(f"getelementptr i8, ptr {address}, i64 {AHEAD}")
            self.do(f"call void @llvm.prefetch.p0(ptr {ahead}, i32 0, i32 2, i32 1)")
        return address

    def load(self, pointer: str, kind: str = "float") -> str:
        """Append a load; lanes outside of the mask are 0."""
        vector = self.type(kind)
        if self.mask is None:
            return self.new(f"load {vector}, ptr {pointer}, align 4")
        name = f"@llvm.masked.load.{self._suffix(kind)}.p0"
        rest = f"{self.type('i1')} {self.mask}, {vector} zeroinitializer"
        return self.new(f"call {vector} {name}(ptr align 4 {pointer}, {rest})")

    def store(self, value: str, pointer: str, kind: str = "float") -> None:
        """Append a store."""
        vector = self.type(kind)
        if self.mask is None:
            self.do(f"store {vector} {value}, ptr {pointer}, align 4")
            return
        name = f"@llvm.masked.store.{self._suffix(kind)}.p0"
        mask = f"{self.type('i1')} {self.mask}"
        self.do(f"call void {name}({vector} {value}, ptr align 4 {pointer}, {mask})")

    def pack(self, value: str, mask: str, kind: str = "float") -> str:
        """Move the lanes of a mask to the front."""
        vector, bits = self.type(kind), self.type("i1")
        name = f"@llvm.experimental.vector.compress.{self._suffix(kind)}"
        return self.new(
            f"call {vector} {name}({vector} {value}, {bits} {mask}, {vector} zeroinitializer)"
        )

    def unpack(self, pointer: str, mask: str) -> str:
        """Load consecutive numbers into the lanes of a mask; the others are 0."""
        vector, bits = self.type("float"), self.type("i1")
        name = f"@llvm.masked.expandload.{self._suffix('float')}"
        return self.new(
            f"call {vector} {name}(ptr {pointer}, {bits} {mask}, {vector} zeroinitializer)"
        )

    def count(self, mask: str) -> str:
        """Return the number of lanes of a mask, an i64."""
        bits = self.new(f"bitcast {self.type('i1')} {mask} to i{self.width}")
        return self.new(f"call i64 @llvm.ctpop.i64(i64 {self.new(f'zext i{self.width} {bits} to i64')})")

    def any(self, mask: str) -> str:
        """Return whether a lane of a mask is set."""
        bits = self.new(f"bitcast {self.type('i1')} {mask} to i{self.width}")
        return self.new(f"icmp ne i{self.width} {bits}, 0")

    def advance(self, pointer: str, by: str) -> str:
        """Add to an i64 in memory; return what it was."""
        old = self.new(f"load i64, ptr {pointer}")
        self.do(f"store i64 {self.new(f'add i64 {old}, {by}')}, ptr {pointer}")
        return old

    def _suffix(self, kind: str) -> str:
        return f"v{self.width}{kind.replace('float', 'f32')}"


def hex_float(value: float) -> str:
    """Return a float32 constant as LLVM writes it.

    Example:
        >>> hex_float(1.0)
        '0x3FF0000000000000'
    """
    rounded = struct.unpack("f", struct.pack("f", value))[0]
    return f"0x{struct.unpack('<Q', struct.pack('<d', rounded))[0]:016X}"


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
    bits = v.cast("sitofp", v.cast("bitcast", x, "float", "i32"), "i32", "float")
    bits = add(multiply(bits, number(roots.THIRD)), number(roots.SHIFT))
    y = v.cast("bitcast", v.cast("fptosi", bits, "float", "i32"), "i32", "float")
    step = multiply(divide(x, multiply(y, y)), number(roots.THIRD))
    y = add(multiply(y, number(roots.TWO_THIRDS)), step)
    rounded = v.op(
        "add", "i32", v.cast("bitcast", y, "float", "i32"), v.constant("i32", roots.HALF_BIT)
    )
    rounded = v.op("and", "i32", rounded, v.constant("i32", roots.TOP_BITS))
    y = v.cast("bitcast", rounded, "i32", "float")
    cube = multiply(multiply(y, y), y)
    e = divide(subtract(x, cube), cube)
    series = subtract(number(roots.SECOND), multiply(e, number(roots.THIRD_TERM)))
    series = subtract(number(roots.FIRST), multiply(series, e))
    return add(y, multiply(multiply(series, e), y))


Body = Callable[[Lanes, str], None]
"""Appends the work on one vector, given the index of its first number."""


def _loop(width: int, tag: str, count: str, body: Body) -> str:
    """Return a loop over vectors of `count` numbers, the last of them masked.

    Args:
        width: numbers in a vector.
        tag: distinguishes the labels of a function's loops.
        count: name of an i64.
        body: may end in another block than it began.
    """
    whole, rest = Lanes(width, tag), Lanes(width, tag + "r", mask=f"%mask{tag}")
    lanes = ", ".join(f"i64 {lane}" for lane in range(width))
    left = rest.spread("i64", f"%left{tag}")
    rest.do(f"%mask{tag} = icmp slt {rest.type('i64')} <{lanes}>, {left}")
    body(whole, f"%i{tag}")
    body(rest, f"%i{tag}")
    return "\n".join(
        [
            f"br label %begin{tag}",
            f"begin{tag}:",
            f"br label %head{tag}",
            f"head{tag}:",
            f"%i{tag} = phi i64 [0, %begin{tag}], [%step{tag}, %next{tag}]",
            f"%step{tag} = add i64 %i{tag}, {width}",
            f"%more{tag} = icmp sle i64 %step{tag}, {count}",
            f"br i1 %more{tag}, label %body{tag}, label %rest{tag}",
            f"body{tag}:",
            *whole.lines,
            f"br label %next{tag}",
            f"next{tag}:",
            f"br label %head{tag}",
            f"rest{tag}:",
            f"%left{tag} = sub i64 {count}, %i{tag}",
            f"%partial{tag} = icmp sgt i64 %left{tag}, 0",
            f"br i1 %partial{tag}, label %last{tag}, label %done{tag}",
            f"last{tag}:",
            *rest.lines,
            f"br label %done{tag}",
            f"done{tag}:",
        ]
    )


def _function(signature: str, *body: str, end: str = "ret void") -> str:
    """Return a function of a signature, its loops and its last instruction."""
    return "\n".join([f"define {signature} {{", "entry:", *body, end, "}"])


def _kept(v: Lanes, w: str) -> str:
    """Return which weights have a score above `%limit`."""
    scores = _scores(v, w, v.spread("float", "%scale"))
    return v.new(f"icmp sgt {v.type('i32')} {scores}, {v.spread('i32', '%limit')}")


WEIGHTS = "ptr noalias %w, ptr noalias %u, i64 %n"


def _emit_write(name: str, p: int | None, width: int, packs: bool) -> str:
    """Return the function that writes effective weights; p = None keeps their values.

    Its arguments: latent weights, effective weights, their number, the largest pruned score as
    bits, tau, the scale of the scores.

    Args:
        name: of the function.
        p: exponent of the operator.
        width: numbers in a vector.
        packs: compute kept weights side by side, as fast instructions move them there.
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

    if p is None or not packs:
        return _function(f"internal void @{name}({WEIGHTS}, {arguments})", _loop(width, "a", "%n", write))
    return _emit_packed(name, p, width)


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

    block = _function(
        f"internal void @{name}_block({WEIGHTS}, i32 %limit, float %tau, float %scale,"
        " ptr noalias %packed)",
        "%found = alloca i64\n%taken = alloca i64",
        "store i64 0, ptr %found\nstore i64 0, ptr %taken",
        _loop(width, "a", "%n", pack),
        "%kept = load i64, ptr %found",
        _loop(width, "b", "%kept", compute),
        _loop(width, "c", "%n", unpack),
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
call void @{name}_block(ptr %source, ptr %target, i64 %size, i32 %limit, float %tau, float %scale, ptr %packed)
%next = add i64 %i, {BLOCK}
br label %head
done:"""
    return block + "\n" + _function(
        f"internal void @{name}({WEIGHTS}, i32 %limit, float %tau, float %scale)", blocks
    )


def _emit_collect(width: int, copies: bool) -> str:
    """Return the function that counts and collects scores.

    Its arguments: weights, memory for their copy, their number, scale, bounds as bits, memory for
    collected scores and one more vector, how many it holds, their number so far. It returns how
    many are at most `low`, and collects those above it and below `high`.

    Args:
        width: numbers in a vector.
        copies: whether to copy weights; if so, their scores are their magnitudes.
    """

    def collect(v: Lanes, i: str) -> None:
        w = v.load(v.at("%w", i))
        if copies:
            v.store(w, v.at("%u", i))
        bits = _scores(v, w, None if copies else v.spread("float", "%scale"))
        above = v.new(f"icmp sgt {v.type('i32')} {bits}, {v.spread('i32', '%low')}")
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
    return _function(
        f"internal i64 @{'read' if copies else 'count'}({WEIGHTS}, {bounds})",
        "%above = alloca i64\nstore i64 0, ptr %above",
        _loop(width, "a", "%n", collect),  # lanes outside of the mask are 0, which is not above
        end="%all = load i64, ptr %above\n%upto = sub i64 %n, %all\nret i64 %upto",
    )


def _emit_copy(width: int) -> str:
    """Return the function that copies weights; memcpy is slower on some virtual machines."""

    def copy(v: Lanes, i: str) -> None:
        v.store(v.load(v.at("%w", i)), v.at("%u", i))

    return _function(f"internal void @copy({WEIGHTS})", _loop(width, "a", "%n", copy))


def _emit_sum(width: int, columns: int) -> str:
    """Return the function that adds weights to the columns of a checksum, see `checksum.py`.

    Its arguments: weights from the start of a row on, their number, columns. It returns whether a
    weight is NaN or infinite.
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

    return _function(
        "internal i32 @sum(ptr noalias %w, i64 %n, ptr noalias %columns)",
        f"%most = alloca {both}\nstore {both} zeroinitializer, ptr %most",
        f"""%words = lshr i64 %n, 1
br label %head
head:
%r = phi i64 [0, %entry], [%next, %donea]
%more = icmp slt i64 %r, %words
br i1 %more, label %body, label %rest
body:
%left = sub i64 %words, %r
%count = call i64 @llvm.smin.i64(i64 %left, i64 {columns})
%row = getelementptr i64, ptr %w, i64 %r""",
        _loop(width // 2, "a", "%count", add),
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
%new = add i64 %old, %word
store i64 %new, ptr %column
br label %done
done:
%other = phi i32 [0, %rest], [%magnitude, %odd]
%most2 = call i32 @llvm.smax.i32(i32 %top, i32 %other)
%nonfinite = icmp sge i32 %most2, {INFINITY}
%result = zext i1 %nonfinite to i32""",
        end="ret i32 %result",
    )


FIELDS = {
    "latent": "ptr", "parameter": "ptr", "size": "i64",
    "whole": "ptr", "count": "i64", "columns": "ptr",
    "begin": "i64", "end": "i64", "below": "i64",
    "low": "i32", "high": "i32", "limit": "i32", "flag": "i32",
    "tau": "float", "scale": "float",
}  # fmt: skip
"""Fields of a row of a table, and their types; `compiled.py` describes them."""


def _get(*names: str) -> str:
    """Return instructions that load fields of the row."""
    return "\n".join(
        f"%{name}.at = getelementptr %Row, ptr %row, i32 0, i32 {list(FIELDS).index(name)}\n"
        f"%{name} = load {FIELDS[name]}, ptr %{name}.at"
        for name in names
    )


def _set(name: str, value: str) -> str:
    """Return instructions that store a field of the row."""
    field = f"getelementptr %Row, ptr %row, i32 0, i32 {list(FIELDS).index(name)}"
    return f"%{name}.to = {field}\nstore {FIELDS[name]} {value}, ptr %{name}.to"


def _each_row(name: str, arguments: str, before: str, body: str) -> str:
    """Return a function that is called for the first `%rows` rows of a table.

    Args:
        name: of the function.
        arguments: more of them, each after a comma.
        before: instructions before the first row.
        body: instructions for `%row`; they end with a branch to `%next`.
    """
    return _function(
        f"void @{name}(ptr %table, i64 %rows{arguments})",
        before,
        f"""br label %head
head:
%r = phi i64 [0, %entry], [%following, %next]
%more = icmp slt i64 %r, %rows
br i1 %more, label %body, label %done
body:
%row = getelementptr %Row, ptr %table, i64 %r
{body}
next:
%following = add i64 %r, 1
br label %head
done:""",
    )


def _emit_leave(columns: int) -> str:
    """Return `leave`: parameters become latent weights, unless other code wrote into them.

    Sets `flag` to whether the checksum differs. A null pointer for latent weights copies nothing.
    """
    size = 8 * columns
    return _each_row(
        "leave",
        "",
        f"%found = alloca [{columns} x i64], align 64",
        f"""{_get("latent", "parameter", "size", "columns")}
call void @llvm.memset.p0.i64(ptr %found, i8 0, i64 {size}, i1 false)
call i32 @sum(ptr %parameter, i64 %size, ptr %found)
%order = call i32 @memcmp(ptr %found, ptr %columns, i64 {size})
%differs = icmp ne i32 %order, 0
%marked = zext i1 %differs to i32
{_set("flag", "%marked")}
%nothing = icmp eq ptr %latent, null
%stays = or i1 %differs, %nothing
br i1 %stays, label %next, label %copies
copies:
call void @copy(ptr %latent, ptr %parameter, i64 %size)
br label %next""",
    )


def _emit_enter(copies: bool) -> str:
    """Return `enter`: latent weights become parameters, and magnitudes are collected.

    Its arguments: memory for collected scores and one more vector, how many it holds. Sets `below`,
    and where the collected scores `begin` and `end`; an end beyond the memory shows that some were
    lost. Without copies, it is `collect`.
    """
    values = "ptr %parameter, ptr %latent, i64 %size, float %scale, i32 %low, i32 %high"
    return _each_row(
        "enter" if copies else "collect",
        ", ptr %near, i64 %room",
        "%found = alloca i64\nstore i64 0, ptr %found",
        f"""{_get("latent", "parameter", "size", "low", "high", "scale")}
%first = load i64, ptr %found
{_set("begin", "%first")}
%upto = call i64 @{"read" if copies else "count"}({values}, ptr %near, i64 %room, ptr %found)
{_set("below", "%upto")}
%last = load i64, ptr %found
{_set("end", "%last")}
br label %next""",
    )


def _emit_update(p: int | None, columns: int) -> str:
    """Return `update_P`: parameters become effective weights; then a range of them is summed.

    With tau = 0, kept weights keep their values. Sets `flag` to whether a sum found NaN or infinity.
    """
    values = "ptr %latent, ptr %parameter, i64 %size, i32 %limit, float %tau, float %scale"
    return _each_row(
        f"update_{p or 'hard'}",
        "",
        "",
        f"""{_get("latent", "parameter", "size", "limit", "tau", "scale")}
{_get("whole", "count", "columns")}
%soft = fcmp ogt float %tau, 0.0
br i1 %soft, label %power, label %hard
power:
call void @write_{p or "hard"}({values})
br label %written
hard:
call void @write_hard({values})
br label %written
written:
%sums = icmp sgt i64 %count, 0
br i1 %sums, label %add, label %next
add:
call void @llvm.memset.p0.i64(ptr %columns, i8 0, i64 {8 * columns}, i1 false)
%odd = call i32 @sum(ptr %whole, i64 %count, ptr %columns)
{_set("flag", "%odd")}
br label %next""",
    )


def _declare(width: int) -> list[str]:
    """Return the declarations of intrinsics on vectors of float32 numbers and on words."""
    found = []
    for kind, short, lanes in (("float", "f32", width), ("i32", "i32", width), ("i64", "i64", width // 2)):
        vector, bits, suffix = f"<{lanes} x {kind}>", f"<{lanes} x i1>", f"v{lanes}{short}"
        found += [
            f"declare {vector} @llvm.masked.load.{suffix}.p0(ptr, {bits}, {vector})",
            f"declare void @llvm.masked.store.{suffix}.p0({vector}, ptr, {bits})",
            f"declare {vector} @llvm.experimental.vector.compress.{suffix}({vector}, {bits}, {vector})",
        ]
    vector, bits = f"<{width} x float>", f"<{width} x i1>"
    ints = f"<{width} x i32>"
    return [
        *found,
        f"declare {vector} @llvm.masked.expandload.v{width}f32(ptr, {bits}, {vector})",
        f"declare {vector} @llvm.sqrt.v{width}f32({vector})",
        f"declare {ints} @llvm.smax.v{width}i32({ints}, {ints})",
        f"declare i32 @llvm.vector.reduce.smax.v{width}i32({ints})",
        "declare i64 @llvm.ctpop.i64(i64)",
        "declare i64 @llvm.smin.i64(i64, i64)",
        "declare i32 @llvm.smax.i32(i32, i32)",
        "declare void @llvm.memset.p0.i64(ptr, i8, i64, i1)",
        "declare i32 @memcmp(ptr, ptr, i64)",
        "declare void @llvm.prefetch.p0(ptr, i32, i32, i32)",
    ]


def emit_module(width: int, columns: int, packs: bool = False) -> str:
    """Return the LLVM IR of all functions.

    Args:
        width: float32 numbers in a vector.
        columns: 64-bit words in a row of a checksum.
        packs: whether the processor moves the lanes of a mask together by one instruction.

    Example:
        >>> text = emit_module(8, 509)
        >>> [line.split("(")[0] for line in text.splitlines() if line.startswith("define void")][:2]
        ['define void @leave', 'define void @enter']
    """
    kinds = (None, 1, 2, 3)
    return "\n".join(
        [
            f"%Row = type {{{', '.join(FIELDS.values())}}}",
            *_declare(width),
            *(_emit_write(f"write_{p or 'hard'}", p, width, packs) for p in kinds),
            *(_emit_collect(width, copies) for copies in (True, False)),
            _emit_copy(width),
            _emit_sum(width, columns),
            _emit_leave(columns),
            *(_emit_enter(copies) for copies in (True, False)),
            *(_emit_update(p, columns) for p in kinds),
        ]
    )
