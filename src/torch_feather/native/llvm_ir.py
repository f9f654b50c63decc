"""Loop nests as functions of LLVM IR."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack

from ..runtime.kernels import FunctionText
from ..runtime.kernels.activations import number
from .expressions import LIBRARY, Expr
from .inline_math import INLINE, INTRINSICS, emit_inline, inline_name
from .products import Product, emit_product
from .program import Nest

# Sums may be reordered, so that loops over adjacent numbers use vectors.
BINARY = {"add": "fadd contract", "sub": "fsub contract", "mul": "fmul contract", "div": "fdiv"}
BOUNDS = {"max": "llvm.maximum.f32", "min": "llvm.minimum.f32"}
FUNCTIONS = {
    **BOUNDS,
    "fold_max": BOUNDS["max"],
    **{op: f"llvm.{op}.f32" for op in ("sqrt", "fabs", "floor")},
}


def emit_nest(name: str, nest: Nest, widths: Sequence[int] = ()) -> Iterator[str]:
    """Yield the lines of the function `name(out, operands...)` of a loop nest.

    Args:
        name: of the function.
        nest: the loops.
        widths: float32 numbers in vectors of the processor, widest first, for products of matrices.

    Example:
        >>> from .expressions import operand
        >>> next(emit_nest("copy", Nest((4,), (), operand(0), (1,), ((1,),))))
        'define internal void @copy(ptr noalias %out, ptr %x0) noinline {'
    """
    if product := Product.of(nest):
        width = next((w for w in widths if w <= nest.sizes[-1]), None)
        if width is not None:
            yield from emit_product(name, product, width)
            return
    operands = "".join(f", ptr %x{k}" for k in range(len(nest.operands)))
    yield f"define internal void @{name}(ptr noalias %out{operands}) noinline {{"
    yield "entry:"
    code = FunctionText()
    code("%sum = alloca float")
    with ExitStack() as loops:
        for i, size in enumerate(nest.sizes):
            loops.enter_context(code.loop(f"%i{i}", "0", str(size)))
        _NestWriter(code, nest).element()
    yield from code.lines
    yield "  ret void"
    yield "}"


def emit_functions(nests: Iterable[Nest]) -> Iterator[str]:
    """Yield the functions that loop nests call: some inlined, declarations of the others.

    Example:
        >>> from .expressions import call, operand
        >>> list(emit_functions([Nest((), (), call("log", operand(0)), (), ((),))]))
        ['declare float @logf(float)']
    """
    used = sorted({e.op for nest in nests for e in nest.expression.walk()})
    inlined = [op for op in used if op in INLINE]
    lines = list(INTRINSICS if inlined else ())
    for op in used:
        if op in (*FUNCTIONS, *LIBRARY) and op not in INLINE:
            arguments = "float, float" if op in (*BOUNDS, "fold_max", "pow") else "float"
            lines.append(f"declare float @{_function(op)}({arguments})")
    yield from dict.fromkeys(lines)
    for op in inlined:
        yield from emit_inline(op)


def _function(op: str) -> str:
    """Return the name of the function that computes an operation."""
    return inline_name(op) if op in INLINE else FUNCTIONS.get(op, f"{op}f")


class _NestWriter:
    """Writes the computation of one element."""

    def __init__(self, code: FunctionText, nest: Nest) -> None:
        self.code, self.nest = code, nest
        self._numbers = itertools.count()

    def element(self) -> None:
        """Compute and store the element of the current index."""
        value = self._value(self.nest.expression, reduced=False)
        at = self._address("%out", self.nest.out)
        self.code(f"store float {value}, ptr {at}")

    def _name(self) -> str:
        return f"%t{next(self._numbers)}"

    def _value(self, e: Expr, reduced: bool) -> str:
        """Return the register or constant of an expression."""
        if e.op == "constant":
            return number(e.value)
        if e.op == "operand":
            k = int(e.value)
            strides = self.nest.operands[k]
            strides = strides if reduced else strides[: len(self.nest.sizes)]
            return self._set(f"load float, ptr {self._address(f'%x{k}', strides)}")
        if e.op.startswith("fold_"):
            return self._fold(e)
        args = [self._value(a, reduced) for a in e.args]
        if e.op in BINARY:
            return self._set(f"{BINARY[e.op]} float {args[0]}, {args[1]}")
        if e.op == "select":
            test = self._set(f"fcmp une float {args[0]}, 0.0")
            return self._set(f"select i1 {test}, float {args[1]}, float {args[2]}")
        if e.op == "less":
            test = self._set(f"fcmp olt float {args[0]}, {args[1]}")
            return self._set(f"uitofp i1 {test} to float")
        arguments = ", ".join(f"float {a}" for a in args)
        return self._set(f"call float @{_function(e.op)}({arguments})")

    def _fold(self, e: Expr) -> str:
        code = self.code
        code(f"store float {number(e.value)}, ptr %sum")
        with ExitStack() as loops:
            for j, size in enumerate(self.nest.reduced):
                loops.enter_context(code.loop(f"%r{j}", "0", str(size)))
            term = self._value(e.args[0], reduced=True)
            before = self._set("load float, ptr %sum")
            if e.op == "fold_add":
                after = self._set(f"fadd reassoc contract float {before}, {term}")
            else:
                function = _function(e.op)
                after = self._set(f"call float @{function}(float {before}, float {term})")
            code(f"store float {after}, ptr %sum")
        return self._set("load float, ptr %sum")

    def _address(self, base: str, strides: tuple[int, ...]) -> str:
        n = len(self.nest.sizes)
        for d, stride in enumerate(strides):
            if not stride:
                continue
            counter = f"%i{d}" if d < n else f"%r{d - n}"
            step = self._set(f"mul nsw i64 {counter}, {stride}") if stride != 1 else counter
            base = self._set(f"getelementptr inbounds float, ptr {base}, i64 {step}")
        return base

    def _set(self, instruction: str) -> str:
        name = self._name()
        self.code(f"{name} = {instruction}")
        return name
