"""Products of matrices in LLVM IR: tiles of the result stay in registers.

LLVM computes the loop nest of a product one number of the result at a time. A tile of four rows
reads each vector of the second matrix once for four rows.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

from ..runtime.kernels import VectorText
from ..runtime.kernels.activations import number
from .expressions import Expr
from .program import Nest

ROWS, VECTORS = 4, 2  # of a tile
# Operations on vectors that may follow the sum.
FOLLOWING = {"add": "fadd contract", "sub": "fsub contract", "mul": "fmul contract", "div": "fdiv"}
BOUNDS = {"max": "maximum", "min": "minimum"}


@dataclass(frozen=True)
class Product:
    """A loop nest that computes sums of products, with adjacent columns of the result.

    Attributes:
        nest: the loops; the last index is the column.
        rows: operand that is the same for all columns.
        columns: operand whose columns are adjacent.
        row: index of the rows, for which `columns` is the same; None if there is none.

    Example:
        >>> from .expressions import operand, total
        >>> strides = ((3, 0, 1), (0, 1, 8))
        >>> nest = Nest((4, 8), (3,), total(operand(0) * operand(1)), (8, 1), strides)
        >>> Product.of(nest).row
        0
    """

    nest: Nest
    rows: int
    columns: int
    row: int | None

    @classmethod
    def of(cls, nest: Nest) -> Product | None:
        """Return a nest as a product; None if it is none."""
        sums = [e for e in nest.expression.walk() if e.op.startswith("fold_")]
        if len(sums) != 1 or not nest.sizes or nest.out[-1] != 1:
            return None
        last = len(nest.sizes) - 1
        (term,) = sums[0].args
        if sums[0].op != "fold_add" or term.op != "mul":
            return None
        if any(e.op != "operand" for e in term.args):
            return None
        for rows, columns in itertools.permutations(int(e.value) for e in term.args):
            if (nest.operands[rows][last], nest.operands[columns][last]) == (0, 1):
                break
        else:
            return None
        if not all(_can_follow(e, nest, last) for e in _outside(nest.expression)):
            return None
        same = [d for d in range(last) if not nest.operands[columns][d]]
        return cls(nest, rows, columns, max(same, key=lambda d: nest.sizes[d], default=None))


def _outside(e: Expr) -> Iterator[Expr]:
    """Yield what is computed after the sum."""
    if not e.op.startswith("fold_"):
        yield e
        for arg in e.args:
            yield from _outside(arg)


def _can_follow(e: Expr, nest: Nest, last: int) -> bool:
    if e.op == "operand":
        return nest.operands[int(e.value)][last] in (0, 1)
    return e.op in ("constant", *FOLLOWING, *BOUNDS)


def emit_product(name: str, product: Product, width: int) -> Iterator[str]:
    """Yield the lines of the function `name(out, operands...)`.

    Args:
        name: of the function.
        product: what it computes.
        width: float32 numbers in a vector, at most the number of columns.

    Example:
        >>> from .expressions import operand, total
        >>> strides = ((3, 0, 1), (0, 1, 8))
        >>> nest = Nest((4, 8), (3,), total(operand(0) * operand(1)), (8, 1), strides)
        >>> next(emit_product("product", Product.of(nest), 8))
        'define internal void @product(ptr noalias %out, ptr %x0, ptr %x1) noinline {'
    """
    return _Writer(product, width).emit(name)


class _Writer:
    """Writes the function of a product."""

    def __init__(self, product: Product, width: int) -> None:
        self.product, self.nest, self.code = product, product.nest, VectorText(width)
        sizes = self.nest.sizes
        self.last = len(sizes) - 1
        self.vectors = min(VECTORS, sizes[-1] // width)
        self.rows = 1 if product.row is None else min(ROWS, sizes[product.row])
        self._numbers = itertools.count()

    def emit(self, name: str) -> Iterator[str]:
        nest, code, row = self.nest, self.code, self.product.row
        operands = "".join(f", ptr %x{k}" for k in range(len(nest.operands)))
        yield f"define internal void @{name}(ptr noalias %out{operands}) noinline {{"
        yield "entry:"
        with ExitStack() as loops:
            for d in range(self.last):
                if d != row:
                    loops.enter_context(code.loop(f"%i{d}", "0", str(nest.sizes[d])))
            self._tiles(loops, self.last, self.vectors * code.width)
            if row is not None:
                self._tiles(loops, row, self.rows)
            self._tile()
        tile = itertools.product(range(self.rows), range(self.vectors))
        yield from (f"  %sum.{r}.{v} = alloca {code.vector}, align 64" for r, v in tile)
        yield from code.lines
        yield "  ret void"
        yield "}"

    def _tiles(self, loops: ExitStack, d: int, size: int) -> None:
        """Begin a loop over parts of an index. The last part overlaps the one before."""
        code, count = self.code, self.nest.sizes[d]
        loops.enter_context(code.loop(f"%tile{d}", "0", str(-(-count // size))))
        code(f"%start{d} = mul nsw i64 %tile{d}, {size}")
        code(f"%over{d} = icmp sgt i64 %start{d}, {count - size}")
        code(f"%i{d} = select i1 %over{d}, i64 {count - size}, i64 %start{d}")

    def _tile(self) -> None:
        code, nest, product = self.code, self.nest, self.product
        for r, v in itertools.product(range(self.rows), range(self.vectors)):
            code.store("zeroinitializer", f"%sum.{r}.{v}")
        with ExitStack() as loops:
            for j, size in enumerate(nest.reduced):
                loops.enter_context(code.loop(f"%r{j}", "0", str(size)))
            columns = [self._load(product.columns, 0, v, reduced=True) for v in range(self.vectors)]
            for r in range(self.rows):
                factor = self._load(product.rows, r, 0, reduced=True)
                for v, column in enumerate(columns):
                    before = code.load(self._name(), f"%sum.{r}.{v}")
                    after = self._call("fmuladd", factor, column, before)
                    code.store(after, f"%sum.{r}.{v}")
        for r, v in itertools.product(range(self.rows), range(self.vectors)):
            at = self._address("%out", nest.out, r, v)
            code.store(self._value(nest.expression, r, v), at)

    def _value(self, e: Expr, r: int, v: int) -> str:
        """Return the vector of an expression, after the sum."""
        code = self.code
        if e.op == "constant":
            return "<" + ", ".join([f"float {number(e.value)}"] * code.width) + ">"
        if e.op == "operand":
            return self._load(int(e.value), r, v, reduced=False)
        if e.op.startswith("fold_"):
            return code.load(self._name(), f"%sum.{r}.{v}")
        args = [self._value(arg, r, v) for arg in e.args]
        if e.op in FOLLOWING:
            return self._set(f"{FOLLOWING[e.op]} {code.vector} {args[0]}, {args[1]}")
        return self._call(BOUNDS[e.op], *args)

    def _load(self, k: int, r: int, v: int, reduced: bool) -> str:
        """Return a vector of an operand; of equal numbers if it is the same for all columns."""
        strides = self.nest.operands[k]
        strides = strides if reduced else strides[: self.last + 1]
        at = self._address(f"%x{k}", strides, r, v)
        if strides[self.last]:
            return self.code.load(self._name(), at)
        return self.code.splat(self._name(), self._set(f"load float, ptr {at}"))

    def _address(self, base: str, strides: Sequence[int], r: int, v: int) -> str:
        """Return the address at a row and a vector of the tile."""
        constant = v * self.code.width * strides[self.last]
        if self.product.row is not None:
            constant += r * strides[self.product.row]
        n = len(self.nest.sizes)
        for d, stride in enumerate(strides):
            if stride:
                counter = f"%i{d}" if d < n else f"%r{d - n}"
                step = self._set(f"mul nsw i64 {counter}, {stride}")
                base = self._set(f"getelementptr inbounds float, ptr {base}, i64 {step}")
        if constant:
            base = self._set(f"getelementptr inbounds float, ptr {base}, i64 {constant}")
        return base

    def _call(self, function: str, *args: str) -> str:
        vector, width = self.code.vector, self.code.width
        given = ", ".join(f"{vector} {arg}" for arg in args)
        return self._set(f"call {vector} @llvm.{function}.v{width}f32({given})")

    def _name(self) -> str:
        return f"t{next(self._numbers)}"

    def _set(self, instruction: str) -> str:
        name = f"%{self._name()}"
        self.code(f"{name} = {instruction}")
        return name
