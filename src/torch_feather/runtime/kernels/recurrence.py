"""LLVM IR of the kernels of recurrent layers (LSTM, GRU).

A work item is one direction of one layer: all its steps in time. The products of the inputs with
their weights were computed before, for all steps at once.

    h, c = initial states
    for t in range(steps):
        gates = input products of step t, or bias      # `at` is the place of a row
        for block in the samples:                      # one vector of samples
            for r in range(rows):
                for k in range(first[r], first[r + 1]):
                    gates[at[r]] += weights[k] * h[offsets[k]]
        h, c = cell(gates, h, c)
        out[t] = h
    final states = h, c

Values are stored as (unit, sample). The number of samples is rounded up to whole vectors, except
for a single sample, for which the vectors of the sums have one element. The sections of `gates`,
one per gate, begin at whole vectors. The cell computes whole sections.

The taps of each row are padded to a multiple of `UNROLL` with weights of 0 for a row of `h` that
stays 0. So `UNROLL` sums are computed concurrently.
"""

from __future__ import annotations

from collections.abc import Iterator

from .records import RECURRENCE, fields
from .text import FunctionText

CELLS = ("lstm", "gru")
UNROLL = 4  # sums that are computed concurrently
ONE = "declare <1 x float> @llvm.fmuladd.v1f32(<1 x float>, <1 x float>, <1 x float>)"
POINTERS = {
    *("g", "out", "taps", "first", "at", "bias", "gates", "c", "h", "sigmoid", "tanh"),
    *("h_initial", "c_initial", "h_final", "c_final"),
}


def recurrence_names() -> list[str]:
    """Return the names of the functions: of a single sample, and of vectors of samples.

    Example:
        >>> recurrence_names()
        ['lstm_one', 'lstm', 'gru_one', 'gru']
    """
    return [f"{cell}{suffix}" for cell in CELLS for suffix in ("_one", "")]


def emit_recurrence(name: str, width: int) -> Iterator[str]:
    """Yield the lines of the function `name(records, i0, i1)`.

    Args:
        name: one of `recurrence_names`.
        width: float32 values in a vector.

    Example:
        >>> next(emit_recurrence("lstm", 8))
        'define void @lstm(ptr %records, i64 %i0, i64 %i1) {'
    """
    code = FunctionText()
    with code.loop("%i", "%i0", "%i1"):
        code(f"%record.first = mul i64 %i, {RECURRENCE.itemsize}")
        code("%record = getelementptr i8, ptr %records, i64 %record.first")
        for field, offset in fields(RECURRENCE):
            code(f"%{field}.field = getelementptr i8, ptr %record, i64 {offset}")
            kind = "ptr" if field in POINTERS else "i64"
            code(f"%{field} = load {kind}, ptr %{field}.field")
        states = ("h", "c") if name.startswith("lstm") else ("h",)
        _states(code, states, "initial")
        with code.loop("%t", "0", "%steps"):
            code("%now = mul i64 %t, %time")
            _gather(code)
            _multiply(code, 1 if name.endswith("_one") else width)
            (_lstm if name.startswith("lstm") else _gru)(code, width)
            _scatter(code)
        _states(code, states, "final")
    yield f"define void @{name}(ptr %records, i64 %i0, i64 %i1) {{"
    yield "entry:"
    yield from code.lines
    yield "  ret void"
    yield "}"


def _element(code: FunctionText, name: str, base: str, *terms: str) -> None:
    """Compute the address of an element whose index is a sum."""
    code(f"%{name}.0 = add i64 {terms[0]}, 0")
    for k, term in enumerate(terms[1:]):
        code(f"%{name}.{k + 1} = add i64 %{name}.{k}, {term}")
    code(f"%{name} = getelementptr float, ptr {base}, i64 %{name}.{len(terms) - 1}")


def _states(code: FunctionText, states: tuple[str, ...], kind: str) -> None:
    """Copy the initial states into h and c, or these into the final states."""
    for s in states:
        name = f"{s}.{kind}"
        with code.loop(f"%{name}.u", "0", "%units"):
            code(f"%{name}.own.row = mul i64 %{name}.u, %lanes")
            code(f"%{name}.row = mul i64 %{name}.u, %{s}_{kind}_unit")
            with code.loop(f"%{name}.n", "0", "%samples"):
                code(f"%{name}.sample = mul i64 %{name}.n, %{s}_{kind}_sample")
                _element(code, f"{name}.own", f"%{s}", f"%{name}.own.row", f"%{name}.n")
                other = f"{name}.other"
                _element(code, other, f"%{s}_{kind}", f"%{name}.row", f"%{name}.sample")
                source, to = (other, f"{name}.own")
                if kind == "final":
                    source, to = to, source
                code(f"%{name}.value = load float, ptr %{source}")
                code(f"store float %{name}.value, ptr %{to}")


