"""Vectors and loops in LLVM IR, for `kernels.py`."""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import dataclass, field

AHEAD = 2048
"""Bytes from a load to its prefetch."""


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
        return self.new(f"call {vector} @pack.{kind}({vector} {value}, {bits} {mask})")

    def unpack(self, pointer: str, mask: str) -> str:
        """Load consecutive numbers into the lanes of a mask; the others are 0.

        As many numbers as a vector has may be read.
        """
        vector, bits = self.type("float"), self.type("i1")
        return self.new(f"call {vector} @unpack.float(ptr {pointer}, {bits} {mask})")

    def count(self, mask: str) -> str:
        """Return the number of lanes of a mask, an i64."""
        bits = self.new(f"bitcast {self.type('i1')} {mask} to i{self.width}")
        wide = self.new(f"zext i{self.width} {bits} to i64")
        return self.new(f"call i64 @llvm.ctpop.i64(i64 {wide})")

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


Body = Callable[[Lanes, str], None]
"""Appends the work on one vector, given the index of its first number."""


def loop(width: int, tag: str, count: str, body: Body) -> str:
    """Return a loop over vectors of `count` numbers, the last of them masked.

    Args:
        width: numbers in a vector.
        tag: distinguishes the labels of a function's loops.
        count: name of an i64.
        body: may end in another block than it began.

    Example:
        >>> text = loop(8, "a", "%n", lambda v, i: v.do(f"call void @visit(i64 {i})"))
        >>> text.count("@visit")  # for whole vectors, and for the rest
        2
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


def function(signature: str, *body: str, end: str = "ret void") -> str:
    """Return a function of a signature, its instructions and its last instruction.

    Example:
        >>> function("void @nothing()").splitlines()
        ['define void @nothing() {', 'entry:', 'ret void', '}']
    """
    return "\n".join([f"define {signature} {{", "entry:", *body, end, "}"])


def emit_moves(width: int, tables: bool) -> list[str]:
    """Return the functions of `Lanes.pack` and `Lanes.unpack`.

    Args:
        width: numbers in a vector.
        tables: use AVX2, which has no instruction for this, but one that moves eight lanes by an
            index for each; a table holds these for every mask.

    Example:
        >>> [line.split("(")[0] for line in emit_moves(8, tables=True)[-1].splitlines()[:1]]
        ['define internal <8 x float> @unpack.float']
    """
    return _moves_by_tables() if tables else _moves_by_intrinsics(width)


def _move(name: str, kind: str, width: int, source: str, *body: str) -> str:
    """Return one of the functions, whose result is `%r`."""
    vector = f"<{width} x {kind}>"
    signature = f"internal {vector} @{name}.{kind}({source}, <{width} x i1> %mask) alwaysinline"
    return function(signature, *body, end=f"ret {vector} %r")


def _moves_by_intrinsics(width: int) -> list[str]:
    found, bits = [], f"<{width} x i1> %mask"
    for kind, short in (("float", "f32"), ("i32", "i32")):
        vector = f"<{width} x {kind}>"
        compress = f"@llvm.experimental.vector.compress.v{width}{short}"
        arguments = f"({vector} %v, {bits}, {vector} zeroinitializer)"
        body = f"%r = call {vector} {compress}{arguments}"
        found.append(_move("pack", kind, width, f"{vector} %v", body))
    vector = f"<{width} x float>"
    expand = f"@llvm.masked.expandload.v{width}f32(ptr %p, {bits}, {vector} zeroinitializer)"
    return [*found, _move("unpack", "float", width, "ptr %p", f"%r = call {vector} {expand}")]


def _moves_by_tables() -> list[str]:
    floats, integers = "<8 x float>", "<8 x i32>"
    permute = f"call {floats} @llvm.x86.avx2.permps({floats} %v, {integers} %lanes)"

    def lanes(table: str) -> str:
        return f"""%bits = bitcast <8 x i1> %mask to i8
%row = zext i8 %bits to i64
%at = getelementptr [8 x i8], ptr @{table}, i64 %row
%bytes = load <8 x i8>, ptr %at, align 8
%lanes = zext <8 x i8> %bytes to {integers}"""

    return [
        f"declare {floats} @llvm.x86.avx2.permps({floats}, {integers})",
        _table("front", _to_front),
        _table("back", _to_back),
        _move("pack", "float", 8, f"{floats} %v", lanes("front"), f"%r = {permute}"),
        _move(
            *("pack", "i32", 8, f"{integers} %v"),
            f"%a = bitcast {integers} %v to {floats}",
            f"%b = call {floats} @pack.float({floats} %a, <8 x i1> %mask)",
            f"%r = bitcast {floats} %b to {integers}",
        ),
        _move(
            *("unpack", "float", 8, "ptr %p"),
            f"%v = load {floats}, ptr %p, align 4",
            lanes("back"),
            f"%moved = {permute}",
            f"%r = select <8 x i1> %mask, {floats} %moved, {floats} zeroinitializer",
        ),
    ]


def _to_front(mask: int) -> list[int]:
    """Return from which lane each lane comes: those of the mask first."""
    return sorted(range(8), key=lambda lane: not mask >> lane & 1)


def _to_back(mask: int) -> list[int]:
    """Return from which lane each lane of the mask comes, if these lanes are the first ones."""
    return [(mask & (1 << lane) - 1).bit_count() for lane in range(8)]


def _table(name: str, index: Callable[[int], list[int]]) -> str:
    """Return a constant with eight bytes for each mask of eight lanes."""
    values = ", ".join(f"i8 {lane}" for mask in range(256) for lane in index(mask))
    return f"@{name} = internal constant [2048 x i8] [{values}], align 64"


def declarations(width: int) -> list[str]:
    """Return the declarations of intrinsics on vectors of float32 numbers and of 64-bit words.

    Example:
        >>> "declare i64 @llvm.ctpop.i64(i64)" in declarations(8)
        True
    """
    found = []
    kinds = (("float", "f32", width), ("i32", "i32", width), ("i64", "i64", width // 2))
    for kind, short, n in kinds:
        vector, bits, suffix = f"<{n} x {kind}>", f"<{n} x i1>", f"v{n}{short}"
        compress = f"@llvm.experimental.vector.compress.{suffix}"
        found += [
            f"declare {vector} @llvm.masked.load.{suffix}.p0(ptr, {bits}, {vector})",
            f"declare void @llvm.masked.store.{suffix}.p0({vector}, ptr, {bits})",
            f"declare {vector} {compress}({vector}, {bits}, {vector})",
        ]
    vector, bits = f"<{width} x float>", f"<{width} x i1>"
    ints = f"<{width} x i32>"
    return [
        *found,
        f"declare {vector} @llvm.masked.expandload.v{width}f32(ptr, {bits}, {vector})",
        f"declare {vector} @llvm.sqrt.v{width}f32({vector})",
        f"declare {ints} @llvm.smax.v{width}i32({ints}, {ints})",
        f"declare i32 @llvm.vector.reduce.smax.v{width}i32({ints})",
        f"declare i64 @llvm.vector.reduce.add.v{width // 2}i64(<{width // 2} x i64>)",
        "declare i64 @llvm.ctpop.i64(i64)",
        "declare i64 @llvm.smin.i64(i64, i64)",
        "declare i32 @llvm.smax.i32(i32, i32)",
        "declare void @llvm.memset.p0.i64(ptr, i8, i64, i1)",
        "declare void @llvm.prefetch.p0(ptr, i32, i32, i32)",
    ]
