"""LLVM IR of the passes over float32 weights on a CPU: copy, scan, collect, write.

Each function is a loop over vectors, followed by a loop over the remaining weights one by one. All
floating-point operations round as NumPy's do: nothing is fused or reordered, so the results have
the bits of `plain.py`.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import dataclass, field

from .. import roots

SIGNLESS = 0x7FFFFFFF
INFINITY = 0x7F800000


@dataclass
class Lanes:
    """Emits instructions on vectors of `width` numbers; each method returns the name of its result.

    Example:
        >>> lanes = Lanes(8, "v")
        >>> lanes.op("fmul", "float", "%a", "%b")
        '%v1'
        >>> lanes.lines
        ['%v1 = fmul <8 x float> %a, %b']
    """

    width: int
    prefix: str
    lines: list[str] = field(default_factory=list)
    _count: int = 0

    def type(self, kind: str) -> str:
        """Return the vector type of numbers of a kind, such as float or i32."""
        return f"<{self.width} x {kind}>"

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

    def load(self, pointer: str, kind: str = "float") -> str:
        """Append a load."""
        return self.new(f"load {self.type(kind)}, ptr {pointer}, align 4")

    def store(self, value: str, pointer: str, kind: str = "float") -> None:
        """Append a store."""
        self.lines.append(f"store {self.type(kind)} {value}, ptr {pointer}, align 4")

    def any(self, mask: str) -> str:
        """Return whether a lane of a mask is set."""
        bits = self.new(f"bitcast {self.type('i1')} {mask} to i{self.width}")
        return self.new(f"icmp ne i{self.width} {bits}, 0")


def hex_float(value: float) -> str:
    """Return a float32 constant as LLVM writes it.

    Example:
        >>> hex_float(1.0)
        '0x3FF0000000000000'
    """
    rounded = struct.unpack("f", struct.pack("f", value))[0]
    return f"0x{struct.unpack('<Q', struct.pack('<d', rounded))[0]:016X}"


def _scores(v: Lanes, w: str, scale: str) -> str:
    """Return the bits of |w| times the scale as integers without sign."""
    scaled = v.op("fmul", "float", w, scale)
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


def _emit_write(name: str, p: int | None, width: int) -> str:
    """Return the function that writes effective weights; p = None keeps their values.

    Its arguments: latent weights, effective weights, their number, the largest pruned score as
    bits, tau, the scale of the scores.
    """
    body = []
    for lanes, tag in ((width, "v"), (1, "s")):
        v = Lanes(lanes, tag)
        limit, tau = v.spread("i32", "%limit"), v.spread("float", "%tau")
        scale = v.spread("float", "%scale")
        before, v.lines = v.lines, []
        source, target = (
            v.new(f"getelementptr float, ptr {base}, i64 %i{tag}") for base in ("%w", "%u")
        )
        w = v.load(source)
        kept = v.new(f"icmp sgt {v.type('i32')} {_scores(v, w, scale)}, {limit}")
        some = v.any(kept)
        v.lines.append(f"br i1 {some}, label %some{tag}, label %none{tag}")
        v.lines.append(f"none{tag}:")
        v.store("zeroinitializer", target)
        v.lines.append(f"br label %next{tag}")
        v.lines.append(f"some{tag}:")
        values = w if p is None else _power_values(v, w, tau, p)
        kind = v.type("float")
        u = v.new(f"select {v.type('i1')} {kept}, {kind} {values}, {kind} zeroinitializer")
        v.store(u, target)
        v.lines.append(f"br label %next{tag}")
        body.append(_loop(v, before, tag))
    arguments = "ptr noalias %w, ptr noalias %u, i64 %n, i32 %limit, float %tau, float %scale"
    return _function(f"void @{name}({arguments})", body, "ret void")


def _loop(v: Lanes, before: list[str], tag: str) -> str:
    """Return a loop over the weights from %from{tag} on, in steps of the width; ends at %done{tag}.

    The lines of the body must end with a branch to %next{tag}, in the block %body{tag}.
    """
    start = "0" if tag == "v" else "%iv"
    return "\n".join(
        [
            *before,
            f"%last{tag} = sub i64 %n, {v.width - 1}",
            f"br label %head{tag}",
            f"head{tag}:",
            f"%i{tag} = phi i64 [{start}, %{'entry' if tag == 'v' else 'donev'}],"
            f" [%step{tag}, %next{tag}]",
            f"%more{tag} = icmp slt i64 %i{tag}, %last{tag}",
            f"br i1 %more{tag}, label %body{tag}, label %done{tag}",
            f"body{tag}:",
            *v.lines,
            f"next{tag}:",
            f"%step{tag} = add i64 %i{tag}, {v.width}",
            f"br label %head{tag}",
            f"done{tag}:",
        ]
    )


def _function(signature: str, body: list[str], end: str) -> str:
    """Return a function of a signature, its loops and its last instruction."""
    return "\n".join([f"define {signature} {{", "entry:", *body, end, "}"])


def _emit_collect(width: int) -> str:
    """Return the function that counts the scores up to `low` and collects those below `high`.

    Its arguments: weights, their number, scale, low, high as bits, memory for collected scores,
    memory for their number. It returns the count.
    """
    body = []
    for lanes, tag in ((width, "v"), (1, "s")):
        v = Lanes(lanes, tag)
        low, high = v.spread("i32", "%low"), v.spread("i32", "%high")
        scale = v.spread("float", "%scale")
        before, v.lines = v.lines, []
        source = v.new(f"getelementptr float, ptr %w, i64 %i{tag}")
        bits = _scores(v, v.load(source), scale)
        above = v.new(f"icmp sgt {v.type('i32')} {bits}, {low}")
        below = v.new(f"icmp slt {v.type('i32')} {bits}, {high}")
        within = v.op("and", "i1", above, below)
        integer = f"i{lanes}"
        taken = v.new(f"bitcast {v.type('i1')} {above} to {integer}")
        wide = v.new(f"zext {integer} {taken} to i64")
        count = v.new(f"call i64 @llvm.ctpop.i64(i64 {wide})")
        total = v.new("load i64, ptr %above")
        v.lines.append(f"store i64 {v.new(f'add i64 {total}, {count}')}, ptr %above")
        mask = v.new(f"bitcast {v.type('i1')} {within} to {integer}")
        mask = v.new(f"zext {integer} {mask} to i64")
        v.store(bits, "%block", "i32")
        v.lines += [
            f"br label %each{tag}",
            f"each{tag}:",
            f"%mask{tag} = phi i64 [{mask}, %body{tag}], [%rest{tag}, %take{tag}]",
            f"%any{tag} = icmp ne i64 %mask{tag}, 0",
            f"br i1 %any{tag}, label %take{tag}, label %next{tag}",
            f"take{tag}:",
            f"%lane{tag} = call i64 @llvm.cttz.i64(i64 %mask{tag}, i1 true)",
            f"%less{tag} = sub i64 %mask{tag}, 1",
            f"%rest{tag} = and i64 %mask{tag}, %less{tag}",
            f"%from{tag} = getelementptr i32, ptr %block, i64 %lane{tag}",
            f"%one{tag} = load i32, ptr %from{tag}",
            f"%at{tag} = load i64, ptr %found",
            f"%to{tag} = getelementptr i32, ptr %near, i64 %at{tag}",
            f"store i32 %one{tag}, ptr %to{tag}",
            f"%plus{tag} = add i64 %at{tag}, 1",
            f"store i64 %plus{tag}, ptr %found",
            f"br label %each{tag}",
        ]
        if tag == "v":
            before = [
                f"%block = alloca {v.type('i32')}",
                "%above = alloca i64",
                "store i64 0, ptr %above",
                *before,
            ]
        body.append(_loop(v, before, tag))
    arguments = (
        "ptr noalias %w, i64 %n, float %scale, i32 %low, i32 %high, ptr noalias %near, "
        "ptr noalias %found"
    )
    end = "%all = load i64, ptr %above\n%upto = sub i64 %n, %all\nret i64 %upto"
    return _function(f"i64 @collect({arguments})", body, end)


def _emit_copy(width: int) -> str:
    """Return the function that copies weights; memcpy is slower on some virtual machines."""
    body = []
    for lanes, tag in ((width, "v"), (1, "s")):
        v = Lanes(lanes, tag)
        source, target = (
            v.new(f"getelementptr float, ptr {base}, i64 %i{tag}") for base in ("%w", "%u")
        )
        v.store(v.load(source), target)
        v.lines.append(f"br label %next{tag}")
        body.append(_loop(v, [], tag))
    return _function("void @copy(ptr noalias %w, ptr noalias %u, i64 %n)", body, "ret void")


def _emit_scan(width: int, columns: int) -> str:
    """Return the function that adds rows of 64-bit words to the columns of a checksum.

    Its arguments: weights, number of full rows, columns. It returns whether a weight is NaN
    or infinite.
    """
    words = width // 2
    full = columns // words * words
    body = []
    for lanes, tag, start in ((words, "v", 0), (1, "s", full)):
        v = Lanes(lanes, tag)
        source = v.new(f"getelementptr i64, ptr %row, i64 %i{tag}")
        sums = v.new(f"getelementptr i64, ptr %columns, i64 %i{tag}")
        row = v.load(source, "i64")
        v.store(v.op("add", "i64", v.load(sums, "i64"), row), sums, "i64")
        both = Lanes(2 * lanes, tag + "f")
        bits = both.new(f"bitcast {v.type('i64')} {row} to {both.type('i32')}")
        bits = both.op("and", "i32", bits, both.constant("i32", SIGNLESS))
        odd = both.new(f"icmp sge {both.type('i32')} {bits}, {both.constant('i32', INFINITY)}")
        some = both.any(odd)
        old = both.new("load i1, ptr %odd")
        both.lines.append(f"store i1 {both.new(f'or i1 {old}, {some}')}, ptr %odd")
        body += [
            f"br label %head{tag}",
            f"head{tag}:",
            f"%i{tag} = phi i64 [{start}, %{'body' if tag == 'v' else 'donev'}],"
            f" [%step{tag}, %next{tag}]",
            f"%more{tag} = icmp slt i64 %i{tag}, {full if tag == 'v' else columns}",
            f"br i1 %more{tag}, label %next{tag}, label %done{tag}",
            f"next{tag}:",
            *v.lines,
            *both.lines,
            f"%step{tag} = add i64 %i{tag}, {lanes}",
            f"br label %head{tag}",
            f"done{tag}:",
        ]
    rows = [
        "%odd = alloca i1",
        "store i1 false, ptr %odd",
        "br label %head",
        "head:",
        "%r = phi i64 [0, %entry], [%nextr, %dones]",
        "%more = icmp slt i64 %r, %rows",
        "br i1 %more, label %body, label %done",
        "body:",
        f"%word = mul i64 %r, {columns}",
        "%row = getelementptr i64, ptr %w, i64 %word",
        *body,
        "%nextr = add i64 %r, 1",
        "br label %head",
        "done:",
        "%result = load i1, ptr %odd",
        "%number = zext i1 %result to i32",
    ]
    signature = "i32 @scan(ptr noalias %w, i64 %rows, ptr noalias %columns)"
    return _function(signature, rows, "ret i32 %number")


def emit_module(width: int, columns: int) -> str:
    """Return the LLVM IR of all functions.

    Args:
        width: float32 numbers in a vector.
        columns: 64-bit words in a row of a checksum.

    Example:
        >>> text = emit_module(8, 509)
        >>> [line.split("(")[0] for line in text.splitlines() if line.startswith("define")][:2]
        ['define void @write_hard', 'define void @write_1']
    """
    kinds = {f"<{n} x float>" for n in (1, width)}
    declared = [
        *(f"declare {kind} @llvm.sqrt.v{kind[1:].split()[0]}f32({kind})" for kind in sorted(kinds)),
        "declare i64 @llvm.ctpop.i64(i64)",
        "declare i64 @llvm.cttz.i64(i64, i1)",
    ]
    writes = [_emit_write(f"write_{p or 'hard'}", p, width) for p in (None, 1, 2, 3)]
    others = [_emit_collect(width), _emit_copy(width), _emit_scan(width, columns)]
    return "\n".join([*declared, *writes, *others])
