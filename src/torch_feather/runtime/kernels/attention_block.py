"""LLVM IR of one work item of the attention kernel, see `attention`."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator

from .activations import AVX512, VectorCode
from .records import ATTENTION, fields
from .text import FunctionText, VectorText

KEYS = 128  # keys in a block; the scores of a block stay in the nearest cache
POINTERS = ("q", "k", "v", "out", "mask", "scratch")
FIELD_TYPES = {**dict.fromkeys(POINTERS, "ptr"), "scale": "float"}


def load_record(code: FunctionText, given: Collection[str] = ()) -> None:
    """Append the loads of the fields of the record, except for those that are given.

    Example:
        >>> code = FunctionText()
        >>> load_record(code)
        >>> code.lines[1]
        '  %q = load ptr, ptr %q.field'
    """
    for field, offset in fields(ATTENTION):
        if field in given:
            continue
        code(f"%{field}.field = getelementptr i8, ptr %record, i64 {offset}")
        code(f"%{field} = load {FIELD_TYPES.get(field, 'i64')}, ptr %{field}.field")


class Block:
    """Writes the function `attention_{vectors}`, which computes one item.

    Args:
        width: float32 values in a vector.
        vectors: vectors of queries.

    Example:
        >>> next(Block(8, 1).emit())[:40]
        'define internal void @attention_1(ptr no'
    """

    def __init__(self, width: int, vectors: int) -> None:
        self.width, self.vectors, self.size = width, vectors, width * vectors
        # Sums of a tile, of which there are rows · vectors, stay in registers.
        self.rows = 8 if width == AVX512 else 4
        self.code, self.math = VectorText(width), VectorCode(width)
        self.v, self.iv, self.bv = self.math.floats, self.math.ints, f"<{width} x i1>"

    def emit(self) -> Iterator[str]:
        """Yield the lines of the function."""
        self._prepare()
        code = self.code
        with code.loop("%b", "0", "%key.blocks"):
            code(f"%b.first = mul i64 %b, {KEYS}")
            code(f"%b.full = add i64 %b.first, {KEYS}")
            code("%b.over = icmp sgt i64 %b.full, %last.key")
            code("%b.end = select i1 %b.over, i64 %last.key, i64 %b.full")
            code("%count = sub i64 %b.end, %b.first")
            self._scores()
            self._add_mask()
            self._hide_later_keys()
            self._raise_maximum()
            self._exponentiate()
            self._add_values()
        self._store()
        pointers = ", ".join(f"ptr noalias %{name}" for name in ("record", *POINTERS))
        yield f"define internal void @attention_{self.vectors}({pointers}, i64 %first) {{"
        yield "entry:"
        for u in range(self.vectors):
            for name in ("high", "safe", "total", "factor"):
                yield f"  %{name}.{u} = alloca {self.v}, align 64"
            for r in range(self.rows):
                yield f"  %sum.{r}.{u} = alloca {self.v}, align 64"
        yield from code.lines
        yield "  ret void"
        yield "}"

    def _flush(self) -> None:
        self.code.lines += self.math.lines
        self.math.lines.clear()

    def _vectors_at(self, name: str, base: str, row: str) -> list[str]:
        """Return the addresses of the vectors of a row of scratch memory."""
        code = self.code
        code(f"%{name}.row = mul i64 {row}, {self.size}")
        start = code.at(f"{name}.start", base, f"%{name}.row")
        return [code.at(f"{name}.{u}", start, u * self.width) for u in range(self.vectors)]

    def _queries(self, name: str) -> list[str]:
        """Return the numbers of the queries of each vector, as int32."""
        code = self.code
        code(f"%{name}.short = trunc i64 %first to i32")
        first = code.splat(name, f"%{name}.short", "i32")
        found = []
        for u in range(self.vectors):
            lanes = ", ".join(f"i32 {u * self.width + k}" for k in range(self.width))
            code(f"%{name}.{u} = add {self.iv} {first}, <{lanes}>")
            found.append(f"%{name}.{u}")
        return found

    def _prepare(self) -> None:
        """Pack the scaled queries, and set the sums to 0."""
        code = self.code
        load_record(code, given=POINTERS)
        code.at("scores", "%scratch", 0)
        code.at("packed", "%scratch", KEYS * self.size)
        code(f"%packed.size = mul i64 %depth, {self.size}")
        code.at("results", "%packed", "%packed.size")
        scale = code.splat("scale.all", "%scale")
        with code.loop("%d", "0", "%depth"):
            code("%d.plane = mul i64 %d, %q_plane")
            source = code.at("d.q", "%q", "%d.plane")
            for u, to in enumerate(self._vectors_at("d.to", "%packed", "%d")):
                x = code.load(f"d.x.{u}", code.at(f"d.q.{u}", source, u * self.width))
                code(f"%d.scaled.{u} = fmul {self.v} {x}, {scale}")
                code.store(f"%d.scaled.{u}", to)
        with code.loop("%z", "0", "%v_depth"):
            for to in self._vectors_at("z.to", "%results", "%z"):
                code.store("zeroinitializer", to)
        for u in range(self.vectors):
            code.store(self.math.constant(-math.inf), f"%high.{u}")
            code.store("zeroinitializer", f"%total.{u}")
        code(f"%seen = add i64 %first, {self.size}")
        code("%is.causal = icmp ne i64 %causal, 0")
        code("%is.part = icmp slt i64 %seen, %keys")
        code("%is.shorter = and i1 %is.causal, %is.part")
        code("%last.key = select i1 %is.shorter, i64 %seen, i64 %keys")
        code(f"%last.up = add i64 %last.key, {KEYS - 1}")
        code(f"%key.blocks = udiv i64 %last.up, {KEYS}")

    def _tile(
        self, name: str, rows: int, count: str, wide: str, narrow: str,
        strides: tuple[str, str], to: str, adds: bool,
    ) -> None:  # fmt: skip
        """Multiply matrices: to[r] = sum of narrow[r, e] · wide[e] over e.

        Args:
            name: prefix of all names.
            rows: number of results, each of several vectors.
            count: number of terms.
            wide: vectors of the terms, in scratch memory.
            narrow: numbers by which they are multiplied.
            strides: of `narrow`, between terms and between results.
            to: results, in scratch memory.
            adds: whether the results are multiplied by %factor and added.
        """
        code, v = self.code, self.v
        cells = [(r, u) for r in range(rows) for u in range(self.vectors)]
        for r, u in cells:
            at = code.at(f"{name}.to.{r}.{u}", to, r * self.size + u * self.width)
            begin = "zeroinitializer"
            if adds:
                before = code.load(f"{name}.before.{r}.{u}", at)
                factor = code.load(f"{name}.factor.{r}.{u}", f"%factor.{u}")
                code(f"%{name}.begin.{r}.{u} = fmul {v} {before}, {factor}")
                begin = f"%{name}.begin.{r}.{u}"
            code.store(begin, f"%sum.{r}.{u}")
        for r in range(rows):
            code(f"%{name}.place.{r} = mul i64 {strides[1]}, {r}")
            code.at(f"{name}.narrow.{r}", narrow, f"%{name}.place.{r}")
        with code.loop(f"%{name}.e", "0", count):
            xs = [
                code.load(f"{name}.x.{u}", at)
                for u, at in enumerate(self._vectors_at(f"{name}.wide", wide, f"%{name}.e"))
            ]
            code(f"%{name}.e.place = mul i64 %{name}.e, {strides[0]}")
            for r in range(rows):
                at = code.at(f"{name}.at.{r}", f"%{name}.narrow.{r}", f"%{name}.e.place")
                code(f"%{name}.number.{r} = load float, ptr {at}")
                factor = code.splat(f"{name}.all.{r}", f"%{name}.number.{r}")
                for u in range(self.vectors):
                    before = code.load(f"{name}.sum.{r}.{u}", f"%sum.{r}.{u}")
                    call = f"call {v} @llvm.fmuladd.v{self.width}f32"
                    code(f"%{name}.new.{r}.{u} = {call}({v} {factor}, {v} {xs[u]}, {v} {before})")
                    code.store(f"%{name}.new.{r}.{u}", f"%sum.{r}.{u}")
        for r, u in cells:
            code.store(code.load(f"{name}.y.{r}.{u}", f"%sum.{r}.{u}"), f"%{name}.to.{r}.{u}")

    def _scores(self) -> None:
        """Compute the scores of the keys, in whole tiles: what is behind the block is not used."""
        code = self.code
        block = code.at("k.block", "%k", "%b.first")
        code(f"%count.up = add i64 %count, {self.rows - 1}")
        code(f"%tiles = udiv i64 %count.up, {self.rows}")
        with code.loop("%t", "0", "%tiles"):
            code(f"%t.key = mul i64 %t, {self.rows}")
            k = code.at("t.k", block, "%t.key")
            code(f"%t.place = mul i64 %t.key, {self.size}")
            to = code.at("t.to", "%scores", "%t.place")
            strides = "%k_plane", "1"
            self._tile("score", self.rows, "%depth", "%packed", k, strides, to, adds=False)

    def _add_mask(self) -> None:
        code = self.code
        code("%is.whole = icmp eq ptr %mask, null")
        code("%mask.count = select i1 %is.whole, i64 0, i64 %count")
        with code.loop("%m", "0", "%mask.count"):
            code("%m.key = add i64 %b.first, %m")
            code("%m.place = mul i64 %m.key, %mask_key")
            mask = code.at("m.mask", "%mask", "%m.place")
            for u, at in enumerate(self._vectors_at("m.to", "%scores", "%m")):
                score = code.load(f"m.x.{u}", at)
                added = code.load(f"m.y.{u}", code.at(f"m.mask.{u}", mask, u * self.width))
                code(f"%m.sum.{u} = fadd {self.v} {score}, {added}")
                code.store(f"%m.sum.{u}", at)

    def _hide_later_keys(self) -> None:
        """Set the scores of keys after their query to -inf, if attention is causal."""
        code = self.code
        code("%later.key = add i64 %first, 1")
        code("%later.from = sub i64 %later.key, %b.first")
        code("%later.none = icmp slt i64 %later.from, 0")
        code("%later.some = select i1 %later.none, i64 0, i64 %later.from")
        code("%later = select i1 %is.causal, i64 %later.some, i64 %count")
        queries = self._queries("later.query")
        with code.loop("%c", "%later", "%count"):
            code("%c.key = add i64 %b.first, %c")
            code("%c.short = trunc i64 %c.key to i32")
            key = code.splat("c.all", "%c.short", "i32")
            for u, at in enumerate(self._vectors_at("c.to", "%scores", "%c")):
                score = code.load(f"c.x.{u}", at)
                code(f"%c.is.{u} = icmp sgt {self.iv} {key}, {queries[u]}")
                lowest = f"{self.v} {self.math.constant(-math.inf)}"
                code(f"%c.y.{u} = select {self.bv} %c.is.{u}, {lowest}, {self.v} {score}")
                code.store(f"%c.y.{u}", at)

    def _raise_maximum(self) -> None:
        """Find the largest score so far, and the factor of the sums so far."""
        code, v, lowest = self.code, self.v, self.math.constant(-math.inf)
        zero = f"{v} zeroinitializer"
        for u in range(self.vectors):
            code.store(code.load(f"high.before.{u}", f"%high.{u}"), f"%safe.{u}")
        with code.loop("%h", "0", "%count"):
            for u, at in enumerate(self._vectors_at("h.at", "%scores", "%h")):
                score, high = code.load(f"h.x.{u}", at), code.load(f"h.y.{u}", f"%safe.{u}")
                code(f"%h.is.{u} = fcmp ogt {v} {score}, {high}")
                code(f"%h.z.{u} = select {self.bv} %h.is.{u}, {v} {score}, {v} {high}")
                code.store(f"%h.z.{u}", f"%safe.{u}")
        for u in range(self.vectors):
            high = code.load(f"high.after.{u}", f"%safe.{u}")
            code.store(high, f"%high.{u}")
            code(f"%high.none.{u} = fcmp oeq {v} {high}, {lowest}")  # all keys are masked
            code(f"%high.safe.{u} = select {self.bv} %high.none.{u}, {zero}, {v} {high}")
            code.store(f"%high.safe.{u}", f"%safe.{u}")
            less = self.math.op("fsub", f"%high.before.{u}", f"%high.safe.{u}")
            factor = self.math.exp_of_negative(less)
            self._flush()
            code.store(factor, f"%factor.{u}")
            total = code.load(f"total.before.{u}", f"%total.{u}")
            code(f"%total.scaled.{u} = fmul {v} {total}, {factor}")
            code.store(f"%total.scaled.{u}", f"%total.{u}")

    def _exponentiate(self) -> None:
        code = self.code
        with code.loop("%p", "0", "%count"):
            for u, at in enumerate(self._vectors_at("p.at", "%scores", "%p")):
                score, high = code.load(f"p.x.{u}", at), code.load(f"p.y.{u}", f"%safe.{u}")
                power = self.math.exp_of_negative(self.math.op("fsub", score, high))
                self._flush()
                code.store(power, at)
                total = code.load(f"p.total.{u}", f"%total.{u}")
                code(f"%p.sum.{u} = fadd {self.v} {total}, {power}")
                code.store(f"%p.sum.{u}", f"%total.{u}")

    def _add_values(self) -> None:
        code, strides = self.code, ("1", "%v_plane")
        block = code.at("v.block", "%v", "%b.first")
        code(f"%v.tiles = udiv i64 %v_depth, {self.rows}")
        code(f"%v.tiled = mul i64 %v.tiles, {self.rows}")
        with code.loop("%s", "0", "%v.tiles"):
            code(f"%s.channel = mul i64 %s, {self.rows}")
            code("%s.plane = mul i64 %s.channel, %v_plane")
            v = code.at("s.v", block, "%s.plane")
            code(f"%s.place = mul i64 %s.channel, {self.size}")
            to = code.at("s.to", "%results", "%s.place")
            self._tile("tile", self.rows, "%count", "%scores", v, strides, to, adds=True)
        with code.loop("%r", "%v.tiled", "%v_depth"):
            code("%r.plane = mul i64 %r, %v_plane")
            v = code.at("r.v", block, "%r.plane")
            code(f"%r.place = mul i64 %r, {self.size}")
            to = code.at("r.to", "%results", "%r.place")
            self._tile("rest", 1, "%count", "%scores", v, strides, to, adds=True)

    def _store(self) -> None:
        """Divide by the sums, and write those queries that are within the sequence."""
        code, v, bv = self.code, self.v, self.bv
        code("%queries.short = trunc i64 %queries to i32")
        count = code.splat("queries.all", "%queries.short", "i32")
        one, zero = self.math.constant(1.0), f"{v} zeroinitializer"
        for u, query in enumerate(self._queries("store.query")):
            total = code.load(f"end.total.{u}", f"%total.{u}")
            code(f"%end.none.{u} = fcmp oeq {v} {total}, zeroinitializer")
            code(f"%end.part.{u} = fdiv {v} {one}, {total}")
            code(f"%end.factor.{u} = select {bv} %end.none.{u}, {zero}, {v} %end.part.{u}")
            code(f"%end.is.{u} = icmp slt {self.iv} {query}, {count}")
        with code.loop("%o", "0", "%v_depth"):
            code("%o.plane = mul i64 %o, %out_plane")
            out = code.at("o.out", "%out", "%o.plane")
            for u, at in enumerate(self._vectors_at("o.at", "%results", "%o")):
                result = code.load(f"o.x.{u}", at)
                code(f"%o.y.{u} = fmul {v} {result}, %end.factor.{u}")
                to = code.at(f"o.to.{u}", out, u * self.width)
                store = f"call void @llvm.masked.store.v{self.width}f32.p0"
                code(f"{store}({v} %o.y.{u}, ptr {to}, i32 4, {bv} %end.is.{u})")