def _gather(code: FunctionText) -> None:
    """Copy the input products of a step, and the bias of the rows that have none, to the gates."""
    for name, start, stop in (("x", "0", "%g_rows"), ("b", "%g_rows", "%rows")):
        with code.loop(f"%{name}.r", start, stop):
            code(f"%{name}.at.field = getelementptr i32, ptr %at, i64 %{name}.r")
            code(f"%{name}.at.short = load i32, ptr %{name}.at.field")
            code(f"%{name}.at = zext i32 %{name}.at.short to i64")
            code(f"%{name}.row = getelementptr float, ptr %gates, i64 %{name}.at")
            if name == "x":
                code("%x.plane = mul i64 %x.r, %g_plane")
                _element(code, "x.source", "%g", "%x.plane", "%now")
            else:
                code("%b.place = sub i64 %b.r, %g_rows")
                code("%b.source = getelementptr float, ptr %bias, i64 %b.place")
                code("%b.value = load float, ptr %b.source")
            with code.loop(f"%{name}.n", "0", "%samples"):
                if name == "x":
                    code("%x.pixel = mul i64 %x.n, %sample")
                    code("%x.from = getelementptr float, ptr %x.source, i64 %x.pixel")
                    code("%x.value = load float, ptr %x.from")
                code(f"%{name}.to = getelementptr float, ptr %{name}.row, i64 %{name}.n")
                code(f"store float %{name}.value, ptr %{name}.to")


def _multiply(code: FunctionText, width: int) -> None:
    """Add the products of the weights and h to the gates."""
    v = f"<{width} x float>"
    code(f"%blocks = udiv i64 %lanes, {width}")
    with code.loop("%block", "0", "%blocks"):
        code(f"%lane = mul i64 %block, {width}")
        code("%h.block = getelementptr float, ptr %h, i64 %lane")
        code("%gates.block = getelementptr float, ptr %gates, i64 %lane")
        with code.loop("%r", "0", "%rows"):
            code("%first.at = getelementptr i32, ptr %first, i64 %r")
            code("%first.after = getelementptr i32, ptr %first.at, i64 1")
            for name, at in (("k0", "first.at"), ("k1", "first.after")):
                code(f"%{name}.short = load i32, ptr %{at}")
                code(f"%{name} = zext i32 %{name}.short to i64")
            code("%row.at = getelementptr i32, ptr %at, i64 %r")
            code("%row.short = load i32, ptr %row.at")
            code("%row.place = zext i32 %row.short to i64")
            code("%row = getelementptr float, ptr %gates.block, i64 %row.place")
            code(f"%before = load {v}, ptr %row, align 4")
            _sum_taps(code, v, width)
            code(f"store {v} %total, ptr %row, align 4")


def _sum_taps(code: FunctionText, v: str, width: int) -> None:
    """Compute %total: %before and the products of the taps from %k0 to %k1."""
    code("br label %taps.test")
    code.label("taps.test")
    code("%some = icmp ult i64 %k0, %k1")
    code("br i1 %some, label %tap, label %taps.done")
    code.label("tap")
    code("%k = phi i64 [ %k0, %taps.test ], [ %k.next, %tap ]")
    for j in range(UNROLL):
        start = "%before" if j == 0 else "zeroinitializer"
        code(f"%sum.{j} = phi {v} [ {start}, %taps.test ], [ %new.{j}, %tap ]")
    code("%tap.first = mul i64 %k, 2")
    code("%tap.at = getelementptr i32, ptr %taps, i64 %tap.first")
    for j in range(UNROLL):
        code(f"%offset.at.{j} = getelementptr i32, ptr %tap.at, i64 {2 * j}")
        code(f"%offset.short.{j} = load i32, ptr %offset.at.{j}")
        code(f"%offset.{j} = zext i32 %offset.short.{j} to i64")
        code(f"%weight.at.{j} = getelementptr i32, ptr %tap.at, i64 {2 * j + 1}")
        code(f"%weight.one.{j} = load float, ptr %weight.at.{j}")
        code(f"%weight.0.{j} = insertelement {v} poison, float %weight.one.{j}, i32 0")
        code(
            f"%weight.{j} = shufflevector {v} %weight.0.{j}, {v} poison, "
            f"<{width} x i32> zeroinitializer"
        )
        code(f"%h.at.{j} = getelementptr float, ptr %h.block, i64 %offset.{j}")
        code(f"%h.{j} = load {v}, ptr %h.at.{j}, align 4")
        code(
            f"%new.{j} = call {v} @llvm.fmuladd.v{width}f32({v} %weight.{j}, {v} %h.{j}, "
            f"{v} %sum.{j})"
        )
    code(f"%k.next = add i64 %k, {UNROLL}")
    code("%k.more = icmp ult i64 %k.next, %k1")
    code("br i1 %k.more, label %tap, label %taps.sum")
    code.label("taps.sum")
    code(f"%pair.0 = fadd {v} %new.0, %new.1")
    code(f"%pair.1 = fadd {v} %new.2, %new.3")
    code(f"%pairs = fadd {v} %pair.0, %pair.1")
    code("br label %taps.done")
    code.label("taps.done")
    code(f"%total = phi {v} [ %before, %taps.test ], [ %pairs, %taps.sum ]")


