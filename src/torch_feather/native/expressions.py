"""Expressions of float32 numbers: what a loop nest computes for one element.

The same expression is written as C (`c_source`) and as LLVM IR (`llvm_ir`).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

# Functions of the C library (math.h) that expressions may call.
LIBRARY = ("exp", "tanh", "erf", "log", "sqrt", "fabs", "pow", "sin", "cos", "floor")


@dataclass(frozen=True)
class Expr:
    """A node of an expression.

    Attributes:
        op: "operand" (`value` is its number), "constant" (`value`), "add", "sub", "mul", "div",
            "max", "min", "select" (the second argument if the first one is not 0, else the third),
            "less" (1 or 0), a name of `LIBRARY`, or "fold_add" and "fold_max", which combine the
            argument over all reduced indices, starting at `value`.
        args: arguments.
        value: see `op`.

    Example:
        >>> (operand(0) * 2.0).op
        'mul'
    """

    op: str
    args: tuple[Expr, ...] = ()
    value: float = 0.0

    def __add__(self, other: Expr | float) -> Expr:
        return Expr("add", (self, expr(other)))

    def __radd__(self, other: float) -> Expr:
        return expr(other) + self

    def __sub__(self, other: Expr | float) -> Expr:
        return Expr("sub", (self, expr(other)))

    def __rsub__(self, other: float) -> Expr:
        return expr(other) - self

    def __mul__(self, other: Expr | float) -> Expr:
        return Expr("mul", (self, expr(other)))

    def __rmul__(self, other: float) -> Expr:
        return expr(other) * self

    def __truediv__(self, other: Expr | float) -> Expr:
        return Expr("div", (self, expr(other)))

    def __rtruediv__(self, other: float) -> Expr:
        return expr(other) / self

    def __neg__(self) -> Expr:
        return expr(-1.0) * self

    def walk(self) -> Iterator[Expr]:
        """Yield this expression and all inside it.

        Example:
            >>> [e.op for e in call("exp", operand(0)).walk()]
            ['exp', 'operand']
        """
        yield self
        for arg in self.args:
            yield from arg.walk()


def expr(value: Expr | float) -> Expr:
    """Return a number as a constant expression; an expression as it is.

    Example:
        >>> expr(2).value
        2.0
    """
    return value if isinstance(value, Expr) else Expr("constant", value=float(value))


def operand(number: int) -> Expr:
    """Return the element of an operand of the loop nest.

    Example:
        >>> operand(1).value
        1
    """
    return Expr("operand", value=number)


def call(name: str, *args: Expr | float) -> Expr:
    """Return an operation by name, see `Expr`.

    Example:
        >>> call("max", operand(0), 0.0).args[1].value
        0.0
    """
    return Expr(name, tuple(expr(a) for a in args))


def clamp(x: Expr, low: float | None, high: float | None) -> Expr:
    """Return `x` within bounds; None is no bound. NaN stays NaN.

    Example:
        >>> clamp(operand(0), 0.0, None).op
        'max'
    """
    if low is not None:
        x = call("max", x, low)
    return x if high is None else call("min", x, high)


def total(x: Expr) -> Expr:
    """Return the sum over all reduced indices.

    Example:
        >>> total(operand(0)).op
        'fold_add'
    """
    return Expr("fold_add", (x,), 0.0)


def largest(x: Expr) -> Expr:
    """Return the maximum over all reduced indices.

    Example:
        >>> largest(operand(0)).value
        -inf
    """
    return Expr("fold_max", (x,), float("-inf"))


def sigmoid(x: Expr) -> Expr:
    """Return the logistic function, which does not overflow.

    Example:
        >>> sigmoid(operand(0)).op
        'div'
    """
    return 1.0 / (1.0 + call("exp", -x))