class _Sections:
    """Appends operations on whole sections of the gates, and on h and c.

    Args:
        code: the function.
        width: float32 values in a vector.
    """

    def __init__(self, code: FunctionText, width: int) -> None:
        self.code, self.width, self.v = code, width, f"<{width} x float>"
        for q in range(4):
            code(f"%gate.{q}.first = mul i64 %section, {q}")
            code(f"%gate.{q} = getelementptr float, ptr %gates, i64 %gate.{q}.first")
        code(f"%vectors = udiv i64 %section, {width}")
        code("%vectors.2 = mul i64 %vectors, 2")

    def apply(self, function: str, x: str, out: str, count: str = "%vectors") -> None:
        """Apply an activation function to a section."""
        self.code(f"call void %{function}(ptr %{x}, ptr %{out}, ptr null, i64 {count})")

    def load(self, loop: str, **bases: str) -> dict[str, str]:
        """Load vector `loop` of some sections; return the names of the values and addresses."""
        found = {}
        for name, base in bases.items():
            value = f"{loop}.{name}"
            self.code(f"{value}.at = getelementptr {self.v}, ptr %{base}, i64 {loop}")
            self.code(f"{value} = load {self.v}, ptr {value}.at, align 4")
            found[name] = value
        return found

    def fma(self, result: str, a: str, b: str, c: str) -> str:
        """Compute a · b + c."""
        arguments = ", ".join(f"{self.v} {x}" for x in (a, b, c))
        self.code(f"{result} = call {self.v} @llvm.fmuladd.v{self.width}f32({arguments})")
        return result

    def store(self, value: str, at: str) -> None:
        self.code(f"store {self.v} {value}, ptr {at}, align 4")


def _lstm(code: FunctionText, width: int) -> None:
    """Gates i, f, g, o: c = f · c + i · g, h = o · tanh(c)."""
    sections = _Sections(code, width)
    sections.apply("sigmoid", "gate.0", "gate.0", "%vectors.2")
    sections.apply("tanh", "gate.2", "gate.2")
    sections.apply("sigmoid", "gate.3", "gate.3")
    with code.loop("%j", "0", "%vectors"):
        x = sections.load("%j", i="gate.0", f="gate.1", g="gate.2", c="c")
        code(f"%j.new = fmul {sections.v} {x['i']}, {x['g']}")
        sections.store(sections.fma("%j.sum", x["f"], x["c"], "%j.new"), "%j.c.at")
    sections.apply("tanh", "c", "gate.0")
    with code.loop("%l", "0", "%vectors"):
        x = sections.load("%l", y="gate.0", o="gate.3", h="h")
        code(f"%l.new = fmul {sections.v} {x['y']}, {x['o']}")
        sections.store("%l.new", "%l.h.at")


def _gru(code: FunctionText, width: int) -> None:
    """Gates r, z and both parts of n: n = tanh(x + r · y), h = n + z · (h - n)."""
    sections = _Sections(code, width)
    sections.apply("sigmoid", "gate.0", "gate.0", "%vectors.2")
    with code.loop("%j", "0", "%vectors"):
        x = sections.load("%j", r="gate.0", x="gate.2", y="gate.3")
        sections.store(sections.fma("%j.sum", x["r"], x["y"], x["x"]), "%j.x.at")
    sections.apply("tanh", "gate.2", "gate.2")
    with code.loop("%l", "0", "%vectors"):
        x = sections.load("%l", z="gate.1", n="gate.2", h="h")
        code(f"%l.rest = fsub {sections.v} {x['h']}, {x['n']}")
        sections.store(sections.fma("%l.new", x["z"], "%l.rest", x["n"]), "%l.h.at")


def _scatter(code: FunctionText) -> None:
    """Copy h to the result of a step."""
    with code.loop("%o.u", "0", "%units"):
        code("%o.plane = mul i64 %o.u, %out_plane")
        code("%o.row = mul i64 %o.u, %lanes")
        with code.loop("%o.n", "0", "%samples"):
            code("%o.pixel = mul i64 %o.n, %sample")
            _element(code, "o.from", "%h", "%o.row", "%o.n")
            _element(code, "o.to", "%out", "%o.plane", "%o.pixel", "%now")
            code("%o.value = load float, ptr %o.from")
            code("store float %o.value, ptr %o.to")
